"""The one configuration file of stage 2: JSON, every setting checked before a model is loaded."""

import json
import re
from dataclasses import dataclass, field, fields

from sla2_kernels.support import BACKENDS, PRECISIONS

from ..losses import LOSSES
from ..optimisers import OPTIMISERS, missing_optimiser

TARGETS = ("self_attn", "cross_attn", "ffn")
STATES = ("sampled", "noised")


@dataclass(frozen=True)
class Stage2Config:
    """Settings of one stage 2 run; raises ValueError naming the first setting that does not fit.

    model: folder or name of a diffusers Wan transformer. subfolder: of it. router: stage 1's file, None for the untrained
    router. data, validation_data: files of load_latents(). output: folder for checkpoints, log and exports.
    sparsity, precision, backend: as in sla2_attention; precision "auto" takes what inference takes on the card.
    loss: "distill", the distance to the velocity of the same model run dense, "flow", flow matching on the videos, or "mixed",
        flow matching at noise levels below a half and distillation above (losses.py).
    steps, batch: optimisation steps, videos per step over all processes; micro_batch: videos at a time on one device.
    lora_rank, lora_alpha, lora_targets: of the adapters; learning_rate: theirs, ratio_learning_rate: the mixing ratios'.
    optimiser: of the adapters, "adamw" or "muon", which needs PyTorch 2.9 and whole matrices: not with fsdp.
    warmup: steps until the full learning rate, which falls to zero over the last quarter. clip: largest gradient norm.
    drop_caption: share of videos trained with the empty caption. shift: of the noise levels, as in sampling.
    guidance: scale of classifier-free guidance that steps train in turns with the loss, 1 for none; needs "empty_context".
        Videos take two rows each in those steps, so of a micro batch the first half are trained, rounded up.
    few_step_loras: number of steps -> file of the distilled LoRA, {"8": "lora.safetensors"}: steps train the model with each
        merged, in turns; not with fsdp, which splits the weights.
    few_step_states: what these steps start from: "sampled", what the model's own sparse steps make of pure noise, for which a LoRA
        of n steps takes (n - 1) / 2 more model calls on average and no videos, or "noised", videos with noise.
    sampling_steps, sampling_shift: of sampling: steps with guidance, and the shift of all those noise levels.
    mixed_precision: "bf16" or "no". gradient_checkpointing: recompute blocks, less memory. fsdp: shard the weights.
    checkpoint_every, keep: steps between checkpoints, and how many stay. validate_every, validation_levels.
    """

    model: str = ""
    output: str = ""
    data: str = ""
    validation_data: str | None = None
    subfolder: str = "transformer"
    router: str | None = None
    sparsity: float = 0.97
    precision: str = "auto"
    backend: str = "auto"
    loss: str = "distill"
    steps: int = 500
    batch: int = 16
    micro_batch: int = 1
    lora_rank: int = 64
    lora_alpha: float = 64.0
    lora_targets: tuple[str, ...] = TARGETS
    learning_rate: float = 1e-4
    ratio_learning_rate: float = 1e-2
    optimiser: str = "adamw"
    warmup: int = 20
    clip: float = 1.0
    drop_caption: float = 0.1
    shift: float = 5.0
    guidance: float = 1.0
    few_step_loras: dict[str, str] = field(default_factory=dict)
    few_step_states: str = "sampled"
    sampling_steps: int = 20
    sampling_shift: float = 5.0
    seed: int = 0
    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = True
    fsdp: bool = False
    checkpoint_every: int = 50
    keep: int = 2
    validate_every: int = 100
    validation_levels: int = 4

    def __post_init__(self):
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        choices = {
            "precision": ("auto", *PRECISIONS), "loss": LOSSES, "mixed_precision": ("bf16", "no"), "optimiser": OPTIMISERS,
            "few_step_states": STATES, "backend": BACKENDS,
        }  # fmt: skip
        for name, options in choices.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}.")
        reason = missing_optimiser(self.optimiser)
        if self.optimiser == "muon" and self.fsdp:
            reason = "Muon needs whole matrices, which fsdp splits"
        if reason:
            raise ValueError(f'optimiser is "{self.optimiser}": {reason}; take "adamw".')
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {self.sparsity}.")
        if not 0 <= self.drop_caption <= 1:
            raise ValueError(f"drop_caption must be 0 to 1, got {self.drop_caption}.")
        at_least_1 = (
            "steps", "batch", "micro_batch", "lora_rank", "keep", "checkpoint_every", "validate_every", "validation_levels",
            "sampling_steps",
        )  # fmt: skip
        for name in at_least_1:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "ratio_learning_rate", "warmup"):
            if not 0 <= getattr(self, name) <= 1e6:
                raise ValueError(f"{name} must be 0 to 1000000, got {getattr(self, name)}.")
        for name in ("lora_alpha", "clip"):
            if not 0 < getattr(self, name) <= 1e6:
                raise ValueError(f"{name} must be above 0 and at most 1000000, got {getattr(self, name)}.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer of 64 bits, got {self.seed}.")
        self._check_ways()
        unknown = sorted(set(self.lora_targets) - set(TARGETS))
        if unknown or not self.lora_targets:
            raise ValueError(f"lora_targets must be some of {', '.join(TARGETS)}, got {list(self.lora_targets)}.")

    def _check_ways(self):
        if not 1 <= self.guidance <= 100:
            raise ValueError(f"guidance must be 1, which is none, to 100, got {self.guidance}.")
        for name in ("shift", "sampling_shift"):
            if not 0.01 <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} must be 0.01 to 1000, got {getattr(self, name)}.")
        if self.sampling_steps > 1000:
            raise ValueError(f"sampling_steps must be 1 to 1000, got {self.sampling_steps}.")
        for steps, path in self.few_step_loras.items():
            if not (re.fullmatch("[1-9][0-9]{0,2}", str(steps)) and isinstance(path, str) and path):
                raise ValueError(
                    f'few_step_loras must name a file for each number of steps, 1 to 999, as {{"8": "lora.safetensors"}}, '
                    f"got {json.dumps({steps: path})}."
                )
        if self.few_step_loras and self.fsdp:
            raise ValueError("few_step_loras cannot be merged into weights that fsdp splits: leave out one of them.")

    def check_data(self, data):
        """Raises ValueError where these VideoLatents lack what the settings need."""
        if self.guidance != 1 and data.empty is None:
            raise ValueError(
                f'guidance is {self.guidance:g}, and the training data has no "empty_context" to guide away from: add it, or '
                "leave guidance out."
            )

    def rounds(self, processes):
        """Micro batches per step on each of ``processes`` devices; raises ValueError where the batch does not divide."""
        at_once = self.micro_batch * processes
        if self.batch % at_once:
            raise ValueError(
                f"batch is {self.batch}, which {processes} processes with micro_batch {self.micro_batch} cannot share "
                f"equally: make it a multiple of {at_once}."
            )
        return self.batch // at_once


def load_config(path):
    """The Stage2Config of a JSON file. Raises ValueError: one sentence with the file and the setting."""
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise ValueError(f"Configuration {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # of JSON, or of text that is not UTF-8
        raise ValueError(f"Configuration {path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"Configuration {path} must be one JSON object of settings.")
    known = [f.name for f in fields(Stage2Config)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"Configuration {path} has the unknown setting {unknown[0]!r}; known are {', '.join(known)}.")
    missing = [name for name in ("model", "output", "data") if not values.get(name)]
    if missing:
        raise ValueError(f"Configuration {path} must set {missing[0]!r}.")
    defaults = Stage2Config()
    for name, value in values.items():
        _check_type(path, name, value, getattr(defaults, name))
    return Stage2Config(**values)


def _check_type(path, name, value, default):
    if default is None:
        fits = value is None or isinstance(value, str)
    elif isinstance(default, bool):
        fits = isinstance(value, bool)
    elif isinstance(default, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif isinstance(default, tuple):
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
    else:
        fits = isinstance(value, type(default)) and not isinstance(value, bool)
    if not fits:
        example = {"8": "lora.safetensors"} if default == {} else default
        kind = "text or null" if default is None else f"like {json.dumps(example)}"
        raise ValueError(f"Configuration {path}: {name} must be {kind}, got {json.dumps(value)}.")
