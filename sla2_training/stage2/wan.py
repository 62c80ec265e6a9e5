"""diffusers' Wan transformer as stage 2's model."""

from sla2_kernels import identity_router, load_router
from sla2_kernels.wan_self_attention import MODEL_FAMILY, project_qkv, rotate

from .lora import add_lora
from .student import Student


class StudentProcessor:
    """Attention processor of one self-attention layer: the student decides whether it runs sparse or dense."""

    def __init__(self, student, layer):
        self.student, self.layer = student, layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = project_qkv(attn, hidden_states)
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        out = self.student.attend(self.layer, q.to(v.dtype), k.to(v.dtype), v).flatten(2)
        for step in attn.to_out:
            out = step(out)
        return out


def run(model, noisy, t, context, attend):
    """The velocity of noisy (B, C, T, h, w) at noise levels t (B,) in 0 to 1; attend reaches the model by its processors."""
    dtype = model.patch_embedding.weight.dtype
    return model(noisy.to(dtype), timestep=t * 1000, encoder_hidden_states=context.to(dtype), return_dict=False)[0]


def check_fits(model, where, latents, context):
    """Raises ValueError where a WanTransformer3DModel does not take latents (C, T, h, w) and context (L, D) of these shapes.

    where: the file that they are from.
    """
    facts = model.config
    if facts.in_channels != facts.out_channels:
        raise ValueError(
            f"This model takes {facts.in_channels} channels and gives {facts.out_channels}, as those from images do: stage 2 "
            "trains models from text alone."
        )
    (channels, *sides), width = latents, context[1]
    if channels != facts.in_channels or width != facts.text_dim:
        raise ValueError(
            f"{where} has latents of {channels} channels and context of {width} features, and this model takes "
            f"{facts.in_channels} and {facts.text_dim}."
        )
    if any(side % patch for side, patch in zip(sides, facts.patch_size, strict=True)):
        raise ValueError(
            f"{where} has latents of {tuple(sides)}, which patches of {tuple(facts.patch_size)} do not fill."
        )


def wan_student(model, config):
    """The Student of a WanTransformer3DModel; raises RouterFileError where the router file is another model's."""
    attention = model.blocks[0].attn1
    sizes = {
        "model_family": MODEL_FAMILY,
        "num_layers": len(model.blocks),
        "num_heads": attention.heads,
        "head_dim": attention.inner_dim // attention.heads,
    }
    router = identity_router(**sizes) if config.router is None else load_router(config.router)
    router.require_model(**sizes)
    model.requires_grad_(False)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    add_lora(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    student = Student(model, run, router, sparsity=config.sparsity, precision=config.precision, backend=config.backend)
    for layer, block in enumerate(model.blocks):
        block.attn1.set_processor(StudentProcessor(student, layer))
    return student
