"""Training for SLA2: stage 1 makes a router file for a model, stage 2 fine-tunes the model through it. Knows torch and sla2_kernels, not ComfyUI."""

from .errors import TrainingError
from .fine_tuning import FineTuning
from .report import LayerErrors, TrainingReport
from .soft_top_k import soft_top_k
from .trainer import RouterTrainer, TrainerOptions

__all__ = [
    "FineTuning",
    "LayerErrors",
    "RouterTrainer",
    "TrainerOptions",
    "TrainingError",
    "TrainingReport",
    "soft_top_k",
]
