"""Stage 2 of SLA2: fine-tune a model whose self-attention is SLA2, low-bit forward and 16-bit backward, with LoRA.

Source: arXiv 2602.12675, Section 4 (hard top-k, frozen router, alpha trained along). Needs peft and accelerate.
``python -m sla2_training.stage2 --config FILE`` runs it on diffusers' Wan transformer.
"""

from .config import Stage2Config, load_config
from .data import VideoLatents, load_latents
from .lora import add_lora, comfyui_lora, save_lora
from .student import Student
from .trainer import Stage2Trainer

__all__ = [
    "Stage2Config",
    "Stage2Trainer",
    "Student",
    "VideoLatents",
    "add_lora",
    "comfyui_lora",
    "load_config",
    "load_latents",
    "save_lora",
]
