"""What an ended LoRA training reached, as files where ComfyUI's loaders find them."""

import os

import folder_paths
import safetensors.torch
from safetensors import SafetensorError

from ..sla2_kernels.whole_file import write_whole
from .load_router import FOLDER
from .save_router import save_numbered, save_router


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


def save_both(state, router, family):
    """Saves LoRA and router as <family>_lora_autosave_<number>_, each where the other cannot be; sentences that say where."""
    stem, sentences = f"{family}_lora_autosave", []
    for what, folder, save, content in (("LoRA", "loras", save_lora, state), ("router", FOLDER, save_router, router)):
        try:
            sentences.append(f"The {what} is saved as {save(content, stem)} in models/{folder}.")
        except ValueError as error:
            # what ended the training is what the user has to be told first
            sentences.append(f"The {what} is lost: {error}")
    return " ".join(sentences)
