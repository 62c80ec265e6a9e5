"""A TurboDiffusion-like checkpoint in the real server: loaded with its SLA weights, and run as SLA."""

import pytest
import torch
from tiny_wan import LAYERS, wan_state_dict

STEPS = 3
SIGMAS = "0.9877, 0.9338, 0.6090, 0.0"


def turbo_state_dict(layers=LAYERS):
    """tiny_wan as TurboDiffusion saves it: a linear patch embedding, and proj_l in every self-attention."""
    generator = torch.Generator().manual_seed(11)
    state = wan_state_dict(layers=layers, seed=4)
    state["patch_embedding.weight"] = state["patch_embedding.weight"].flatten(1)
    for layer in range(layers):
        name = f"blocks.{layer}.self_attn.attn_op.local_attn.proj_l"
        state[f"{name}.weight"] = torch.randn(128, 128, generator=generator) / 11
        state[f"{name}.bias"] = torch.zeros(128)
    return {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def files(comfy):
    folder = comfy.base / "models/diffusion_models"
    state = turbo_state_dict()
    torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in state.items()}}, folder / "tiny_turbo.pth")
    zero = {name: torch.zeros_like(t) if "proj_l" in name else t for name, t in state.items()}
    torch.save(zero, folder / "tiny_turbo_zero.pth")
    quantised = {"blocks.0.self_attn.q.int8_weight": torch.zeros(4, 4, dtype=torch.int8)}
    torch.save(quantised, folder / "tiny_turbo-quant.pth")
    return folder


def few_sigmas(prompt, model):
    if "ManualSigmas" in prompt.nodes:
        return prompt.add("ManualSigmas", sigmas=SIGMAS)
    return prompt.add("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0)


@pytest.fixture(autouse=True)
def known_nodes(comfy, new_prompt, monkeypatch):
    monkeypatch.setattr(new_prompt, "nodes", comfy.server.get("/object_info"), raising=False)


def sample(prompt, model):
    """As TurboDiffusion samples: lcm, cfg 1, a few sigmas."""
    positive, negative = (prompt.add("SLA2TestConditioning", number=n, image=False, label="turbo") for n in (1, 2))
    latent = prompt.add("EmptyHunyuanLatentVideo", width=256, height=256, length=9, batch_size=1)
    sampler = prompt.add("KSamplerSelect", sampler_name="lcm")
    sigmas = few_sigmas(prompt, model)
    return prompt.add(
        "SamplerCustom",
        model=model,
        add_noise=True,
        noise_seed=3,
        cfg=1.0,
        positive=positive,
        negative=negative,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
    )


def run(comfy, prompt, model, weights=None, **changes):
    patched = prompt.apply(model, **(changes | ({"sla_weights": weights} if weights else {})))
    samples = sample(prompt, patched)
    report, saved = prompt.report(patched, samples), prompt.save(samples)
    outputs = comfy.run(prompt)
    return comfy.report(outputs, report), comfy.latent(outputs, saved)


def load(prompt, name):
    node = prompt.add("SLA2LoadSLAModel", model_name=name)[0]
    return [node, 0], [node, 1]


def test_a_checkpoint_runs_as_sla_and_its_weights_matter(comfy, new_prompt, files):
    found, trained = run(comfy, prompt := new_prompt(), *load(prompt, "tiny_turbo.pth"))
    assert found["sparse_calls"] == STEPS * LAYERS and found["dense_calls"] == 0
    assert found["method"] == "SLA version 1, weights of tiny_turbo.pth"
    _, zero = run(comfy, prompt := new_prompt(), *load(prompt, "tiny_turbo_zero.pth"))
    _, top_k = run(comfy, prompt := new_prompt(), load(prompt, "tiny_turbo.pth")[0], method="top-k only")
    assert torch.isfinite(trained).all()
    # with proj_l = 0 SLA is its sparse branch
    assert (zero - top_k).norm() / top_k.norm() < 1e-5
    assert (trained - top_k).norm() / top_k.norm() > 1e-3


def test_top_k_only_at_sparsity_0_is_the_dense_model(comfy, prompt, files):
    model, _ = load(prompt, "tiny_turbo.pth")
    plain = prompt.save(sample(prompt, model))
    patched = prompt.apply(model, method="top-k only", sparsity=0.0)
    saved = prompt.save(sample(prompt, patched))
    outputs = comfy.run(prompt)
    dense, exact = comfy.latent(outputs, plain), comfy.latent(outputs, saved)
    assert (exact - dense).norm() / dense.norm() < 1e-5


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tiny_wan.safetensors", "tiny_wan.safetensors holds no SLA weights"),
        ("tiny_turbo-quant.pth", "is one of TurboDiffusion's quantised files: load the one without -quant"),
    ],
)
def test_other_files_are_refused_in_one_sentence(comfy, prompt, files, name, sentence):
    model, weights = load(prompt, name)
    prompt.save(sample(prompt, prompt.apply(model, sla_weights=weights)))
    node, message = comfy.error(prompt)
    assert node == model[0] and sentence in message


def test_weights_of_another_model_are_refused(comfy, prompt, files):
    _, weights = load(prompt, "tiny_turbo.pth")
    other = prompt.model("tiny_vace.safetensors")
    patched = prompt.apply(other, sla_weights=weights)
    prompt.save(prompt.sample(patched))
    node, message = comfy.error(prompt)
    assert node == patched[0] and "have 3 layers of head_dim 128, and this model has 4 of head_dim 128" in message


def test_a_schedule_and_a_preset_reach_the_run(comfy, prompt):
    model = prompt.model()
    patched = prompt.apply(model, schedule="0%-30%: dense; layers 1: 0.5", preset="custom")
    preset = prompt.apply(model, preset="balanced")
    held = [prompt.apply(model, preset="constant quality", **own) for own in ({}, {"target_error": 0.2})]
    runs = [(node, prompt.sample(node, steps=4)) for node in (patched, preset, *held)]
    reports = [prompt.report(*run) for run in runs]
    outputs = comfy.run(prompt)
    ruled, preset, *held = (comfy.report(outputs, report) for report in reports)
    dense = [sum(row["dense"].values()) for row in ruled["layers"]]
    assert dense[0] == dense[2] == 2 and dense[1] == 0  # steps at 0% and 25%
    assert [row["sparsity"] for row in ruled["layers"]] == pytest.approx([0.75, 0.5, 0.75])
    assert preset["sparsity_setting"] == 0.9 and preset["dense_calls"] == LAYERS
    assert any('the preset "balanced" was measured on the miniature alone' in note for note in preset["notes"])
    assert [report["target_error"]["error"] for report in held] == [0.12, 0.2]
    assert any('"constant quality" was measured on the miniature alone (20 steps' in note for note in held[0]["notes"])
