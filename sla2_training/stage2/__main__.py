"""Stage 2 on diffusers' Wan transformer: one configuration file, one GPU or many.

    python -m sla2_training.stage2 --config stage2.json
    accelerate launch --num_processes 8 -m sla2_training.stage2 --config stage2.json --resume

Writes checkpoints, log.json, lora.safetensors (ComfyUI loads it) and router.safetensors into the folder named "output".
"""

import argparse
import sys

import torch

from sla2_kernels import RouterFileError

from ..errors import TrainingError
from .checkpoint import prepare
from .config import load_config
from .data import load_latents
from .lora import check_lora_file
from .trainer import Stage2Trainer, make_accelerator
from .wan import check_fits, wan_student


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="JSON file; its settings are listed in stage2/config.py")
    from_checkpoint = "go on from this checkpoint, or from the newest one in the output folder"
    parser.add_argument("--resume", nargs="?", const=True, default=None, metavar="CHECKPOINT", help=from_checkpoint)
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config)
        data = load_latents(config.data)
        config.check_data(data)
        for path in config.few_step_loras.values():
            check_lora_file(path)
        prepare(config.output, args.resume)
        validation = load_latents(config.validation_data) if config.validation_data else None
        options = {"validation": validation, "model_name": config.model, "accelerator": make_accelerator(config)}
        student = load_student(config)
        for path, videos in ((config.data, data), (config.validation_data, validation)):
            if videos is not None:
                shapes = videos.latents.shape[1:], videos.context.shape[1:]
                check_fits(student.model, f"Training data {path}", *shapes)
        trainer = Stage2Trainer(config, student, data, **options)
        report = trainer.train(args.resume)
    except (TrainingError, RouterFileError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if trainer.accelerator.is_main_process:
        print(report.table())
    return 0


def load_student(config):
    """The Student of the configured model, on the CPU. Raises RouterFileError, ValueError, OSError for what is not there."""
    from diffusers import WanTransformer3DModel

    # sharded weights share one dtype with the float32 LoRA
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" and not config.fsdp else torch.float32
    options = {"subfolder": config.subfolder} if config.subfolder else {}
    return wan_student(WanTransformer3DModel.from_pretrained(config.model, torch_dtype=dtype, **options), config)


if __name__ == "__main__":
    sys.exit(main())
