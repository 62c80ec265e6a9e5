"""What channels far larger than the others cost the low-bit formats, and what would help: errors against float64.

    python -m benchmarks.int8_outliers --captures FOLDER           Q, K, V that benchmarks.explore_router kept
    python -m benchmarks.int8_outliers                             structured random ones
    python -m benchmarks.int8_outliers --tiny                      tries the script

Gains leave every attention logit as it is where only one side has them: some channels of Q are multiplied by a gain and K's
divided by it, or the other way round. "int8" is the operator's own, which divides each channel by the root of its spread in Q
over that in K before it rounds (quantization.py); "int8 plain" leaves that out, "rotated" multiplies Q and K by one Hadamard
matrix instead. No logit changes.
The error is ||out - exact|| / ||exact||, the same selected key blocks in both, exact in float64: rounding alone.
"""

import argparse
from pathlib import Path

import torch

from miniature.captures import FILES, load_captures
from sla2_kernels import select_key_blocks, sla2_attention, torch_backend

from .synthetic import SyntheticLayer

SPARSITY = 0.9
FORMATS = ("16bit", "int8 plain", "int8 rotated", "int8", "fp8", "fp8 rotated")


def hadamard(size):
    """The orthogonal Hadamard matrix (size, size), size a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / size**0.5


def rotated(q, k):
    turn = hadamard(q.shape[-1]).to(q)
    return q @ turn, k @ turn


def plain(q, k):
    return q, k


CHANGES = {"rotated": rotated, "plain": plain}


class Emulated:
    """While open, the torch backend rounds Q and K after ``change``, and balances nothing."""

    def __init__(self, change):
        self.change, self.quantize = change, torch_backend._quantize

    def __enter__(self):
        def changed(q_blocks, k_blocks, v_blocks, precision, factor):
            return self.quantize(*self.change(q_blocks, k_blocks), v_blocks, precision, 1.0)

        torch_backend._quantize = changed

    def __exit__(self, *_):
        torch_backend._quantize = self.quantize


def with_gains(q, k, side, channels, gain):
    """(q, k) whose ``channels`` last channels are outliers on one side, or on "both" in the same channels."""
    q, k = q.clone(), k.clone()
    at = slice(q.shape[-1] - channels, None)
    if side in ("q", "both"):
        q[..., at] *= gain
    if side in ("k", "both"):
        k[..., at] *= gain
    if side == "q":
        k[..., at] /= gain
    if side == "k":
        q[..., at] /= gain
    return q, k


def output(tensors, key_blocks, name):
    precision, _, change = name.partition(" ")
    dtype = torch.bfloat16 if precision == "16bit" else torch.float32
    tensors = [t.to(dtype) for t in tensors]
    if not change:
        return sla2_attention(*tensors, key_blocks=key_blocks, precision=precision, backend="torch")
    out = torch.empty_like(tensors[0])
    # not through the registered operator, which may be that of another copy of the package in this process
    with Emulated(CHANGES[change]):
        torch_backend.attention(*tensors, key_blocks, None, out, scale=out.shape[-1] ** -0.5, precision=precision)
    return out


def errors(q, k, v):
    """Relative error of each of FORMATS."""
    key_blocks = select_key_blocks(q, k, sparsity=SPARSITY, keep_diagonal=True)
    exact = sla2_attention(*(t.double() for t in (q, k, v)), key_blocks=key_blocks, precision="16bit", backend="torch")
    found = {}
    for name in FORMATS:
        out = output((q, k, v), key_blocks, name).double()
        found[name] = float((out - exact).norm() / exact.norm())
    return found


def calls(args):
    if args.captures:
        captures = load_captures(args.captures / FILES[1], "cpu")
        return [tuple(t[:, :, : args.tokens].float() for t in (c.q, c.k, c.v)) for c in captures[:: args.every]]
    return [SyntheticLayer(0, head_dim=32 if args.tiny else 128, grid=(2, 16, 16)).sample(seed) for seed in (1, 2)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captures", type=Path)
    parser.add_argument("--tokens", type=int, default=2048, help="of each capture, the first ones")
    parser.add_argument("--every", type=int, default=2, help="of the held-out captures, every so many")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    given = calls(args)
    kinds = [("-", 0, 1.0)]
    kinds += [
        (side, n, gain) for side in ("q", "k") for n in (2, 8) for gain in ((10.0,) if args.tiny else (10.0, 30.0))
    ]
    kinds += [("both", 2, gain) for gain in ((2.0,) if args.tiny else (2.0, 4.0))]
    print("| outlier channels | " + " | ".join(FORMATS) + " |\n|" + "---|" * (len(FORMATS) + 1))
    for side, channels, gain in kinds:
        rows = [errors(*with_gains(q, k, side, channels, gain), v) for q, k, v in given]
        mean = [(sum(row[name] ** 2 for row in rows) / len(rows)) ** 0.5 for name in FORMATS]
        name = "none" if side == "-" else f"{channels} of {side}, {gain:g} times"
        print(f"| {name} | " + " | ".join(f"{error:.3f}" for error in mean) + " |", flush=True)


if __name__ == "__main__":
    main()
