"""The demo's sparsity on a CPU: that at which its short clip has the attention error of 97% at 32,760 tokens.

    python -m benchmarks.demo_sparsity                                    on a GPU: both lengths
    python -m benchmarks.demo_sparsity --reference 0.2022 --device cpu    the short clip alone, by an error known before
    python -m benchmarks.demo_sparsity --tiny --device cpu                a random model of a few tokens: tries the script

Errors are those of benchmarks.untrained_error, of the untrained mode with fitted ratios: the miniature is sampled densely, and
in chosen steps SLA2 attends the same q, k and v. Writes the error of every number of kept key blocks, and the sparsity that
tooling/demo_plan.py and the workflow "First look, nothing to download" have.
"""

import argparse
import math
from pathlib import Path

import torch

from tooling.demo_plan import plan_for

from . import results
from .measure import environment
from .miniature_model import Miniature
from .untrained_error import JUDGED, fitted, measure_errors

STEPS = (0, 2, 5, 8, 11, 14, 17, 19)  # of 20: a whole video counts
SPARSITY, SIZE = 0.97, (81, 480, 832)
OUT = results.RESULTS / "demo-sparsity.json"


def sparsity_of(kept, blocks):
    """The largest number of whole percents at which ``kept`` of the key blocks are kept."""
    return math.floor(100 * (1 - kept / blocks) + 1e-6) / 100


def errors(miniature, size, sparsities, captions, steps=STEPS):
    """[error per sparsity] of videos of (frames, height, width)."""
    compared = {sparsity: fitted(sparsity) for sparsity in sparsities}
    found = measure_errors(miniature, {0: size}, compared, steps, JUDGED, {0: captions})[0]
    return [found[sparsity][1] for sparsity in sparsities]


def fewest_blocks(rows, reference):
    """Of rows [kept blocks, sparsity, error] in rising order of blocks, the first whose error is no larger; the last if none is."""
    return next((row for row in rows if row[2] <= reference), rows[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, help="folder of the miniature's weights")
    parser.add_argument("--reference", type=float, help="error at 32,760 tokens; measured where left out")
    parser.add_argument("--captions", type=int, default=2, help="held-out captions, one video each")
    parser.add_argument("--tiny", action="store_true", help="a random miniature of a few tokens: tries this script")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    if args.tiny:
        miniature, steps = Miniature.tiny(args.device), (0, 1)
        size = long = miniature.size
    else:
        miniature, steps, plan = Miniature.load(args.weights, args.device), STEPS, plan_for("cpu")
        size, long = (plan.frames, plan.height, plan.width), SIZE
    reference = args.reference or errors(miniature, long, [SPARSITY], args.captions, steps)[0]
    frames, height, width = size
    tokens = (frames + 3) // 4 * (height // 16) * (width // 16)
    blocks = -(-tokens // 64)
    sparsities = {kept: sparsity_of(kept, blocks) for kept in range(1, blocks)}
    found = errors(miniature, size, list(sparsities.values()), args.captions, steps)
    rows = [[kept, sparsity, error] for (kept, sparsity), error in zip(sparsities.items(), found, strict=True)]
    kept, sparsity, error = fewest_blocks(rows, reference)
    print(f"{100 * SPARSITY:g}% at {long}: error {reference:.4f}")
    print(f"{100 * sparsity:g}% at {size}, {kept} of {blocks} key blocks: error {error:.4f}")
    results.save(args.out, {"environment": environment(args.device), "reference": {"size": long, "sparsity": SPARSITY, "error": reference},
                            "size": size, "tokens": tokens, "columns": ["kept key blocks", "sparsity", "error"],
                            "rows": rows, "sparsity": sparsity})  # fmt: skip


if __name__ == "__main__":
    main()
