"""A tiny diffusers Wan transformer, its data and its stage 2 trainer, for tests."""

from dataclasses import replace

import torch
from diffusers import WanTransformer3DModel

from sla2_training.stage2 import Stage2Config, Stage2Trainer, VideoLatents
from sla2_training.stage2.wan import wan_student

LAYERS, HEADS, HEAD_DIM = 2, 2, 32
CONFIG = Stage2Config(
    model="tiny", output="", data="", sparsity=0.6, precision="16bit", steps=4, batch=2, lora_rank=4, lora_alpha=8.0,
    warmup=1, mixed_precision="no", gradient_checkpointing=False, checkpoint_every=2, validate_every=4,
    validation_levels=2, learning_rate=2e-3, ratio_learning_rate=0.05,
)  # fmt: skip


def tiny_model(layers=LAYERS, seed=0):
    """Random, with self-attention that is sharp and weighs something."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=layers
    )
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.norm_q.weight.fill_(2.0)
            block.attn1.norm_k.weight.fill_(2.0)
            block.attn1.to_out[0].weight.mul_(4)
            block.scale_shift_table[:, 2] += 1
    return model


def videos(count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 16, 3, 12, 16, generator=generator)  # 144 tokens: 2 query blocks, 3 key blocks
    context = torch.randn(count, 6, 32, generator=generator)
    return VideoLatents(latents, context, torch.arange(count), torch.zeros(1, 6, 32))


def trainer(tmp_path, config=CONFIG, *, model=None, data=None, name="tiny", **options):
    config = replace(config, output=str(tmp_path))
    student = wan_student(tiny_model() if model is None else model, config)
    options.setdefault("say", lambda text: None)
    return Stage2Trainer(config, student, videos() if data is None else data, model_name=name, **options)
