"""What the untrained mode's output is worth, by length and share, beside ComfyUI's own sparse attention at equal time.

    PYTHONPATH=FOLDER python -m benchmarks.untrained_error --device cuda     two minutes; FOLDER has comfy-kitchen
    python -m benchmarks.untrained_error --tiny --device cpu

Errors: the miniature is sampled densely at each length; in chosen steps every method attends the same q, k and v. An error
is the root mean square over layers, both halves of guidance and steps of ||out - dense|| / ||dense||, over rows drawn per
call whose dense attention is computed in float32. The miniature was trained at up to 32,760 tokens: at
75,600 its attention is that of a trained model, its picture is not.
Times: whole calls at the shapes of real models, random data, the median of triton.testing.do_bench.
"""

import argparse
import functools
import math
from collections import defaultdict

import torch
import torch.nn.functional as F

from sla2_kernels import sla2_attention
from sla2_kernels.fitted_attention import fitted_attention, sample_rows

from . import results
from .measure import environment, median_ms
from .miniature_model import SEED, Miniature

# tokens -> (frames, height, width)
SIZES = {8400: (81, 320, 320), 14196: (81, 416, 416), 32760: (81, 480, 832), 75600: (81, 720, 1280)}
CAPTIONS = {8400: 3, 14196: 2, 32760: 2, 75600: 1}
SPARSITIES = (0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.90, 0.85, 0.80, 0.70)
ESTIMATED = (0.97, 0.95, 0.90)
SOL_TOPK, SOL_TAU = (0.03, 0.05, 0.10), 1.3
STEPS = (0, 2, 5, 8, 10, 12, 14, 16, 18)  # of 20
LATE = 8  # the first step of the errors that do not come from the earliest, noisiest steps
JUDGED = 512
# heads, tokens
SHAPES = {"1.3B-480p": (12, 32760), "14B-720p": (40, 75600), "MiniMax H3": (56, 42000)}


def fitted(sparsity):
    def attend(q, k, v, number):
        rows = sample_rows(q.shape[1], number, q.device)
        return fitted_attention(q, k, v, rows=rows, sparsity=sparsity, layout="BNHD", keep_diagonal=True).out

    return attend


def estimated(sparsity):
    def attend(q, k, v, number):
        return sla2_attention(q, k, v, sparsity=sparsity, layout="BNHD", keep_diagonal=True)

    return attend


def sol(**options):
    def attend(q, k, v, number):
        from comfy_kitchen import sol_attn

        return sol_attn(q.contiguous(), k.contiguous(), v.contiguous(), **options)

    return attend


def methods(with_sol):
    """{name: attend(q, k, v, number) on (1, N, H, 128)}."""
    found = {f"fitted {sparsity:g}": fitted(sparsity) for sparsity in SPARSITIES}
    found |= {f"estimated {sparsity:g}": estimated(sparsity) for sparsity in ESTIMATED}
    if with_sol:
        found |= {f"sol_attn topk {share:g}": sol(topk_ratio=share) for share in SOL_TOPK}
        found[f"sol_attn tau {SOL_TAU:g}"] = sol(tau=SOL_TAU)
    return found


class Tap:
    """An attention function that runs dense and, in the chosen steps, adds up each method's squared errors.

    squares: {(method, step): [(error, energy) per call]}.
    """

    def __init__(self, compared, steps, judged, dtype):
        self.compared, self.steps, self.judged, self.dtype = compared, steps, judged, dtype
        self.squares, self._counts = defaultdict(list), {}

    def __call__(self, layer, q, k, v):
        call = self._counts[layer] = self._counts.get(layer, -1) + 1
        q, k, v = (x.to(self.dtype) for x in (q, k, v))
        if call // 2 in self.steps:
            self._compare(call, layer, q, k, v)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    @torch.no_grad()
    def _compare(self, call, layer, q, k, v):
        generator = torch.Generator().manual_seed(1000 * call + layer)
        rows = torch.randperm(q.shape[1], generator=generator)[: self.judged].to(q.device)
        dense = torch.stack(
            [_dense(*(x[0, :, head].float() for x in (q, k, v)), rows) for head in range(q.shape[2])], 1
        )
        energy = dense.square().sum()
        for name, attend in self.compared.items():
            with torch.autocast(q.device.type, enabled=False):
                out = attend(q, k, v, 100 * call + layer)
            error = (out[0, rows].float() - dense).square().sum()
            self.squares[name, call // 2].append(torch.stack([error, energy]))


def _dense(q, k, v, rows):
    """Softmax attention of ``rows`` of one head, float32 (R, D)."""
    return (q[rows] @ k.T * q.shape[1] ** -0.5).softmax(dim=-1) @ v


def rms(taps, name, steps):
    """Root mean square over the calls of these steps."""
    calls = torch.stack([squares for tap in taps for step in steps for squares in tap.squares[name, step]])
    return (calls[:, 0] / calls[:, 1]).mean().sqrt().item()


def measure_errors(miniature, sizes, compared, steps, judged, captions):
    """{tokens: {method: [error over the steps from LATE on, error over all]}}."""
    found = {}
    for tokens, size in sizes.items():
        miniature.size = size
        taps = []
        for number, caption in enumerate(miniature._captions("held out", captions[tokens])):
            taps.append(Tap(compared, steps, judged, torch.bfloat16 if miniature.bf16 else torch.float32))
            miniature._sample(caption, 2 * SEED + number, taps[-1])
        late = [step for step in steps if step >= LATE] or steps
        found[tokens] = {name: [rms(taps, name, some) for some in (late, steps)] for name in compared}
        print(f"{tokens} tokens: late steps, all")
        for name, (of_late, of_all) in found[tokens].items():
            print(f"  {of_late:.4f} {of_all:.4f}  {name}", flush=True)
    return found


def measure_times(compared, shapes, device):
    """{shape: {method: ms}}"""
    found = {}
    for shape, (heads, tokens) in shapes.items():
        torch.manual_seed(0)
        qkv = [torch.randn(1, tokens, heads, 128, device=device, dtype=torch.bfloat16) for _ in range(3)]
        print(f"{shape}: ms")
        found[shape] = {}
        for name, attend in compared.items():
            found[shape][name] = median_ms(functools.partial(attend, *qkv, 0), device)
            print(f"  {found[shape][name]:.3f}  {name}", flush=True)
    return found


def at_equal_time(errors, times):
    """[(rival, its ms, its error, our sparsity, our error), ...]: ours at the sparsity that takes as long, None out of range.

    Between two measured sparsities the logarithms of the kept share and of the error go straight with the time.
    """
    ours = sorted(
        (times[name], math.log(1 - float(name.split()[1])), math.log(error))
        for name, error in errors.items()
        if name.startswith("fitted")
    )
    found = []
    for name in (name for name in errors if name.startswith("sol_attn")):
        around = [pair for pair in zip(ours, ours[1:], strict=False) if pair[0][0] <= times[name] <= pair[1][0]]
        sparsity = error = None
        if around:
            (low, *at_low), (high, *at_high) = around[0]
            part = (times[name] - low) / max(high - low, 1e-9)
            share, error = (math.exp(a + part * (b - a)) for a, b in zip(at_low, at_high, strict=True))
            sparsity = 1 - share
        found.append((name, times[name], errors[name], sparsity, error))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a random miniature of a few tokens: tries this script")
    parser.add_argument("--out", help="JSON file for the figures, written after each part")
    args = parser.parse_args(argv)
    content = {}

    def keep(part, figures):
        content[part] = figures
        if args.out:
            results.save(args.out, content)

    if args.tiny:
        miniature, compared = Miniature.tiny(args.device), {"fitted 0.5": fitted(0.5), "estimated 0.5": estimated(0.5)}
        keep("errors", measure_errors(miniature, {320: miniature.size}, compared, (0, 1), 64, {320: 1}))
        return
    keep("environment", environment(args.device))
    compared = methods(with_sol=torch.device(args.device).type == "cuda")
    times = measure_times(compared, SHAPES, args.device)
    keep("times", times)
    errors = {}
    for tokens in (32760, 8400, 14196, 75600):
        some = {tokens: SIZES[tokens]}
        errors |= measure_errors(Miniature.load(None, args.device), some, compared, STEPS, JUDGED, CAPTIONS)
        keep("errors", errors)
    for shape, of_shape in times.items():
        print(f"{shape}, errors at 32,760 tokens: rival, ms, error, our sparsity of that time, our error")
        rows = at_equal_time({name: late for name, (late, _) in errors[32760].items()}, of_shape)
        keep(f"equal time, {shape}", rows)
        for name, ms, error, sparsity, our_error in rows:
            ours = "none measured takes as long" if sparsity is None else f"{sparsity:.3f} {our_error:.4f}"
            print(f"  {name}  {ms:.2f}  {error:.4f}  {ours}", flush=True)


if __name__ == "__main__":
    main()
