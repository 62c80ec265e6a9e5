"""What the dense rows of text and sound cost in one attention call of MiniMax H3, and each way to compute them.

    python -m benchmarks.text_rows                       under a minute on an H200
    python -m benchmarks.text_rows --rows 926            as many as beside references
    python -m benchmarks.text_rows --device cpu --tiny

q, k and v are views as the model's class passes them: q and k of one fused projection, v a copy; (1, H, N, D), 16 bit. Heads
differ in how sharply they attend. Some channels of q are 20 times larger than the others, and of k smaller in turn, which
changes no logit: outliers as released models have them. Printed are the dense rows by each way, with their error against float64
on sampled rows; the whole call as it was (dense rows by FlashAttention-2, then torch.cat) and as it is; what else a call in
ComfyUI reads the output for; and the costliest kernels of one call. The video's rows must not differ between the two.
"""

import argparse
import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla2_kernels import sla2_attention
from sla2_kernels.exact_ends import attend_video, with_exact_rows
from sla2_kernels.exact_rows import _all_blocks, exact_rows
from sla2_kernels.fitted_attention import call_errors, fitted_attention, sample_rows
from sla2_kernels.forced_blocks import select_with_forced_blocks
from sla2_kernels.selection import RoutedBlocks

from .breakdown import costliest_kernels, kernel_times
from .measure import environment, is_gpu, median_ms

H3 = {"heads": 56, "head_dim": 128, "tokens": 42_000, "rows": 672}
TINY = {"heads": 2, "head_dim": 32, "tokens": 900, "rows": 70}
SPARSITIES = (0.97, 0.90)
OUTLIERS, OUTLIER_SIZE = 4, 20.0  # channels of q, and how much larger they are
SAMPLED = 16  # query rows that errors are taken on
KERNELS = 15


class Call:
    """One call: q, k, v (B, N, H, D) views, of which the first ``rows`` query rows run dense."""

    def __init__(self, shape, device, outliers):
        heads, head_dim, tokens = shape["heads"], shape["head_dim"], shape["tokens"]
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if is_gpu(device) else torch.float32
        fused = torch.randn(tokens, 3 * heads * head_dim, generator=generator, device=device, dtype=dtype)
        q, k, v = (part.view(1, tokens, heads, head_dim) for part in fused.split(heads * head_dim, dim=-1))
        q *= torch.linspace(0.5, 3.0, heads, device=device, dtype=dtype)[:, None]
        if outliers:
            q[..., :OUTLIERS] *= OUTLIER_SIZE
            k[..., :OUTLIERS] /= OUTLIER_SIZE
        self.q, self.k, self.v = q, k, v.clone()
        self.rows, self.tokens, self.device = shape["rows"], tokens, device
        self.precision = "int8" if is_gpu(device) else "16bit"
        self.judged = sample_rows(self.rows, 1, device)[:SAMPLED].long()

    def text(self):
        return self.q[:, : self.rows]

    def error(self, out):
        """||out - dense|| / ||dense|| of a sample of the dense rows: (over all heads, of the worst head)."""
        off = square = 0
        heads = []
        for head in range(self.q.shape[2]):
            q, k, v = (x[0, :, head].double() for x in (self.q[:, self.judged], self.k, self.v))
            exact = (q @ k.T * q.shape[-1] ** -0.5).softmax(-1) @ v
            both = (out[0, self.judged, head].double() - exact).square().sum(), exact.square().sum()
            off, square = off + both[0], square + both[1]
            heads.append((both[0] / both[1]).sqrt())
        return float((off / square).sqrt()), float(max(heads))

    def video(self, sparsity, fitted, room=(0, 0), rows=None, apart=False):
        """The video's rows, behind ``rows`` others (None: this call's) whose keys all are attended.

        apart: key blocks are selected by an operator of their own, as they were.
        """
        rows = self.rows if rows is None else rows
        if fitted:
            attend = functools.partial(fitted_attention, rows=sample_rows(self.tokens - rows, 0, self.device))
        else:
            ratio = torch.full((self.q.shape[2],), 0.8, device=self.device)
            attend = functools.partial(sla2_attention, alpha=ratio)
        routing = {"sparsity": sparsity, "layout": "BNHD", "keep_diagonal": True}
        if apart:
            blocks = RoutedBlocks(select_with_forced_blocks(self.q[:, rows:], self.k, front=rows, **routing))
            out = attend(self.q[:, rows:], self.k, self.v, key_blocks=blocks, precision=self.precision, layout="BNHD")
            return out.out if fitted else out
        out = attend_video(
            attend, self.q[:, rows:], self.k, self.v, key_prefix=rows, key_suffix=0, precision=self.precision,
            room=room, **routing,
        )  # fmt: skip
        return out.out if fitted else out

    def before(self, sparsity, fitted):
        """The whole output as it was made."""
        dense = attend_torch(self.text(), self.k, self.v, SDPBackend.FLASH_ATTENTION)
        return torch.cat([dense, self.video(sparsity, fitted, apart=True)], dim=1)

    def now(self, sparsity, fitted):
        """The whole output as it is made."""
        out = self.video(sparsity, fitted, room=(self.rows, 0))
        dense = functools.partial(exact_rows, self.text(), self.k, self.v, layout="BNHD")
        return with_exact_rows(out, lambda own: dense(), tokens=self.tokens, prefix=self.rows, suffix=0, axis=1)


def attend_torch(q, k, v, backend):
    """Dense attention of (B, N, H, D) by one of torch's backends; on a CPU by the only one."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def all_blocks_of_ours(call, precision):
    """The dense rows by the sparse loop with nothing left out; below 16 bit K and V are packed once more."""
    q = call.text()
    return sla2_attention(
        q, call.k, call.v, key_blocks=_all_blocks(q, call.k, "BNHD"), precision=precision, layout="BNHD", linear_branch=False
    )  # fmt: skip


def ways(call):
    """{name: function} of the dense rows."""
    q, k, v = call.text(), call.k, call.v
    found = {
        "FlashAttention-2": lambda: attend_torch(q, k, v, SDPBackend.FLASH_ATTENTION),
        "cuDNN": lambda: attend_torch(q, k, v, SDPBackend.CUDNN_ATTENTION),
        "memory-efficient": lambda: attend_torch(q, k, v, SDPBackend.EFFICIENT_ATTENTION),
        "exact_rows(), as shipped": lambda: exact_rows(q, k, v, layout="BNHD"),
    }
    for precision in ("16bit", "int8", "fp8") if is_gpu(call.device) else ("16bit", "int8"):
        found[f"our loop over all blocks, {precision}"] = functools.partial(all_blocks_of_ours, call, precision)
    return found


def measure_rows(call, name):
    """Times and errors of the dense rows by each way."""
    print(f"\ndense rows: {call.rows} of {call.tokens} keys, {name}", flush=True)
    work = 4 * call.rows * call.tokens * call.q.shape[2] * call.q.shape[3]
    for way, function in ways(call).items():
        try:
            error, worst = call.error(function())
        except RuntimeError as failure:
            print(f"  {way:38s} refused: {str(failure).splitlines()[0][:100]}", flush=True)
            continue
        took = median_ms(function, call.device, least_ms=40, repeats=3)
        own = ""
        if is_gpu(call.device) and way.startswith("our"):
            loop = sum(ms for kernel, (ms, _) in kernel_times(function, runs=2).items() if "attention" in kernel)
            own = f", its loop alone {loop:.3f} ms"
        print(
            f"  {way:38s} {took:7.3f} ms, {work / took / 1e9:5.0f} TFLOP/s, error {error:.2e}, worst head {worst:.2e}{own}",
            flush=True,
        )


def measure_calls(call, sparsity, fitted):
    """Times of the whole call before and now, and of its parts."""
    kind = f"skips {100 * sparsity:g}%, {'fitted' if fitted else 'given'} ratio"
    before, now = call.before(sparsity, fitted), call.now(sparsity, fitted)
    unlike = float((before[:, call.rows :] != now[:, call.rows :]).any(dim=-1).float().mean())
    if unlike > 1e-3:  # two scores that are equal but for rounding may change places
        raise RuntimeError(f"{kind}: {100 * unlike:.2f}% of the video's rows differ between the call before and now.")
    errors = [call.error(out)[0] for out in (before, now)]
    timed = {
        "operator, video tokens alone": lambda: call.video(sparsity, fitted, rows=0),
        "operator, keys of text attended, before": lambda: call.video(sparsity, fitted, apart=True),
        "operator, keys of text attended, now": lambda: call.video(sparsity, fitted),
        "whole call before (FlashAttention-2, cat)": lambda: call.before(sparsity, fitted),
        "whole call now": lambda: call.now(sparsity, fitted),
    }
    print(
        f"\n{call.precision}, {kind}; error of the dense rows {errors[0]:.2e} before, {errors[1]:.2e} now", flush=True
    )
    for name, function in timed.items():
        print(f"  {name:42s} {median_ms(function, call.device, least_ms=60, repeats=5):7.3f} ms", flush=True)


def measure_rest(call):
    """What else reads or writes the whole output: the join as it was, and what a call in ComfyUI counts."""
    out = torch.zeros_like(call.v)
    text, video = out[:, : call.rows].clone(), out[:, call.rows :].clone()
    dense = torch.zeros(1, call.q.shape[2], 32, call.q.shape[3], device=call.device)
    rows = sample_rows(call.tokens - call.rows, 0, call.device)
    timed = {
        "torch.cat": lambda: torch.cat([text, video], dim=1),
        "aminmax of the video's rows (NaN count)": lambda: torch.aminmax(out[:, call.rows :]),
        "errors of 32 rows": lambda: call_errors(video.transpose(1, 2), dense, rows),
    }
    print("\nbeside the kernels", flush=True)
    for name, function in timed.items():
        print(f"  {name:42s} {median_ms(function, call.device, least_ms=30, repeats=3):7.3f} ms", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a shape for a CPU, to see that the script runs")
    parser.add_argument("--rows", type=int, help="dense rows; as many more tokens")
    options = parser.parse_args(argv)
    device, shape = torch.device(options.device), dict(TINY if options.tiny else H3)
    if options.rows:
        shape |= {"rows": options.rows, "tokens": shape["tokens"] - shape["rows"] + options.rows}
    if is_gpu(device):
        print(", ".join(f"{name} {value}" for name, value in environment(device).items()), flush=True)
    with torch.no_grad():
        call = Call(shape, device, outliers=False)
        measure_rows(call, "no outlier channels")
        call = Call(shape, device, outliers=True)
        measure_rows(call, f"{OUTLIERS} channels of q {OUTLIER_SIZE:g} times as large")
        for sparsity in SPARSITIES:
            for fitted in (True, False):
                measure_calls(call, sparsity, fitted)
        measure_rest(call)
        if is_gpu(device):
            print(f"\ncostliest kernels of one call, skips {100 * SPARSITIES[0]:g}%, fitted ratio", flush=True)
            for ms, launches, name in costliest_kernels(lambda: call.now(SPARSITIES[0], True), KERNELS):
                print(f"  {ms:7.3f} ms {launches:4g}x {name[:110]}", flush=True)


if __name__ == "__main__":
    main()
