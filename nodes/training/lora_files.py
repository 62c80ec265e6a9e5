"""Saves what a LoRA training reached before it was stopped, where ComfyUI's loaders find it."""

import logging
import os

import folder_paths
import safetensors.torch
from safetensors import SafetensorError

from ...sla2_kernels.whole_file import write_whole
from .router_files import FOLDER, save_numbered, save_router

logger = logging.getLogger("sla2")


def save_lora(state, stem):
    """Saves a LORA_MODEL under ``stem`` and the next free number in models/loras; the file's name. Raises ValueError."""
    folder = folder_paths.get_folder_paths("loras")[0]

    def write(draft):
        safetensors.torch.save_file(state, draft)

    try:
        os.makedirs(folder, exist_ok=True)
        path = save_numbered(folder, stem, lambda path: write_whole(path, write, overwrite=False))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"a LoRA file in {folder} cannot be written: {getattr(error, 'strerror', None) or error}."
        ) from error
    return os.path.basename(path)


def save_both(lora, router, family):
    """Saves LoRA and router as <family>_lora_autosave_<number>_, independently of each other; returns sentences that say where.

    lora, router: functions that make a LORA_MODEL and a RouterWeights of what is trained so far.
    """
    stem, sentences = f"{family}_lora_autosave", []
    for what, folder, save, make in (("LoRA", "loras", save_lora, lora), ("router", FOLDER, save_router, router)):
        try:
            sentences.append(f"The {what} is saved as {save(make(), stem)} in models/{folder}.")
        except (ValueError, TypeError, RuntimeError) as error:  # the other file can still be saved
            # only a clause: it follows the sentence why the training ended
            sentences.append(f"The {what} is lost: {str(error).rstrip('.')}.")
            if not isinstance(error, ValueError):
                logger.exception("SLA2 Train LoRA: the %s could not be made or saved", what)
    return " ".join(sentences)
