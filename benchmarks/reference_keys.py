"""A call with references: what it takes, and its error with their keys exact or routed, at several floors.

    python -m benchmarks.reference_keys --out FILE.json        a minute on an H100
    python -m benchmarks.reference_keys --device cpu --tiny

The shape is MiniMax H3's: text, references and sound in front of the video. Queries and keys are made, not captured: the video's
content is a smooth field over frames, height and width; a reference is a picture of it, so that its tokens belong to places of the
video. Heads differ in how sharp they are and in how much attention falls on the references. Errors are root mean squares over the
heads of ||out - dense|| / ||dense||, on query rows of the video and of the references, dense in float32.
"""

import argparse
import functools
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from sla2_kernels.exact_ends import attend_video, with_exact_rows
from sla2_kernels.exact_rows import exact_rows
from sla2_kernels.fitted_attention import fitted_attention, sample_rows
from sla2_kernels.references import (
    REFERENCE_FLOOR,
    attend_with_references,
    select_with_references,
    selected_with_references,
)
from sla2_kernels.stretches import Stretches, gathered_queries, whole_output

from .measure import environment, median_ms

H3 = {"heads": 56, "head_dim": 128, "text": 512, "sound": 414, "grid": (42, 24, 42)}
TINY = {"heads": 4, "head_dim": 64, "text": 50, "sound": 30, "grid": (6, 12, 16)}
# name: (references, frames of each, size of each beside the video's frame, whether the text shows each of them too)
REFERENCES = {
    "5 images": (5, 1, 1, False),
    "5 images, 4 times the size": (5, 1, 2, False),
    "a video of half the length": (1, 0.5, 1, False),
    "5 images, in the text too": (5, 1, 1, True),
}
FLOORS = (0, 1, 2, 4)
SPARSITIES = {"5 images": (0.97, 0.90)}  # of the others the first one
ROWS = 256  # query rows per head that errors are taken on
COARSE = 6  # tokens between two places of the content that are independent


class Call:
    """q, k, v (1, N, H, D) of one call in 16 bit, and its Stretches."""

    def __init__(self, shape, references, device, seed=0):
        self.heads, self.head_dim, self.device = shape["heads"], shape["head_dim"], device
        self.generator = torch.Generator(device).manual_seed(seed)
        count, frames, size, in_text = references
        t, h, w = shape["grid"]
        length = max(1, int(frames * t) if frames < 1 else frames)
        video = self._field(t, h, w)
        pictures = [
            self._picture(video, number * (t - length) // max(count - 1, 1), length, size) for number in range(count)
        ]
        shown = [0.8 * picture + 0.6 * self._noise(picture.shape[0]) for picture in pictures if in_text]
        pictures = shown + pictures
        tokens = [shape["text"], *(p.shape[0] for p in pictures), shape["sound"], t * h * w]
        ends = torch.tensor(tokens).cumsum(0).tolist()
        ranges = [(end - own, end) for own, end in zip(tokens, ends, strict=True)]
        self.stretches = Stretches(ends[-1], ranges[-1], tuple(ranges[1:-2]))
        self.text_dense = Stretches(ends[-1], ranges[-1], tuple(ranges[1 + len(shown) : -2]))
        noise = self._noise
        content = torch.cat([noise(tokens[0]), *pictures, noise(tokens[-2]), video.flatten(0, 2)])
        self.q, self.k, self.v = self._projected(content)

    def _noise(self, *shape):
        return torch.randn(*shape, self.heads * self.head_dim, generator=self.generator, device=self.device)

    def _field(self, t, h, w):
        """Smooth content (t, h, w, H * D), of variance 1."""
        coarse = self._noise(*(max(2, size // COARSE) for size in (t, h, w)))
        fine = F.interpolate(coarse.movedim(-1, 0)[None], size=(t, h, w), mode="trilinear", align_corners=True)[0]
        return (fine / fine.std()).movedim(0, -1)

    def _picture(self, video, first, length, size):
        """Content (tokens, H * D) of a reference: frames of the video, larger, and not quite the same."""
        frames = video[first : first + length].movedim(-1, 0)[None]
        larger = F.interpolate(frames, scale_factor=(1, size, size), mode="trilinear", align_corners=False)[0]
        larger = larger.movedim(0, -1).flatten(0, 2)
        return 0.8 * larger + 0.6 * self._noise(larger.shape[0])

    def _projected(self, content):
        """q and k are content and noise; heads are sharper one by one, and look more and more at the references."""
        content = content.unflatten(-1, (self.heads, self.head_dim))
        sharp = torch.linspace(0.8, 2.0, self.heads, device=self.device)[:, None]
        look = (torch.arange(self.heads, device=self.device) % 4 * 1.5)[:, None]
        axis = F.one_hot(torch.zeros(self.heads, dtype=torch.long, device=self.device), self.head_dim).float()
        is_reference = torch.zeros(content.shape[0], 1, 1, device=self.device)
        for start, stop in self.stretches.references:
            is_reference[start:stop] = 1.0

        def noisy(share):
            noise = self._noise(content.shape[0]).unflatten(-1, (self.heads, self.head_dim))
            return content + share * noise

        q, k, v = sharp * noisy(0.7), sharp * noisy(0.7), noisy(0.3)
        # a logit of ``look`` more for the keys of references, in every query
        q = q + axis * (look.clamp(min=1e-6) * self.head_dim**0.5).sqrt()
        k = k + is_reference * axis * (look * self.head_dim**0.5).sqrt()
        v = v + 0.5 * is_reference
        return [x[None].to(torch.bfloat16 if self.device.type == "cuda" else torch.float32) for x in (q, k, v)]

    def dense(self, ranges):
        """Exact attention of these query rows, end to end, as (1, rows, H, D)."""
        q = torch.cat([self.q[:, start:stop] for start, stop in ranges], dim=1)
        return exact_rows(q, self.k, self.v, layout="BNHD")

    def sparse(self, sparsity, reference_keys="routed", floor=REFERENCE_FLOOR, stretches=None):
        """The whole output with references sparse beside the video."""
        stretches = stretches or self.stretches
        rows = sample_rows(stretches.gathered_rows, 0, self.device)
        out = attend_with_references(
            functools.partial(fitted_attention, rows=rows), self.q, self.k, self.v, stretches, sparsity=sparsity,
            reference_keys=reference_keys, floor=floor, layout="BNHD", keep_diagonal=True, precision=self.precision,
            room=stretches.room,
        ).out  # fmt: skip
        return whole_output(out, self.dense, stretches, 1)

    def prefix_dense(self, sparsity):
        """The whole output with everything in front of the video exact: dense queries, keys that all attend."""
        front, stop = self.stretches.video
        rows = sample_rows(stop - front, 0, self.device)
        out = attend_video(
            functools.partial(fitted_attention, rows=rows), self.q[:, front:], self.k, self.v, key_prefix=front, key_suffix=0,
            sparsity=sparsity, layout="BNHD", keep_diagonal=True, precision=self.precision, room=(front, 0),
        ).out  # fmt: skip
        return with_exact_rows(
            out, lambda own: self.dense([(own.start, own.stop)]), tokens=stop, prefix=front, suffix=0, axis=1
        )

    def pure(self, sparsity, dense_rows=0):
        """As many tokens, all of one video; after ``dense_rows`` at the start, whose queries run dense and whose keys all attend."""
        rows = sample_rows(self.stretches.tokens - dense_rows, 0, self.device)
        out = attend_video(
            functools.partial(fitted_attention, rows=rows), self.q[:, dense_rows:], self.k, self.v, key_prefix=dense_rows,
            key_suffix=0, sparsity=sparsity, layout="BNHD", keep_diagonal=True, precision=self.precision,
            room=(dense_rows, 0),
        ).out  # fmt: skip
        tokens = self.stretches.tokens
        return with_exact_rows(
            out, lambda own: self.dense([(own.start, own.stop)]), tokens=tokens, prefix=dense_rows, suffix=0, axis=1
        )

    @property
    def precision(self):
        return "int8" if self.device.type == "cuda" else "16bit"

    def sampled(self):
        """(rows of the video, rows of the references), int64."""
        ranges = [self.stretches.video], self.stretches.references
        every = [torch.cat([torch.arange(*own) for own in kind]) for kind in ranges]
        pick = torch.Generator().manual_seed(1)
        return [rows[torch.randperm(len(rows), generator=pick)[:ROWS]].to(self.device) for rows in every]


def errors_of(call, outputs):
    """{name: (video, references)} of outputs {name: (1, N, H, D)}, against float32."""
    found = {name: [] for name in outputs}
    for rows in call.sampled():
        square = torch.zeros(len(outputs), call.heads, dtype=torch.float64)
        for head in range(call.heads):
            q, k, v = (x[0, :, head].float() for x in (call.q[:, rows], call.k, call.v))
            exact = (q @ k.T * call.head_dim**-0.5).softmax(-1) @ v
            for number, out in enumerate(outputs.values()):
                off = out[0, rows, head].float() - exact
                square[number, head] = (off.square().sum() / exact.square().sum()).double()
        for name, own in zip(outputs, square.mean(dim=1).sqrt().tolist(), strict=True):
            found[name].append(round(own, 4))
    return found


def measured(call, sparsity):
    """Rows {"name", "blocks", "ms"} and {"name", "video error", "reference error"} of one Call."""
    others = sum(stop - start for start, stop in call.stretches.exact)
    exact = selected_with_references(call.stretches, sparsity, "exact", keep_diagonal=True)
    few = selected_with_references(call.stretches, sparsity, keep_diagonal=True)
    even = as_many_blocks(call.stretches, exact)
    said = f"skips {100 * sparsity:g}%"
    timed = {
        "all one video": (None, lambda: call.pure(sparsity)),
        "one video after text and sound": (None, lambda: call.pure(sparsity, others)),
        "all before the video exact": (None, lambda: call.prefix_dense(sparsity)),
        "exact": (exact, lambda: call.sparse(sparsity, "exact")),
        "routed": (few, lambda: call.sparse(sparsity)),
        "routed, what the text shows dense": (None, lambda: call.sparse(sparsity, stretches=call.text_dense)),
        f"routed, as many blocks as exact ({100 * even:.1f}%)": (exact, lambda: call.sparse(even)),
    }
    rows = []
    for name, (blocks, function) in timed.items():
        took = median_ms(function, call.device, least_ms=40, repeats=3)
        rows.append({"name": f"{said}, {name}", "blocks": blocks, "ms": round(took, 3)})
        print(rows[-1], flush=True)
    outputs = {f"{said}, exact": call.sparse(sparsity, "exact")}
    for floor in FLOORS:
        outputs[f"{said}, routed, floor {floor}"] = call.sparse(sparsity, "routed", floor)
        outputs[f"{said}, routed, as many blocks as exact, floor {floor}"] = call.sparse(even, "routed", floor)
    for name, (video, reference) in errors_of(call, outputs).items():
        rows.append({"name": name, "video error": video, "reference error": reference})
        print(rows[-1], flush=True)
    return rows


def same_choice(call, heads=2):
    """Share of query blocks for which Triton and plain torch choose the same key blocks."""
    q, k = (x[:, :, :heads] for x in (call.q, call.k))
    q = gathered_queries(q, call.stretches, 1)
    chosen = [
        select_with_references(
            q, k, None, None, call.stretches, sparsity=0.9, layout="BNHD", keep_diagonal=True, backend=backend
        )
        for backend in ("auto", "torch")
    ]
    return (chosen[0] == chosen[1]).all(dim=-1).float().mean().item()


def as_many_blocks(stretches, count):
    """The sparsity at which routed reference keys attend ``count`` key blocks."""
    always, _ = stretches.key_blocks(0)
    free = len(always) - sum(always)
    return 1 - (count - sum(always)) / free


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a shape for a CPU, to see that the script runs")
    parser.add_argument("--only", choices=REFERENCES, help="this call alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    device, shape = torch.device(options.device), TINY if options.tiny else H3
    content = {"environment": environment(device) if device.type == "cuda" else None, "shape": shape, "calls": {}}
    for name, references in REFERENCES.items():
        if options.only not in (None, name):
            continue
        call = Call(shape, references, device)
        print(f"{name}: {call.stretches}", flush=True)
        print(f"same choice as plain torch: {same_choice(call):.4f}", flush=True)
        rows = [row for sparsity in SPARSITIES.get(name, (0.97,)) for row in measured(call, sparsity)]
        content["calls"][name] = {"tokens": call.stretches.tokens, "rows": rows}
        if options.out:
            options.out.write_text(json.dumps(content, indent=1) + "\n")
        del call
    return content


if __name__ == "__main__":
    with torch.no_grad():
        main()
