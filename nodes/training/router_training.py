"""Trains a router while ComfyUI samples with the dense model: which call trains for how many steps, and progress texts."""

import contextlib
import functools
import math
import threading
import weakref
from collections import Counter

from ...sla2_training import RouterTrainer
from ..attention.call import check_supported
from ..attention.model_call import CALL, LAYER
from ..attention.patching import install_dense
from ..attention.run_dense import RunDense
from ..attention.sparse_call import video_part
from ..attention.video_tokens import DENSE_BY_NATURE
from ..settings.values import FULL_WIDTH

STEPS_PER_CALL = 4  # optimisation steps per attention call; more steps on the same tensors bring little


class Schedule:
    """Spreads the optimisation steps of a layer evenly over the timesteps of as many sampling passes as they need."""

    def __init__(self, budget, sampling_steps):
        self.budget, self.sampling_steps = budget, sampling_steps
        self.passes = max(1, math.ceil(budget / (STEPS_PER_CALL * sampling_steps)))

    def due(self, done, number, step):
        """Optimisation steps that a layer with ``done`` of them owes at this sampling step of training pass ``number``."""
        share = (number * self.sampling_steps + min(step, self.sampling_steps - 1) + 1) / (
            self.passes * self.sampling_steps
        )
        return max(0, math.ceil(self.budget * share - 1e-9) - done)


class RouterTraining:
    """A dense clone of a MODEL whose self-attention calls train a RouterTrainer, or are measured, while it samples.

    model: a ComfyUI ModelPatcher of a known family. facts: its ModelFacts. schedule: Schedule. say(text): progress text.
    """

    def __init__(self, model, facts, trainer, schedule, say):
        self.trainer, self.schedule, self.say = trainer, schedule, say
        self.facts = facts
        self.untrained = Counter()
        self.number, self.step = 0, 0
        self.calls, self.last_calls = {}, {}
        self.lock = threading.Lock()
        self.model = install_dense(model, facts.num_layers, self._override)

    def _override(self, base):
        # no reference from the model back to this training: the cycle would keep the clone until the garbage collector runs,
        # and ComfyUI would report a memory leak
        meet = weakref.WeakMethod(self._meet)

        def sla2_training_override(func, *args, **kwargs):
            below = func if base is None else functools.partial(base, func)
            out = below(*args, **kwargs)
            options = kwargs.get("transformer_options") or {}
            if options.get(CALL) is not None and options.get(LAYER) is not None:
                meet()(options[CALL], options[LAYER], args, kwargs)
            return out

        return sla2_training_override

    @property
    def measuring(self):
        """True in the pass after the training passes: new noise, nothing is trained, errors are measured."""
        return self.number == self.schedule.passes

    @property
    def steps_done(self):
        return max(self.trainer.steps.values(), default=0)

    def run(self, sample, advance):
        """All passes. sample(number, callback) samples once with the noise of that pass; advance() after each step."""

        def after_step(step, *_):
            self._begin_step(step + 1)
            advance()
            self.say(self.progress())

        for number in range(self.schedule.passes + 1):
            self.number = number
            self._begin_step(0)
            sample(number, after_step)
            if not self.trainer.steps:
                raise ValueError(f"SLA2 Train Router: nothing could be trained: {self._why_nothing()}.")

    def progress(self):
        """The current pass and step, and the latest loss of every layer."""
        what = "measuring" if self.measuring else f"training pass {self.number + 1} of {self.schedule.passes}"
        head = f"{what}, step {self.step} of {self.schedule.sampling_steps}; {self.steps_done} optimisation steps done"
        losses = [f"{layer}: {losses[-1]:.4f}" for layer, losses in sorted(self.trainer.losses.items())]
        rows = ["   ".join(losses[i : i + 5]) for i in range(0, len(losses), 5)]
        return "\n".join([head, "loss by layer (share of the output's energy)", *rows])

    def report(self):
        """The training's report as text, with the calls that could not be trained on."""
        lines = [f"{count} calls were not trained on: {reason}." for reason, count in self.untrained.items()]
        return "\n".join([self.trainer.report().text(), *lines])

    def _begin_step(self, step):
        self.step, self.last_calls, self.calls = step, self.calls, {}

    def _meet(self, call, layer, args, kwargs):
        """One self-attention call that has run dense: the router is trained or measured on it."""
        try:
            request, exact = call.read(args, kwargs)
            check_supported(request, "16bit")
        except RunDense as found:
            if found.reason not in DENSE_BY_NATURE:
                with self.lock:
                    self.untrained[found.reason] += 1
            return
        part = video_part(request, exact)
        with self.lock:
            if self._is_turn(layer):
                with training_mode():
                    self._learn(layer, request.scale, exact, part)

    def _is_turn(self, layer):
        """One call per layer and step; where guidance makes several, they take turns from step to step."""
        count = self.calls[layer] = self.calls.get(layer, 0) + 1
        return count == self.step % self.last_calls.get(layer, 1) + 1

    def _learn(self, layer, scale, exact, part):
        options = {"layout": part.layout, "scale": scale, "prefix": exact.key_prefix, "suffix": exact.key_suffix}
        if self.measuring:
            self.trainer.evaluate(layer, part.q, part.k, part.v, **options)
            return
        due = self.schedule.due(self.trainer.steps.get(layer, 0), self.number, self.step)
        if due:
            self.trainer.observe(layer, part.q, part.k, part.v, steps=due, **options)

    def _why_nothing(self):
        if self.untrained:
            return next(iter(self.untrained))
        return "the video has 64 tokens or less, or another node replaced its self-attention"


@contextlib.contextmanager
def training_mode():
    """ComfyUI's flag that gradients are on: without it some of its operations refuse tensors that need them."""
    import comfy.model_management

    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def make_trainer(facts, sparsities, options, resume):
    """RouterTrainer of a model with these ModelFacts."""
    return RouterTrainer(
        facts.layout.family,
        facts.num_layers,
        facts.num_heads,
        facts.head_dim,
        sparsities=sparsities,
        options=options,
        resume=resume,
    )


def parse_sparsities(text):
    """ "0.97, 0.95, 0.90" -> (0.97, 0.95, 0.9). Raises ValueError with one sentence."""
    try:
        sparsities = tuple(
            float(part) for part in text.translate(FULL_WIDTH).replace(";", ",").split(",") if part.strip()
        )
    except ValueError:
        sparsities = ()
    if not sparsities or not all(0 < s < 1 for s in sparsities) or len(set(sparsities)) < len(sparsities):
        raise ValueError(
            f'sparsities must be different numbers between 0 and 1 such as "0.97, 0.95, 0.90", got {text!r}.'
        )
    return sparsities
