"""The demo without ComfyUI: the same checkpoint in diffusers, dense and SLA2, by an attention processor."""

import time

import torch
from safetensors.torch import load_file

from miniature.captions import embed
from miniature.images import write_webp
from miniature.scaled import rope_scale
from miniature.wan import WanConfig, rope_table
from sla2_diffusers import apply_sla2

from .demo_plan import CAPTION
from .environment import say
from .outcome import Outcome, Run
from .quick_convolutions import take_onednn


class ScaledRope(torch.nn.Module):
    """Rotary embedding by the picture's height, in place of diffusers' own, which has no scale: see miniature.scaled."""

    def forward(self, latents):
        _, _, frames, height, width = latents.shape
        table = rope_table((frames, height // 2, width // 2), latents.device, rope_scale(8 * height))
        return tuple(part.repeat_interleave(2, -1)[None] for part in table)


def load_transformer(path):
    """diffusers' WanTransformer3DModel with the weights of a Wan2.1 checkpoint file; sizes are read from the tensors."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    sizes = WanConfig.from_state_dict(state)
    model = WanTransformer3DModel(
        num_attention_heads=sizes.num_heads,
        text_dim=sizes.text_dim,
        freq_dim=sizes.freq_dim,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.num_layers,
    )
    model.load_state_dict(convert_wan_transformer_to_diffusers(state))
    model.rope = ScaledRope()
    return model.eval()


def load_vae(path):
    """diffusers' AutoencoderKLWan with the weights of a Wan2.1 VAE file."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    model = AutoencoderKLWan(base_dim=state["decoder.head.0.gamma"].shape[0])
    model.load_state_dict(convert_wan_vae_to_diffusers(state))
    return model.eval()


def generate(folder, plan, checkpoint):
    """Both videos, written to ``folder``; returns the Outcome."""
    take_onednn()
    transformer = load_transformer(checkpoint.dit).to(plan.device)
    vae = load_vae(checkpoint.vae).to(plan.device)
    say("Loaded the checkpoint into diffusers")
    warm_up(transformer, vae, plan.device)
    runs, latents = [], {}
    for name in ("dense", "sla2"):
        handle = None
        if name == "sla2":
            handle = apply_sla2(
                transformer,
                sparsity=plan.sparsity,
                minimum_tokens=plan.minimum_tokens,
                dense_layers=plan.dense_layers,
                precision="auto",
            )
        latents[name], sampling_s = sample(transformer, plan, name)
        video, decoding_s = decode(vae, latents[name], name)
        write_webp(folder / f"{name}.webp", video, fps=plan.fps)
        run = Run(name, f"{name}.webp", sampling_s, decoding_s)
        if handle is not None:
            run.sparse_calls, run.dense_calls, run.sparsity = handle.sparse_calls, handle.dense_calls, handle.sparsity
            run.reasons = dict(handle.dense_reasons())
            handle.undo()
        runs.append(run)
    difference = ((latents["sla2"] - latents["dense"]).norm() / latents["dense"].norm()).item()
    return Outcome("diffusers", plan.device, plan.tokens, plan.steps, plan.seed, checkpoint.trained, runs, difference)


@torch.no_grad()
def warm_up(transformer, vae, device):
    """One small call of each model, so that the first video's times hold no start-up of torch."""
    latents = torch.zeros(1, 16, 1, 4, 4, device=device)
    transformer(latents, torch.tensor([1.0], device=device), embed("").to(device))
    vae.decode(latents)


def euler_scheduler(steps, shift, device):
    """diffusers' Euler scheduler at the noise levels of miniature.sample, which are those of ComfyUI's "simple"."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    # by the number of steps alone its last step begins next to zero: findings/diffusers_flow_euler_ends_early.sh
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist(), device=device)
    return scheduler


@torch.no_grad()
def sample(transformer, plan, name):
    """(latents (1, 16, T, h, w), seconds): Euler steps along the flow with classifier-free guidance."""
    start = time.monotonic()
    shape = (1, 16, (plan.frames - 1) // 4 + 1, plan.height // 8, plan.width // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(plan.seed)).to(plan.device)
    context = embed(CAPTION).to(plan.device)
    contexts = torch.cat([context, torch.zeros_like(context)])
    scheduler = euler_scheduler(plan.steps, plan.shift, plan.device)
    autocast = torch.autocast(plan.device, torch.bfloat16, enabled=plan.device != "cpu")
    for step, timestep in enumerate(scheduler.timesteps, 1):
        with autocast:
            both = transformer(torch.cat([x, x]), timestep.expand(2), contexts, return_dict=False)[0].float()
        velocity, base = both.chunk(2)
        x = scheduler.step(base + plan.cfg * (velocity - base), timestep, x, return_dict=False)[0]
        if step * 4 // plan.steps != (step - 1) * 4 // plan.steps:
            say(f"  {time.monotonic() - start:5.1f} s  sampling {name}, step {step} of {plan.steps}")
    return x, time.monotonic() - start


@torch.no_grad()
def decode(vae, latents, name):
    """(video (3, F, H, W) in [-1, 1], seconds)."""
    say(f"           decoding {name}")
    start = time.monotonic()
    statistics = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (latents.new_tensor(values).view(1, -1, 1, 1, 1) for values in statistics)
    video = vae.decode(latents * std + mean, return_dict=False)[0][0].float().cpu()
    return video, time.monotonic() - start
