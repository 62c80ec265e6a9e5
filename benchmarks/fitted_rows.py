"""How many query rows a fitted ratio needs, and how long it stays right: the miniature at 32,760 tokens.

    python -m benchmarks.fitted_rows --device cuda       a minute on an H100
    python -m benchmarks.fitted_rows --query-block 64    with 64 query tokens per selection
    python -m benchmarks.fitted_rows --noised 2          rendered clips at 2 noise levels, both query blocks: minutes on a CPU
    python -m benchmarks.fitted_rows --tiny --device cpu

Dense sampling of held-out captions at 81 frames of 832 x 480. In every call of every layer both branches are computed in
float32 for rows that a ratio is fitted on and, apart from them, for rows that it is judged on. An error is the root mean
square over the layers of ||out - dense|| / ||dense||, over all heads, both halves of guidance and steps 8 to 19 of 20.
--noised: instead of sampling, one dense call per guidance half on a rendered held-out clip at the noise levels of some of those steps.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F

from miniature.captions import embed, split_captions
from miniature.pool import fill_pool
from miniature.sample import SHIFT, noise_schedule
from miniature.wan import dense_attention
from sla2_kernels.router import (
    K_BLOCK,
    Q_BLOCK,
    QUERY_BLOCKS,
    block_count,
    router_scores,
    selected_block_count,
    top_k_blocks,
    with_diagonal,
)
from sla2_kernels.torch_fit import row_branches, selected_keys

from .miniature_model import SEED, Miniature

SPARSITIES = (0.99, 0.97, 0.95, 0.90)
FITTED, JUDGED = 256, 1024  # rows per head and call
ROWS = (8, 16, 32, 64, 128, 256)
LAGS = (0, 1, 2, 4)  # sampling steps between the fit and its use
REFITS = (2, 4)  # a fit in every so many steps
FIRST_JUDGED = 8  # step


class Tap:
    """An attention function (layer, q, k, v) on (1, N, H, D) that runs dense and keeps, per call, what errors follow from.

    calls: by (step, half, layer), (products of the rows to fit on (2, S, H, FITTED), sums over the judged ones (4, S, H),
    energy (H,)). Products are <O - O_l, O_s - O_l> and |O_s - O_l|^2; the sums are these, |O - O_l|^2 and the squared error
    of the estimated ratio.
    """

    def __init__(self, sparsities, fitted, judged, query_block=Q_BLOCK):
        self.sparsities, self.fitted, self.judged, self.query_block = sparsities, fitted, judged, query_block
        self.calls, self._counts = {}, {}

    def __call__(self, layer, q, k, v):
        self.look(layer, q, k, v)
        return dense_attention(layer, q, k, v)

    def look(self, layer, q, k, v):
        """Keeps what errors of a call follow from."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        call = self._counts[layer] = self._counts.get(layer, -1) + 1
        generator = torch.Generator().manual_seed(1000 * call + layer)
        rows = torch.randperm(q.shape[2], generator=generator)[: self.fitted + self.judged].to(q.device)
        # what attention sees where a model runs in 16 bit
        low = [x[0].to(torch.bfloat16).float() for x in (q, k, v)]
        scores = router_scores(*(x[None] for x in low[:2]), query_block=self.query_block)
        scores = with_diagonal(scores, query_block=self.query_block)[0]
        heads = [self._head(*(x[h] for x in low), scores[h], rows) for h in range(q.shape[1])]
        products, energy = (torch.stack(parts, dim=-2).cpu() for parts in zip(*heads, strict=True))
        summed = products[..., self.fitted :].double().sum(dim=-1)
        kept = products[1:3, ..., : self.fitted].clone(), summed, energy[..., self.fitted :].double().sum(dim=-1)
        self.calls[call // 2, call % 2, layer] = kept

    def _head(self, q, k, v, scores, rows):
        """(products (4, S, R), energy (R,)) of one head: q, k, v (N, D), scores (T_m, T_n)."""
        blocks = block_count(len(k), K_BLOCK)
        k = k - k.mean(dim=0)
        tokens = torch.full((blocks,), float(K_BLOCK), device=k.device)
        tokens[-1] = len(k) - (blocks - 1) * K_BLOCK
        means = (
            F.pad(k, (0, 0, 0, blocks * K_BLOCK - len(k))).unflatten(0, (blocks, K_BLOCK)).sum(dim=1) / tokens[:, None]
        )
        scale, found = q.shape[1] ** -0.5, []
        for sparsity in self.sparsities:
            key_blocks = top_k_blocks(scores[None], selected_block_count(sparsity, blocks))[0].long()
            parts = []
            for some in rows.split(256):
                selected = selected_keys(key_blocks, some, len(k), self.query_block)
                dense, o_sparse, o_linear, _ = row_branches(q[some], k, v, selected, scale)
                logits = q[some] @ k.T * scale
                own = logits.masked_fill(~selected, -torch.inf).logsumexp(dim=-1)
                mask = torch.zeros(len(some), blocks, dtype=torch.bool, device=k.device)
                mask.scatter_(1, key_blocks[some // self.query_block], True)
                other = (q[some] @ means.T * scale + tokens.log()).masked_fill(mask, -torch.inf).logsumexp(dim=-1)
                target, step = dense - o_linear, o_sparse - o_linear
                estimate = torch.sigmoid(own - other)[:, None]
                products = (target * target, target * step, step * step, (target - estimate * step).square())
                parts.append((torch.stack([x.sum(dim=-1) for x in products]), dense.square().sum(dim=-1)))
            found.append([torch.cat(x, dim=-1) for x in zip(*parts, strict=True)])
        return torch.stack([products for products, _ in found], dim=1), found[0][1]


def fitted_ratio(calls, rows):
    """Ratio (S, H) from the first ``rows`` rows of each of some calls."""
    cross, square = (sum(call[0][i, ..., :rows].double().sum(dim=-1) for call in calls) for i in range(2))
    return (cross / square).clamp(0, 1)


def error(taps, steps, choose):
    """Error (S,) over ``steps``. choose(calls, step, half, layer) -> ratio (S, H), or None for the estimate of each row."""
    of_taps = []
    for tap in taps:
        layers = sorted({layer for _, _, layer in tap.calls})
        of_layers = []
        for layer in layers:
            wrong = right = 0.0
            for step in steps:
                for half in (0, 1):
                    _, (target, cross, square, estimated), energy = tap.calls[step, half, layer]
                    ratio = choose(tap.calls, step, half, layer)
                    missed = estimated if ratio is None else target - 2 * ratio * cross + ratio**2 * square
                    wrong, right = wrong + missed.sum(dim=-1), right + energy.sum()
            of_layers.append(wrong / right)
        of_taps.append(torch.stack(of_layers).mean(dim=0))
    return torch.stack(of_taps).mean(dim=0).sqrt()


def table(taps, rows, first_judged):
    """[(what, error (S,)), ...]"""
    steps = sorted({step for step, _, _ in taps[0].calls})
    judged = [step for step in steps if step >= first_judged]
    found = [
        ("estimated from block means", error(taps, judged, lambda *_: None)),
        ("bound: fitted on the judged rows", error(taps, judged, _bound)),
    ]
    for lag in LAGS:
        for count in rows:

            def lagged(calls, step, half, layer, lag=lag, count=count):
                return fitted_ratio([calls[max(step - lag, 0), half, layer]], count)

            found.append((f"fitted {lag} steps before, {count} rows", error(taps, judged, lagged)))
    for every in REFITS:
        for count in rows:

            def refitted(calls, step, half, layer, every=every, count=count):
                return fitted_ratio([calls[step // every * every, half, layer]], count)

            found.append((f"fitted in every {every}th step, {count} rows", error(taps, judged, refitted)))
    for count in (4, 8):
        few = [round(i * len(steps) / count) for i in range(count)]

        def before(calls, step, half, layer, few=few):
            return fitted_ratio([calls[few[max(few.index(step) - 1, 0)], half, layer]], rows[-3])

        for what, choose in (
            ("estimated", lambda *_: None),
            ("fitted in the step", partial(_of_the_call, rows=rows[-3])),
            ("fitted one step before", before),
        ):
            found.append((f"steps as far apart as {count} steps are: {what}", error(taps, few[1:], choose)))
    return found


def of_noised_clips(miniature, captions, levels, first_judged, taps):
    """Calls of the taps (by query block) on rendered clips of these captions, at levels between step ``first_judged`` and the last."""
    schedule = noise_schedule(miniature.steps, SHIFT)[:-1]
    steps = torch.linspace(first_judged, miniature.steps - 1, levels).round().long()

    def attend(layer, q, k, v):
        for tap in taps:
            tap.look(layer, q, k, v)
        return dense_attention(layer, q, k, v)

    for number, caption in enumerate(captions):
        clip = fill_pool(
            miniature.vae, [caption], [0], size=miniature.size, seed=2 * SEED + number, device=miniature.device
        )
        clean = clip.latents.float()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(number)).to(clean.device)
        for level in schedule[steps].tolist():
            for words in (str(caption), ""):
                with torch.no_grad(), miniature._autocast():
                    t = torch.full((1,), 1000 * level, device=clean.device)
                    miniature.model(torch.lerp(clean, noise, level), t, embed(words).to(clean.device), attend)


def _of_the_call(calls, step, half, layer, rows):
    return fitted_ratio([calls[step, half, layer]], rows)


def _bound(calls, step, half, layer):
    _, (_, cross, square, _), _ = calls[step, half, layer]
    return (cross / square).clamp(0, 1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--videos", type=int, default=3, help="held-out captions")
    parser.add_argument("--query-block", type=int, choices=QUERY_BLOCKS, default=Q_BLOCK)
    parser.add_argument("--noised", type=int, default=0, help="noise levels of rendered clips, instead of sampling")
    parser.add_argument("--tiny", action="store_true", help="a random miniature of a few tokens: tries this script")
    args = parser.parse_args(argv)
    if args.tiny:
        miniature, fitted, judged, sparsities, rows, first = (
            Miniature.tiny(args.device),
            16,
            32,
            (0.8, 0.5),
            (4, 8, 16),
            1,
        )
        miniature.steps = 8
    else:
        miniature = Miniature.load(None, args.device)
        fitted, judged, sparsities, rows, first = FITTED, JUDGED, SPARSITIES, ROWS, FIRST_JUDGED
        miniature.size = (81, 480, 832)
    print("skips " + " ".join(f"{100 * sparsity:7.0f}%" for sparsity in sparsities))
    if args.noised:
        held_out = split_captions()[1]
        captions = [held_out[i * len(held_out) // args.videos] for i in range(args.videos)]
        taps = [Tap(sparsities, fitted, judged, block) for block in QUERY_BLOCKS]
        of_noised_clips(miniature, captions, args.noised, first, taps)
        for tap in taps:
            steps = sorted({step for step, _, _ in tap.calls})
            for what, choose in (("estimated", lambda *_: None), ("fitted", partial(_of_the_call, rows=rows[2]))):
                found = " ".join(f"{value:8.4f}" for value in error([tap], steps, choose).tolist())
                print(f"{found}  {what}, {tap.query_block} query tokens", flush=True)
        return
    taps = []
    for number, caption in enumerate(miniature._captions("held out", args.videos)):
        taps.append(Tap(sparsities, fitted, judged, args.query_block))
        miniature._sample(caption, 2 * SEED + number, taps[-1])
    for what, found in table(taps, rows, first):
        print(f"{' '.join(f'{value:8.4f}' for value in found.tolist())}  {what}", flush=True)


if __name__ == "__main__":
    main()
