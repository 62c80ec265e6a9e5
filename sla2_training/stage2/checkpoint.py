"""Checkpoints of stage 2: what trains, the optimiser, the step, and whose they are. Whole or not there at all."""

import json
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..errors import TrainingError

TENSORS, OPTIMISER, FACTS = "trained.safetensors", "optimiser.pt", "checkpoint.json"


def save(folder, step, tensors, optimiser, facts, keep):
    """Writes checkpoint ``step`` into ``folder`` and removes all but the newest ``keep``; returns its path."""
    folder = Path(folder)
    final, draft = folder / f"step-{step:06d}", folder / f"step-{step:06d}.part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, draft / TENSORS)
    torch.save(optimiser, draft / OPTIMISER)
    (draft / FACTS).write_text(json.dumps({**facts, "step": step}, indent=1), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder):
    """Paths of the whole checkpoints in ``folder``, oldest first."""
    found = (path for path in Path(folder).glob("step-*") if path.suffix != ".part" and (path / FACTS).exists())
    return sorted(found)


def load(path, facts):
    """(tensors, optimiser, facts with its step) of a checkpoint; raises TrainingError where it is damaged or another model's.

    facts: {"model": {...}, "adapter": {...}} of the run that wants it; the first difference is named.
    """
    path = Path(path)
    try:
        stored = json.loads((path / FACTS).read_text(encoding="utf-8"))
        name, _ = stored["model"]["name"], stored["step"]
        tensors = safetensors.torch.load_file(path / TENSORS)
        optimiser = torch.load(path / OPTIMISER, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, RuntimeError) as error:
        raise TrainingError(f"Checkpoint {path} is damaged ({type(error).__name__}: {error}).") from error
    for part in ("model", "adapter"):
        for what, wanted in facts[part].items():
            got = stored.get(part, {}).get(what)
            if got != wanted:
                raise TrainingError(
                    f"Checkpoint {path} was made for {name} and this run trains {facts['model']['name']}: "
                    f"its {what} is {got}, this run's is {wanted}."
                )
    return tensors, optimiser, stored
