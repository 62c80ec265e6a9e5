"""What happened in one sampling run, per layer: counts at once on the host, ratios and times on the device until the end."""

import contextlib
import threading
import time
from collections import Counter, defaultdict

import torch

from ...sla2_kernels.support import on_device
from .call_times import CallTimes
from .device_counts import DeviceCounts
from .error_target import MAX_SPARSITY, ErrorTarget
from .fitted_ratios import FittedRatios
from .inexact_dense import is_sage, ragged_key_count
from .routing_maps import wanted_maps

ROUNDING = 1e-6


class LayerRecord:
    """Calls of one layer. ratio_range, attention_error and milliseconds: None until the run is closed, or where unmeasured.

    attention_error: ||output - dense attention|| / ||dense attention|| over query rows that fitting calls computed exactly.
    """

    def __init__(self):
        self.entered = 0
        self.sparse = 0
        self.dense = Counter()
        self.kept_pairs = 0
        self.all_pairs = 0
        self.ratio_range = None
        self.attention_error = None
        self.not_finite = 0
        self.rows_left_out = 0  # of the exact rows, for NaN or infinity
        self.milliseconds = {}
        self.times = defaultdict(CallTimes)

    @property
    def unreached(self):
        """Self-attention modules that ran without their attention call ever coming to the hook."""
        return max(0, self.entered - self.sparse - self.dense.total())

    @property
    def sparsity(self):
        """Share of (query, key) token pairs that the softmax branch skipped in the sparse calls, or None."""
        return 1 - self.kept_pairs / self.all_pairs if self.all_pairs else None


class RunRecord:
    """One sampling run of a model with so many layers. Several threads may write (MultiGPU); read it once it is closed."""

    def __init__(self, number, layers, context=None, window=None):
        self.number = number
        self.context = context
        self.window = window
        self.layers = defaultdict(LayerRecord)
        self.family_reasons = Counter()
        self.other_calls = 0
        self.model_calls = 0
        self.answered_calls = 0
        self.unmet = Counter()  # why a model call came to none of the marked self-attentions
        self.aside = None  # why SLA2 takes no call of this run
        self.has_hidden_calls = False  # layers that ran without the options that would have shown them to us
        self.failed_layers = {}  # layer, None for all of them -> why it runs dense until the run ends
        self.rows_failed = None  # why PyTorch's attention computes the rows of text and sound until the run ends
        self.calls_with_rows_below = 0  # sparse calls of which it did
        self.precisions = set()
        self.loops = Counter()  # Loop -> sparse calls that took it
        self.devices = set()  # that sparse calls ran on
        self.shortest = None  # keys of the shortest sequence that ran sparse
        self.backends = set()  # attention functions of ComfyUI that our calls came from
        self.ragged_sage_calls = Counter()  # number of keys -> calls handed to SageAttention, see inexact_dense.py
        self.notes = {}
        self.failure = None
        self.started = time.monotonic()
        self.ended = None
        self.latent_sample = None
        self.maps = wanted_maps()
        self.fitted_ratios = FittedRatios()
        self.plan = None  # Plan, where the preset is automatic
        self.error_target = None  # ErrorTarget where the user set one
        self.attention_error = None  # root mean square of the measured calls' relative errors, once the run is closed
        self.lock = threading.Lock()
        self._on_devices = DeviceCounts(layers)
        self._checked_layers = set()  # whose first output was checked
        self._said = set()
        self._sigma_memo = (None, None)

    @property
    def sparsity(self):
        """As of a LayerRecord, over all layers."""
        kept, pairs = (sum(getattr(record, n) for record in self.layers.values()) for n in ("kept_pairs", "all_pairs"))
        return 1 - kept / pairs if pairs else None

    @property
    def sparse_calls(self):
        return sum(record.sparse for record in self.layers.values())

    @property
    def dense_calls(self):
        """Those that never came to the hook included."""
        return sum(record.dense.total() + record.unreached for record in self.layers.values())

    def first_time(self, reason):
        """True once per run and reason: what is logged once."""
        with self.lock:
            new = reason not in self._said
            self._said.add(reason)
        return new

    def note(self, sentence):
        with self.lock:
            self.notes[sentence] = None

    def see_backend(self, name):
        with self.lock:
            self.backends.add(name)

    def see_handed_on(self, name, args, kwargs):
        """A call that goes down the chain, to a function of this name."""
        keys = ragged_key_count(args, kwargs) if is_sage(name) else None
        if keys is not None:
            with self.lock:
                self.ragged_sage_calls[keys] += 1

    def count_model_call(self):
        with self.lock:
            self.model_calls += 1

    def count_answered(self):
        """A model call that a step cache on this model answered: it never reached the model's layers."""
        with self.lock:
            self.answered_calls += 1

    def count_unmet(self, reason):
        """A model call that came to none of the marked self-attentions."""
        with self.lock:
            self.unmet[reason] += 1

    def count_other(self, family_reason=None):
        with self.lock:
            if family_reason is None:
                self.other_calls += 1
            else:
                self.family_reasons[family_reason] += 1

    def count_entered(self, layer):
        with self.lock:
            self.layers[layer].entered += 1

    def count_dense(self, layer, reason):
        with self.lock:
            self.layers[layer].dense[reason] += 1

    def prepare(self, device):
        """Allocates what counting on ``device`` needs, outside of any model call."""
        with self.lock:
            self._on_devices.prepare(device)

    @torch.no_grad()
    def count_sparse(self, layer, shape, kept, keys, precision, ratio, queries):
        """shape: (batch, heads, query tokens); ratio: the row ratios used, float32 of that shape, left on its device.

        kept of keys keys were attended by each of these tokens, all of them by the rest of the call's ``queries`` tokens.
        """
        batch, heads, tokens = shape
        with self.lock:
            record = self.layers[layer]
            record.sparse += 1
            record.kept_pairs += batch * heads * (tokens * kept + (queries - tokens) * keys)
            record.all_pairs += batch * heads * queries * keys
            self.precisions.add(precision)
            self.devices.add(ratio.device)
            self.shortest = keys if self.shortest is None else min(self.shortest, keys)
            self._on_devices.add_ratio(layer, ratio)

    def count_errors(self, layer, errors):
        """The arguments are those of DeviceCounts.add_errors()."""
        with self.lock:
            self._on_devices.add_errors(layer, errors)

    def count_call_with_rows_below(self):
        """A sparse call whose rows of text and sound PyTorch's attention computed, because of rows_failed."""
        with self.lock:
            self.calls_with_rows_below += 1

    def target(self, error):
        """The run's ErrorTarget for this attention error."""
        with self.lock:
            if self.error_target is None:
                self.error_target = ErrorTarget(error)
            return self.error_target

    def relative_errors(self):
        """(sum of the squared relative errors over all exact rows, number) of the calls measured so far; waits for the devices."""
        with self.lock:
            return self._on_devices.relative_errors(with_fitted=True)

    def count_loops(self, loops):
        """loops: what watch_loops() saw during one sparse call."""
        with self.lock:
            self.loops.update(set(loops))

    @torch.no_grad()
    def count_output(self, layer, out):
        """Counts a sparse output that holds NaN or infinity, on its device; True where it is the layer's first one and does."""
        lowest, highest = torch.aminmax(out)
        # NaN or infinity times 0 is NaN, unlike all else; isfinite() takes four launches of each
        bad = lowest * 0 != highest * 0
        with self.lock:
            first = layer not in self._checked_layers
            self._checked_layers.add(layer)
        if first and not capturing(out.device):
            return bool(bad)  # a bad one is not used: it counts as a dense call
        with self.lock:
            self._on_devices.add_bad(layer, bad)
        return False

    @contextlib.contextmanager
    def timed(self, layer, kind, device):
        """Measures one call: with a pair of CUDA events, on a CPU by the clock; not while a CUDA graph is captured."""
        with self.lock:
            times = self.layers[layer].times[kind]
        if device.type == "cpu":
            begun = time.perf_counter()
            yield
            elapsed = 1000 * (time.perf_counter() - begun)
            with self.lock:
                times.add(elapsed)
            return
        if device.type != "cuda" or capturing(device) or not self._has_room(times):
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        start.record(stream)
        yield
        end.record(stream)
        with self.lock:
            times.add_events(start, end)

    def _has_room(self, times):
        with self.lock:
            return times.has_room()

    @torch.no_grad()
    def sigma(self, sigmas):
        """The step's sigma as a number: one read of the device per step, which a training must not record."""
        with self.lock:
            known, sigma = self._sigma_memo
        if known is not sigmas:
            sigma = float(sigmas.max())
            with self.lock:
                self._sigma_memo = (sigmas, sigma)
        return sigma

    def in_window(self, sigmas):
        """Whether this step is inside the window; None if the sampler does not say."""
        if self.window is None:
            return True
        if sigmas is None:
            return None
        return self.is_inside(self.sigma(sigmas))

    def is_inside(self, sigma):
        """Whether a noise level lies inside the window, which is set."""
        highest, lowest = self.window
        # steps have float32 sigmas, and a step on the edge lies inside
        return lowest * (1 - ROUNDING) <= sigma <= highest * (1 + ROUNDING)

    def close(self, failure=None, output=None):
        """Ends the run; unless it failed, fetches what was left on the device."""
        self.ended = time.monotonic()
        self.failure = failure
        self._sigma_memo = (None, None)
        if failure is None:
            self._on_devices.fetch()
            self.attention_error = self._attention_error()
        for layer, record in self.layers.items():
            if failure is None:
                self._collect(layer, record)
            record.times.clear()
        self._on_devices.clear()
        self.fitted_ratios.clear()
        self._note_bad_outputs()
        self._note_calls_with_rows_below()
        self._note_errors()
        self._note_unmet()
        if self.plan is not None and self.sparse_calls:
            self.note(self.plan.sentence)
        if self.maps is not None:
            self.maps.close()
        if failure is None and output is not None:
            self.latent_sample = sample_of(output)

    def _attention_error(self):
        """Root mean square over the measured calls; with a target over the steps, of which it chooses those that measure."""
        if self.error_target is not None:
            return self.error_target.run_error(*self._on_devices.relative_errors(with_fitted=True))
        total, count = self._on_devices.relative_errors()
        return (total / count) ** 0.5 if count else None

    def _collect(self, layer, record):
        record.not_finite = self._on_devices.bad_outputs(layer)
        record.ratio_range = self._on_devices.ratio_range(layer)
        record.attention_error = self._on_devices.error(layer)
        record.rows_left_out = self._on_devices.rows_left_out(layer)
        means = {kind: times.mean() for kind, times in record.times.items()}
        if record.dense and not record.sparse:
            means.pop("sparse", None)  # of an attempt whose output was not used
        record.milliseconds = {kind: mean for kind, mean in means.items() if mean is not None}

    def _note_bad_outputs(self):
        bad = {layer: record.not_finite for layer, record in sorted(self.layers.items()) if record.not_finite}
        if bad:
            calls = ", ".join(f"{count} in layer {layer}" for layer, count in bad.items())
            self.note(
                f"sparse outputs with NaN or infinity: {calls}; try bit_width 16bit, or these layers in dense_layers"
            )

    def _note_calls_with_rows_below(self):
        if self.calls_with_rows_below:
            calls = f"{self.calls_with_rows_below} call{'s' if self.calls_with_rows_below > 1 else ''}"
            self.note(f"PyTorch's attention computed the rows of text and sound of {calls}: {self.rows_failed}")

    def _note_errors(self):
        left_out = sum(record.rows_left_out for record in self.layers.values())
        if left_out:
            self.note(
                f"{left_out} sampled rows with NaN or infinity have no part in the ratios and the attention error"
            )
        target, found = self.error_target, self.attention_error
        if found is not None and target is not None and target.ends_at_the_highest and found < 0.9 * target.error:
            self.note(
                f"target_error {target.error:g} was not used up: more than {100 * MAX_SPARSITY:g}% is never skipped, and that "
                "was exact enough for the last steps"
            )

    def _note_unmet(self):
        for reason, count in self.unmet.items():
            self.note(
                f"{count} of {self.model_calls} model calls came to none of the self-attentions that SLA2 marked: {reason}"
            )


def capturing(device):
    """Whether a CUDA graph is being captured on ``device``."""
    if device.type != "cuda":
        return False
    with on_device(device):
        return torch.cuda.is_current_stream_capturing()


def sample_of(latent, count=64):
    """Evenly spaced values of a latent on the CPU, enough to recognise it; None for anything but a plain tensor."""
    if not isinstance(latent, torch.Tensor) or latent.is_nested or latent.numel() == 0:
        return None
    flat = latent.detach().reshape(-1)
    picked = flat[torch.arange(count, device=flat.device) * (flat.numel() - 1) // (count - 1)]
    return latent.numel(), picked.float().cpu()


def difference(sample, other):
    """Largest difference of two samples of sample_of, NaN being like NaN; infinite where they cannot be of one latent."""
    if sample is None or other is None or sample[0] != other[0]:
        return float("inf")
    return (sample[1].nan_to_num() - other[1].nan_to_num()).abs().max().item()
