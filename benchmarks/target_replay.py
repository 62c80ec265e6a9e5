"""Runs with an attention error set, replayed from recordings of real ones: no model, no GPU, a millisecond each.

    python -m benchmarks.target_replay FOLDER

FOLDER has what `python -m benchmarks.target_error --record FOLDER` wrote. The choice of sparsities is the node's own; what its
calls would have measured, and what their error over all rows would have been, comes from the recording, straight between its
rungs in log(error) over log(sparsity / (1 - sparsity)).
"""

import argparse
import bisect
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from miniature.sample import noise_schedule

from .wan_in_comfyui import load_pack

TARGETS = (0.08, 0.12, 0.16, 0.25)


def log_odds(sparsity):
    return math.log(sparsity / (1 - sparsity))


@dataclass
class Replayed:
    """One recording, see error_recordings.py; its rungs rise. of_all(), of_rows(): squared relative errors."""

    tokens: int
    sigmas: list[float]
    rungs: list[float]
    energy: torch.Tensor  # (steps, halves, layers, heads)
    products: torch.Tensor
    ratio: torch.Tensor
    row_error: torch.Tensor
    row_energy: torch.Tensor

    @classmethod
    def load(cls, path):
        with safe_open(path, "pt") as file:
            tokens, rungs = int(file.metadata()["tokens"]), [float(rung) for rung in file.metadata()["rungs"].split()]
            tensors = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
        order = sorted(range(len(rungs)), key=lambda i: rungs[i])
        for name in ("products", "ratio", "row_error"):
            tensors[name] = tensors[name][:, :, :, order]
        steps = len(tensors["energy"])
        return cls(tokens, noise_schedule(steps).tolist()[:-1], sorted(rungs), **tensors)

    @property
    def draws(self):
        return self.ratio.shape[4]

    def of_all(self, step, sparsity, draw, lag=0):
        """Over all rows, at the ratio that was fitted ``lag`` steps before. (halves, layers)."""
        ratio = self.ratio[step - lag, :, :, :, draw]  # (halves, layers, rungs, heads)
        target, cross, square = self.products[step].unbind(-1)
        error = (target - 2 * ratio * cross + ratio**2 * square).sum(-1) / self.energy[step].sum(-1)[..., None]
        return self._between(error, sparsity)

    def of_rows(self, step, sparsity, draw):
        """As a call that fits measures it, on the rows of a draw. (halves, layers)."""
        draws = draw, (draw + 1) % self.draws  # both halves of guidance draw their own
        error = torch.stack([self.row_error[step, half, :, :, d] for half, d in enumerate(draws)])
        energy = torch.stack([self.row_energy[step, half, :, d] for half, d in enumerate(draws)])
        weight = self.energy[step][..., None]  # the mean energy of a row, by which both are divided
        error = (error * weight[:, :, None]).sum((-1, -2))
        energy = (energy * weight).sum((-1, -2))
        return self._between(error / energy[..., None], sparsity)

    def _between(self, squares, sparsity):
        at = log_odds(min(max(sparsity, self.rungs[0]), self.rungs[-1]))
        upper = min(max(bisect.bisect_left(self.rungs, sparsity), 1), len(self.rungs) - 1)
        low, high = (log_odds(self.rungs[i]) for i in (upper - 1, upper))
        part = (at - low) / (high - low)
        low, high = squares[..., upper - 1].log(), squares[..., upper].log()
        return (low + part * (high - low)).exp()


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
            continue
        if choice.measures or choice.sparsity != sparsities[-1]:
            fitted = step
            found = recording.of_rows(step, choice.sparsity, (draw + step) % recording.draws)
            measured[:] = measured[0] + found.sum().item(), measured[1] + found.numel()
        squares.append(recording.of_all(step, choice.sparsity, (draw + fitted) % recording.draws, step - fitted))
        sparsities.append(choice.sparsity)
    error = torch.stack(squares).mean().sqrt().item()
    return error, chooser.run_error(*measured), sparsities


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    args = parser.parse_args(argv)
    chooser = __import__(f"{load_pack().__name__}.nodes.runs.error_target", fromlist=["*"]).ErrorTarget
    for path in sorted(args.folder.glob("*.safetensors")):
        recording = Replayed.load(path)
        for target in args.targets:
            found = [replay(recording, chooser(target), draw) for draw in range(recording.draws)]
            errors = [error / target for error, _, _ in found]
            reported = statistics.mean(reported / error for error, reported, _ in found)
            chosen = " ".join(f"{sparsity:.3f}" for sparsity in found[0][2])
            print(
                f"{path.stem}: target {target:g}: {min(errors):.3f} to {max(errors):.3f} of it, "
                f"reported {reported:.3f} of the error; {chosen}"
            )


if __name__ == "__main__":
    main()
