"""The states that SLA2 Train LoRA trains step by step, beside the latents of ComfyUI's own Euler sampling of the same noise
through SLA2 Apply Attention, on tiny models. Prints one line of JSON. Started by test_own_steps_in_comfyui.py:

    python own_steps_probe.py REPOSITORY FOLDER
"""

import json
import sys
from pathlib import Path

import torch

repository, folder = map(Path, sys.argv[1:])
sys.path[:0] = [str(repository), str(repository / "tests" / "comfyui")]

import comfy.sample
import comfy.samplers
import comfy.sd
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from model_host import pack_loader
from tiny_wan import save_router, save_wan

pack_module = pack_loader(repository)
sessions, states = (pack_module(f"nodes.training.{name}") for name in ("lora_session", "training_states"))
SPARSITY, SIZE = 0.6, (1, 16, 3, 16, 16)
save_router(folder / "router.safetensors")
router = pack_module("sla2_kernels.weights").load_router(folder / "router.safetensors")


def conditioning(number, image):
    generator = torch.Generator().manual_seed(number)
    options = {}
    if image:  # as Wan's image-to-video nodes leave it: the first frame is known
        mask = torch.ones(1, 1, *SIZE[2:])
        mask[:, :, 0] = 0
        options = {"concat_latent_image": torch.randn(*SIZE, generator=generator), "concat_mask": mask}
    return [[torch.randn(1, 512, 4096, generator=generator) * 0.1, options]]


def trained_on(model, prompts, sigmas, cfg):
    """States of the sampling that is measured before training, in which the LoRA is still nothing."""
    met, follow = [], states.OwnSteps.follow

    def recorded(self, state, velocity):
        met.append(state.noisy)
        follow(self, state, velocity)

    settings = sessions.LoraSettings(
        steps=1, batch=1, learning_rate=1e-7, optimiser="adamw", seed=3, loss="distill", drop_caption=0.0, sigmas=sigmas, cfg=cfg
    )  # fmt: skip
    states.OwnSteps.follow = recorded
    facts = pack_module("nodes.attention.model_families").facts_of(model)
    plan = sessions.LoraPlan(sparsity=SPARSITY, precision="16bit", rank=2, settings=settings)
    with torch.inference_mode(False):
        session = sessions.LoraSession(model, facts, router, plan, lambda *_: None, lambda: None)
        session.take_size({"samples": torch.zeros(*SIZE)})
        session.train(*prompts)
    states.OwnSteps.follow = follow
    return met[: len(sigmas) - 1]


def sampled(model, prompts, sigmas, cfg):
    """What ComfyUI's Euler steps start from, with the noise that is measured with."""
    met, empty = [], torch.zeros(*SIZE)
    noise = states.noise_like(empty, [states.HELD_OUT])
    euler = comfy.samplers.sampler_object("euler")
    comfy.sample.sample_custom(
        model, noise, cfg, euler, sigmas, *prompts, empty, callback=lambda _, x0, x, n: met.append(x.clone()), disable_pbar=True
    )  # fmt: skip
    return met


@torch.inference_mode()
def probe(image, cfg, shift, sampler, scheduler):
    path = folder / f"wan_{image}.safetensors"
    save_wan(path, in_dim=36 if image else 16, image=image)
    model = ModelSamplingSD3().patch(comfy.sd.load_diffusion_model(str(path)), shift)[0]
    prompts = [conditioning(number, image) for number in (1, 2)]
    names = {"sampler_name": sampler, "scheduler": scheduler}
    sigmas = pack_module("nodes.train_lora").sigmas_of(model, {"steps": 3, **names})
    settings = pack_module("nodes.settings.values").AttentionSettings(SPARSITY, precision="16bit", minimum_tokens=0)
    sparse = pack_module("nodes.attention.patching").install(model, settings, router)
    trained = trained_on(model, prompts, sigmas, cfg)

    def distance(other):
        runs = zip(trained, sampled(other, prompts, sigmas, cfg), strict=True)
        return [float((own - x).norm() / x.norm()) for own, x in runs]

    return {"sparse": distance(sparse), "dense": distance(model)}


print(json.dumps([probe(False, 1.0, 8.0, "euler", "ddim_uniform"), probe(True, 4.0, 3.0, "uni_pc", "beta")]))
