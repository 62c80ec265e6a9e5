"""Where the miniature's files lie: shipped in a folder per kind of model, as ComfyUI lists them; a training writes them side by side."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
# file: ComfyUI's folder for its kind
KINDS = {
    "wan_miniature_dit.safetensors": "diffusion_models",
    "wan_miniature_vae.safetensors": "vae",
    "wan_miniature_stage2_lora.safetensors": "loras",
    "wan_miniature_4_steps_lora.safetensors": "loras",
    "wan_miniature_8_steps_lora.safetensors": "loras",
    "wan_miniature_router.safetensors": "sla2",
    "wan_miniature_stage2_router.safetensors": "sla2",
}


def weight_file(name: str, folder: Path = WEIGHTS) -> Path:
    """One of KINDS in a folder of either sort; the place of a training's file where it is in neither."""
    of_its_kind = folder / KINDS[name] / name
    return of_its_kind if of_its_kind.exists() else folder / name
