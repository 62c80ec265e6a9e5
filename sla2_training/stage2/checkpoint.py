"""Checkpoints of stage 2: what trains, the optimiser, the step, and whose they are. Whole or not there at all."""

import json
import os
import re
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from sla2_kernels.whole_file import write_whole

from ..errors import TrainingError

STEP = re.compile(r"step-(\d{6,})")  # a copy under another name is its owner's, and is never removed
TENSORS, OPTIMISER, FACTS = "trained.safetensors", "optimiser.pt", "checkpoint.json"


def prepare(folder, resume):
    """Makes the output folder. Raises TrainingError where nothing can be written there, or a former run's checkpoints lie there
    and ``resume`` is not set: later ones of that run would count as newer than what is trained now."""
    try:
        os.makedirs(folder, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise TrainingError(f"Output folder {folder} cannot be made: {error.strerror or error}.") from error
    if not writable:
        raise TrainingError(f"Output folder {folder} cannot be written to: set output to another one.")
    saved = checkpoints(folder)
    if saved and not resume:
        raise TrainingError(
            f"Output folder {folder} holds checkpoints of a former run, {saved[-1].name} the newest: go on from it with --resume, "
            "or set output to another folder."
        )


def save(folder, step, tensors, optimiser, facts, keep):
    """Writes checkpoint ``step`` into ``folder`` and removes all but the newest ``keep`` up to it; returns its path.

    Raises TrainingError where it cannot be written, such as on a full disk.
    """
    folder = Path(folder)
    final, draft = folder / f"step-{step:06d}", folder / f"step-{step:06d}.part"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        whole = {n: t.contiguous() for n, t in tensors.items()}
        write_whole(draft / TENSORS, lambda path: safetensors.torch.save_file(whole, path))
        torch.save(optimiser, draft / OPTIMISER)
        (draft / FACTS).write_text(json.dumps({**facts, "step": step}, indent=1), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch's, of a full disk
        before = checkpoints(folder, step)[-1:]
        kept = f"go on from {before[0]} with --resume" if before else "start again, no checkpoint had been written yet"
        why = str(error).splitlines()[0]
        raise TrainingError(f"Checkpoint {final} cannot be written ({why}): make room, then {kept}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in checkpoints(folder, step)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder, last=None):
    """Paths of the whole checkpoints in ``folder``, oldest first; those up to step ``last``."""
    steps = {path: STEP.fullmatch(path.name) for path in Path(folder).glob("step-*") if (path / FACTS).exists()}
    steps = {path: int(found[1]) for path, found in steps.items() if found}
    return sorted((path for path, step in steps.items() if last is None or step <= last), key=steps.get)


def load(path, facts):
    """(tensors, optimiser, facts with its step) of a checkpoint; raises TrainingError where it is damaged or another model's.

    facts: {"model": {...}, "adapter": {...}} of the run that wants it; the first difference is named.
    """
    path = Path(path)
    if not (path / FACTS).exists():
        raise TrainingError(f"{path} is no checkpoint: name a folder such as step-000050 in the output folder.")
    try:
        stored = json.loads((path / FACTS).read_text(encoding="utf-8"))
        name, step = stored["model"]["name"], stored["step"]
        tensors = safetensors.torch.load_file(path / TENSORS)
        optimiser = torch.load(path / OPTIMISER, map_location="cpu", weights_only=True)
        if not isinstance(step, int):
            raise TypeError(f"its step is {step!r}")
    except MemoryError:
        raise
    except Exception as error:  # json, safetensors and torch raise errors of many kinds for a damaged file
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
