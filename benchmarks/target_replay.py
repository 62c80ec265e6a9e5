"""Runs with an attention error set, replayed from recordings of real ones: no model, no GPU, a few milliseconds each.

    python -m benchmarks.target_replay FILE [FILE ...]

A FILE is what `python -m benchmarks.target_error --record FOLDER` wrote, or a few of these condensed by `--condense OUT`, which keeps
the errors alone. The choice of sparsities is the node's own. What its calls would have measured, and what their error over all
rows would have been, comes from the recording: straight between its rungs in log(error) over log(sparsity / (1 - sparsity)).
A recording belongs to the run that it was made in: another target would have led the model to other tensors.
"""

import argparse
import bisect
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from miniature.sample import noise_schedule

from .wan_in_comfyui import load_pack

TARGETS = (0.08, 0.12, 0.16, 0.25)
LAGS, SHORT_RUN = 4, 8  # steps between a fit and its use; runs of so few steps fit in every call
DRAWS = 2  # that are kept in a condensed file


def log_odds(sparsity):
    return math.log(sparsity / (1 - sparsity))


@dataclass
class Replayed:
    """Errors of the calls of one run. Squared relative ones, float64, at rising rungs.

    of_all: (steps, lags, draws, halves, layers, rungs), over all rows, with a ratio that was fitted on a draw so many steps
    before. of_rows: (steps, draws, halves, layers, rungs), as a call that fits on a draw measures it on its rows.
    """

    tokens: int
    rungs: list[float]
    of_all: torch.Tensor
    of_rows: torch.Tensor

    @property
    def sigmas(self):
        return noise_schedule(len(self.of_all)).tolist()[:-1]

    @property
    def draws(self):
        return self.of_all.shape[2]

    def error(self, step, sparsity, draw, lag):
        """Over all rows, (halves, layers). draw: of the first half of guidance, the second has the next one."""
        return self._between(self._of_halves(self.of_all[step, lag], draw), sparsity)

    def measured(self, step, sparsity, draw):
        return self._between(self._of_halves(self.of_rows[step], draw), sparsity)

    def _of_halves(self, squares, draw):
        return torch.stack([squares[(draw + half) % self.draws, half] for half in range(squares.shape[1])])

    def _between(self, squares, sparsity):
        at = log_odds(min(max(sparsity, self.rungs[0]), self.rungs[-1]))
        upper = min(max(bisect.bisect_left(self.rungs, sparsity), 1), len(self.rungs) - 1)
        low, high = (log_odds(self.rungs[i]) for i in (upper - 1, upper))
        return torch.lerp(squares[..., upper - 1].log(), squares[..., upper].log(), (at - low) / (high - low)).exp()


def load(path):
    """{name: Replayed} of a recording or of a condensed file."""
    with safe_open(path, "pt") as file:
        facts, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name).double() for name in names}
    tokens, rungs = int(facts["tokens"]), [float(rung) for rung in facts["rungs"].split()]
    if "products" in tensors:
        return {Path(path).stem: _condensed(tokens, rungs, **tensors)}
    runs = dict.fromkeys(name.split("/")[0] for name in names)
    return {run: Replayed(tokens, rungs, *(tensors[f"{run}/{part}"].exp() for part in ("all", "rows"))) for run in runs}


def _condensed(tokens, rungs, energy, products, ratio, row_error, row_energy):
    """See error_recordings.Recording for the arguments."""
    order = sorted(range(len(rungs)), key=rungs.__getitem__)
    target, cross, square = (part.movedim(3, -1) for part in products[:, :, :, order].unbind(-1))
    ratio = ratio[:, :, :, order].permute(4, 0, 1, 2, 5, 3)  # (draws, steps, halves, layers, heads, rungs)
    lagged = []
    for lag in range(LAGS):
        used = ratio[:, [max(step - lag, 0) for step in range(len(energy))]]
        lagged.append((target - 2 * used * cross + used**2 * square).sum(-2) / energy.sum(-1)[..., None])
    weight = energy[:, :, :, None, :, None]  # the mean energy of a row, by which rows are divided
    rows = (row_error[:, :, :, order] * weight[:, :, :, None]).sum((-1, -2)) / (row_energy * weight).sum((-1, -2))[
        ..., None, :
    ]
    return Replayed(
        tokens, sorted(rungs), torch.stack(lagged, 1).permute(2, 1, 0, 3, 4, 5), rows.permute(0, 4, 1, 2, 3)
    )


def condense(paths, out):
    """Writes the errors of some recordings, logarithms in float16, into one file."""
    tensors, facts = {}, set()
    for path in paths:
        for name, run in load(path).items():
            facts.add((run.tokens, " ".join(map(str, run.rungs))))
            # in a short run every call fits
            lags = 1 if len(run.of_all) <= SHORT_RUN else LAGS
            parts = {"all": run.of_all[:, :lags, :DRAWS], "rows": run.of_rows[:, :DRAWS]}
            tensors |= {f"{name}/{part}": squares.log().half().contiguous() for part, squares in parts.items()}
    ((tokens, rungs),) = facts
    save_file(tensors, out, metadata={"tokens": str(tokens), "rungs": rungs})


def replay(recording, chooser, draw):
    """(error over all rows, error that the run reports, sparsities) of a run whose ErrorTarget is ``chooser``.

    draw: of the rows in step 0; the following steps take the following draws.
    """
    measured, squares, sparsities, fitted = [0.0, 0], [], [], 0

    def read():
        return tuple(measured)

    for step, sigma in enumerate(recording.sigmas):
        choice = chooser.at(sigma, recording.sigmas, read, recording.tokens)
        if choice.sparsity is None:
            break
        if choice.measures:
            fitted = step
            found = recording.measured(step, choice.sparsity, draw + step)
            measured[:] = measured[0] + found.sum().item(), measured[1] + found.numel()
        squares.append(recording.error(step, choice.sparsity, draw + fitted, step - fitted))
        sparsities.append(choice.sparsity)
    return torch.stack(squares).mean().sqrt().item(), chooser.run_error(*measured), sparsities


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--condense", type=Path, metavar="OUT", help="write the errors alone, of all files, and end")
    args = parser.parse_args(argv)
    if args.condense is not None:
        condense(args.files, args.condense)
        return
    chooser = __import__(f"{load_pack().__name__}.nodes.runs.error_target", fromlist=["*"]).ErrorTarget
    for name, recording in (pair for path in args.files for pair in load(path).items()):
        for target in args.targets:
            found = [replay(recording, chooser(target), draw) for draw in range(recording.draws)]
            errors = " ".join(f"{error / target:.3f}" for error, _, _ in found)
            reported = sum(reported / error for error, reported, _ in found) / len(found)
            chosen = " ".join(f"{sparsity:.3f}" for sparsity in found[0][2])
            print(f"{name}: target {target:g}: {errors} of it, reported {reported:.3f} of the error; {chosen}")


if __name__ == "__main__":
    main()
