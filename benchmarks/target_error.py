"""Whether a run with an attention error set has that error: the miniature at 32,760 tokens, the node's own code choosing.

    python -m benchmarks.target_error --device cuda
    python -m benchmarks.target_error --tiny --device cpu

Every self-attention call of a sampling goes through the hook that SLA2 Apply Attention puts into a model, so that what chooses
the sparsities, draws rows and fits ratios is what runs in ComfyUI. Beside it dense attention of ALL query rows of the call is
computed from the same q, k and v. The error of a run is the root mean square over its sparse calls of
||out - dense|| / ||dense||.

--record FOLDER keeps, for each call, the error at every rung of a ladder of sparsities as well: see error_recordings.py.
"""

import argparse
import dataclasses
import functools
import math
from pathlib import Path
from types import SimpleNamespace

import torch

from miniature.sample import noise_schedule

from . import results
from .error_recordings import RUNGS, Recording
from .measure import environment
from .miniature_model import SEED, Miniature
from .wan_in_comfyui import load_pack

TARGETS, STEPS = (0.08, 0.12, 0.16, 0.25), (20, 4)
SIZE = (81, 480, 832)  # 21 x 30 x 52 tokens
AT_ONCE = 2**30  # bytes of scores


class Sampling:
    """Of a flow model, for a hook that no start_percent and no schedule asks for more."""

    sigma_max = 1.0

    @staticmethod
    def percent_to_sigma(percent):
        return 1.0 - percent


class NodeAttention:
    """An attention function (layer, q, k, v) on (B, N, H, D) for the miniature: the node's hook, called as ComfyUI calls it.

    see: called after each call with (step, half, layer, q, k, v, out, whether it ran sparse).
    """

    def __init__(self, grid, config, steps, device, see, **settings):
        pack = load_pack().__name__
        module = lambda name: __import__(f"{pack}.{name}", fromlist=["*"])  # noqa: E731
        self._names = module("nodes.attention.model_call")
        layout = SimpleNamespace(
            grid=lambda inputs, patch: grid, prefix=lambda model, inputs, patch: 0, by_frame=False, text_mask=True,
            family="wan", token_order="raster", references=lambda inputs: lambda front, video, tokens: (),  # noqa: S106
        )  # fmt: skip
        self._config, self._sigmas, self._device, self._see = config, noise_schedule(steps), device, see
        facts = module("nodes.attention.model_families").ModelFacts(
            layout, config.num_layers, config.num_heads, 128, (1, 2, 2), ()
        )
        chosen = module("nodes.settings.values").AttentionSettings(**{"minimum_tokens": 0} | settings)
        self.hook = module("nodes.attention.hook").AttentionHook(chosen, None, facts, None, Sampling())
        self._override = module("nodes.attention.override").make_override(self.hook, None)
        self._calls, self._options = 0, {}
        self.hook.begin_run()

    def __call__(self, layer, q, k, v):
        if layer == 0:
            self._begin_model_call()
        options = self._options | {self._names.LAYER: layer}
        flat, record = (x.flatten(2) for x in (q, k, v)), self.hook.run_for_call().layers[layer]
        before = record.sparse
        with torch.autocast(q.device.type, enabled=False):
            out = self._override(_dense_flat, *flat, q.shape[2], transformer_options=options).unflatten(2, q.shape[2:])
            step, half = divmod(self._calls - 1, 2)
            self._see(step, half, layer, q, k, v, out, record.sparse > before)
        return out

    def _begin_model_call(self):
        step, half = divmod(self._calls, 2)
        self._calls += 1
        sigmas = self._sigmas[step : step + 1].to(self._device)
        self._options = {"sigmas": sigmas, "sample_sigmas": self._sigmas, "cond_or_uncond": [half]}
        self.hook.before_model(self._device, self._options)
        self._options[self._names.OVERRIDE] = self._override
        self.hook.model_call(SimpleNamespace(), dict, self._options)

    def choose(self, sparsity):
        """Gives the calls of this model call another sparsity than the target's choice, where there is one."""
        call = self._options[self._names.CALL]
        if call.step.choice is not None:
            step = call.step._replace(choice=call.step.choice._replace(sparsity=sparsity))
            self._options[self._names.CALL] = dataclasses.replace(call, step=step)

    def end(self):
        """The closed RunRecord."""
        self.hook.end_run()
        return self.hook.runs.finished()[-1]


def _dense_flat(q, k, v, heads, **_):
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def dense(q, k, v, dtype):
    """Softmax attention of (1, N, H, D), computed and returned in ``dtype``, some rows of one head at a time."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    rows = max(1, AT_ONCE // (k.shape[1] * dtype.itemsize))
    for head in range(q.shape[2]):
        keys, values = k[0, :, head].to(dtype).T.contiguous(), v[0, :, head].to(dtype).contiguous()
        for some in range(0, q.shape[1], rows):
            queries = q[0, some : some + rows, head].to(dtype) * q.shape[3] ** -0.5
            torch.mm((queries @ keys).softmax(dim=-1), values, out=out[0, some : some + rows, head])
    return out


class Judge:
    """Errors of a run's calls over all their rows; hands each call on to a Recording where there is one.

    squares: {(step, half, layer): squared relative error} of the calls that ran sparse.
    """

    def __init__(self, dtype, recording=None):
        self._dtype, self._recording, self._squares = dtype, recording, {}

    @torch.no_grad()
    def __call__(self, step, half, layer, q, k, v, out, is_sparse):
        exact = dense(q, k, v, self._dtype)
        if is_sparse:
            error = (out.to(self._dtype) - exact).square().sum(dtype=torch.float64)
            self._squares[step, half, layer] = error / exact.square().sum(dtype=torch.float64)
        if self._recording is not None:
            self._recording.see(step, half, layer, q, k, v, exact)

    @functools.cached_property
    def squares(self):
        return {call: square.item() for call, square in self._squares.items()}

    def error(self, layer=None):
        some = [square for call, square in self.squares.items() if layer in (None, call[2])]
        return math.sqrt(sum(some) / len(some))

    def of_steps(self):
        """Error of each step that ran sparse."""
        steps = dict.fromkeys(step for step, _, _ in self.squares)
        of = [[square for call, square in self.squares.items() if call[0] == step] for step in steps]
        return [math.sqrt(sum(some) / len(some)) for some in of]


@dataclasses.dataclass
class Study:
    """What all runs share. dtype: of the dense attention that judges. record: folder for recordings, or None."""

    miniature: Miniature
    dtype: torch.dtype
    captions: list[str]
    record: Path | None = None
    rows: list[dict] = dataclasses.field(default_factory=list)

    def run(self, target, steps, caption):
        """One run; its figures are printed and kept."""
        self.miniature.steps = steps
        _, _, frames, height, width = self.miniature.latent_shape
        grid, model = (frames, height // 2, width // 2), self.miniature.model
        recording = None
        if self.record is not None:
            recording = Recording(steps, model.config.num_layers, model.config.num_heads, math.prod(grid), RUNGS)
        judge = Judge(self.dtype, recording)
        node = NodeAttention(grid, model.config, steps, self.miniature.device, judge, target_error=target)
        self.miniature._sample(self.captions[caption], 2 * SEED + caption, node)
        run = node.end()
        if recording is not None:
            recording.save(self.record / f"target_{target:g}_steps_{steps}_caption_{caption}.safetensors")
        self._keep(run, judge, {"target": target, "steps": steps, "caption": caption, "tokens": math.prod(grid)})

    def _keep(self, run, judge, row):
        layers = sorted(run.layers)
        row["error"], row["reported"] = judge.error(), run.attention_error
        row["sparsities"] = list(run.error_target.chosen)
        row["error of steps"] = judge.of_steps()
        row["error of layers"] = [judge.error(layer) for layer in layers]
        row["reported of layers"] = [run.layers[layer].attention_error for layer in layers]
        row["skipped"] = run.sparsity
        row["ms per call"] = sum(run.layers[layer].milliseconds.get("sparse", 0.0) for layer in layers) / len(layers)
        row["dense calls"] = sum(run.layers[layer].dense.total() for layer in layers)
        self.rows.append(row)
        print(line(row), flush=True)


def line(row):
    """A row of the table, in words."""
    share, chosen = row["error"] / row["target"], " ".join(f"{sparsity:.3f}" for sparsity in row["sparsities"])
    return (
        f"target {row['target']:g}, {row['steps']} steps, caption {row['caption']}: error {row['error']:.4f} "
        f"({100 * share:.1f}% of the target), reported {row['reported']:.4f}, skipped {100 * row['skipped']:.1f}%, "
        f"{row['ms per call']:.2f} ms a call; chosen {chosen}; "
        f"errors of steps {' '.join(f'{error:.3f}' for error in row['error of steps'])}"
    )


def markdown(rows):
    """One line per target and number of steps, over the captions."""
    found = [
        "| target | steps | error over all rows, by caption | reported | skipped | sparsities | ms a call |",
        "|---|---|---|---|---|---|---|",
    ]
    for target, steps in dict.fromkeys((row["target"], row["steps"]) for row in rows):
        some = [row for row in rows if (row["target"], row["steps"]) == (target, steps)]
        chosen = [sparsity for row in some for sparsity in row["sparsities"]]
        of = {name: sum(row[name] for row in some) / len(some) for name in ("skipped", "ms per call")}
        errors, reported = (", ".join(f"{row[name]:.3f}" for row in some) for name in ("error", "reported"))
        found.append(
            f"| {target:g} | {steps} | {errors} | {reported} | {100 * of['skipped']:.1f}% | "
            f"{min(chosen):.3f} to {max(chosen):.3f} | {of['ms per call']:.2f} |"
        )
    return "\n".join(found)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--captions", type=int, default=1, help="held-out captions, one run each")
    parser.add_argument("--size", nargs=3, type=int, default=SIZE, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument(
        "--exact", default="float64", choices=("float64", "float32"), help="dense attention to judge by"
    )
    parser.add_argument("--record", type=Path, help="folder for recordings of every rung")
    parser.add_argument("--tiny", action="store_true", help="a random miniature of 320 tokens: tries this script")
    parser.add_argument("--out", help="JSON file for the figures, written after each run")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    miniature = Miniature.tiny(args.device) if args.tiny else Miniature.load(None, args.device)
    if not args.tiny:
        miniature.size = tuple(args.size)
    # of 16-bit q, k and v a TF32 product is exact; of the weights it has 10 bits, far more than the errors measured here need
    torch.backends.cuda.matmul.allow_tf32 = args.exact == "float32"
    study = Study(miniature, getattr(torch, args.exact), miniature._captions("held out", args.captions), args.record)
    for steps in args.steps:
        for target in args.targets:
            for caption in range(args.captions):
                study.run(target, steps, caption)
                if args.out:
                    results.save(args.out, {"environment": environment(args.device), "rows": study.rows})
    print("\n" + markdown(study.rows))


if __name__ == "__main__":
    main()
