"""Train, save, load and apply in a real ComfyUI; cancelling keeps what was trained; wrong input is one sentence."""

import shutil
import time

import pytest
from training_events import queue_until

from sla2_kernels.weights import load_router
from tooling.server import PromptFailed

pytestmark = pytest.mark.comfyui

LAYERS = 3
TRAIN = {
    "seed": 5, "steps": 3, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple", "sparsities": "0.75, 0.5",
    "training_steps": 6, "learning_rate": 0.002, "query_blocks": 4,
}  # fmt: skip


def train(prompt, model, size=256, frames=9, **changes):
    positive, negative = (prompt.add("SLA2TestConditioning", number=n, image=False, label="") for n in (1, 2))
    latent = prompt.add("EmptyHunyuanLatentVideo", width=size, height=size, length=frames, batch_size=1)
    return prompt.add(
        "SLA2TrainRouter", model=model, positive=positive, negative=negative, latent_image=latent, **TRAIN | changes
    )


def saved(comfy, pattern):
    return sorted((comfy.base / "models/sla2").rglob(pattern))


def test_train_save_load_apply(comfy, new_prompt):
    prompt = new_prompt()
    model = prompt.model()
    before = prompt.save(prompt.sample(model))
    router = train(prompt, model)
    # another label: ComfyUI samples again instead of serving the latent from its cache
    after = prompt.save(prompt.sample(model, label="again"))
    patched = prompt.apply(model, router=router, sparsity=0.75)
    report = prompt.report(patched, prompt.sample(patched))
    prompt.add("SLA2SaveRouter", router=router, filename_prefix="made/tiny")
    outputs = comfy.run(prompt)
    found = comfy.report(outputs, report)
    assert found["sparse_calls"] == 3 * LAYERS and found["notes"] == []
    assert (comfy.latent(outputs, before) == comfy.latent(outputs, after)).all()

    shown = outputs[router[0]]
    assert "untrained / trained" in shown["text"][0] and "skips 75%" in shown["text"][0]
    assert len(shown["images"]) == 1
    (path,) = saved(comfy, "made/tiny_*")
    assert path.name == "tiny_00001_.safetensors"
    loaded = load_router(path)
    loaded.require_model(model_family="wan", num_layers=LAYERS, num_heads=2, head_dim=128)
    assert loaded.sparsities == (0.75, 0.5)
    assert all(layer.proj_q is not None and layer.alpha_logits is not None for layer in loaded.layers)

    prompt = new_prompt()
    name = prompt.add("SLA2LoadRouter", router_name="made/tiny_00001_.safetensors")
    patched = prompt.apply(prompt.model(), router=name, sparsity=0.75)
    report = prompt.report(patched, prompt.sample(patched))
    resumed = train(prompt, prompt.model(), resume=name, training_steps=2)
    prompt.add("SLA2SaveRouter", router=resumed, filename_prefix="made/tiny")
    found = comfy.report(comfy.run(prompt), report)
    assert found["sparse_calls"] == 3 * LAYERS and found["ratio"] == "learned"
    # never overwritten, and it went on from the file
    assert [p.name for p in saved(comfy, "made/tiny_*")] == ["tiny_00001_.safetensors", "tiny_00002_.safetensors"]
    moved = load_router(saved(comfy, "made/tiny_00002_*")[0]).layers[0].proj_q - loaded.layers[0].proj_q
    assert 0 < moved.abs().max() < 0.01


def test_a_model_with_sla2_on_it_trains_on_dense_attention(comfy, new_prompt):
    reports = []
    for patch in (False, True):
        prompt = new_prompt()
        model = prompt.apply(prompt.model()) if patch else prompt.model()
        router = train(prompt, model, seed=9)
        prompt.add("SLA2SaveRouter", router=router, filename_prefix="dense")
        reports.append(comfy.run(prompt)[router[0]]["text"][0])
    assert reports[0] == reports[1]


def test_cancelling_saves_what_is_trained_and_the_file_resumes(comfy, new_prompt):
    prompt = new_prompt()
    router = train(prompt, prompt.model(), training_steps=100_000)
    prompt.add("SLA2SaveRouter", router=router, filename_prefix="never")
    number = queue_until(comfy.server, prompt)
    deadline = time.monotonic() + 60
    comfy.server.post("/interrupt", {})
    while not comfy.server.get(f"/history/{number}").get(number):
        assert time.monotonic() < deadline, "the prompt was not cancelled"
        time.sleep(0.2)
    assert saved(comfy, "never*") == []
    (path,) = saved(comfy, "wan_autosave_*")
    assert load_router(path).layers[0].proj_q is not None

    prompt = new_prompt()
    name = prompt.add("SLA2LoadRouter", router_name=path.name)
    prompt.add("SLA2SaveRouter", router=train(prompt, prompt.model(), resume=name), filename_prefix="went_on")
    comfy.run(prompt)
    assert len(saved(comfy, "went_on*")) == 1


def test_a_video_of_one_block_is_one_sentence(comfy, prompt):
    router = train(prompt, prompt.model(), size=64, frames=1)
    prompt.add("SLA2SaveRouter", router=router, filename_prefix="wrong")
    node, message = comfy.error(prompt)
    assert node == router[0] and "nothing could be trained: the video has 64 tokens or less" in message


@pytest.mark.parametrize("sparsities", ["97", "a lot", "", "0.97，0.97", "97%"])
def test_sparsities_that_are_none_are_refused_before_anything_runs(comfy, prompt, sparsities):
    prompt.add("SLA2SaveRouter", router=train(prompt, prompt.model(), sparsities=sparsities), filename_prefix="wrong")
    with pytest.raises(PromptFailed, match="sparsities must be different numbers between 0 and 1"):
        comfy.server.queue(prompt)


def test_an_unknown_model_is_refused(comfy, prompt):
    # a file that no other test loads: the helper node changes the class of what is loaded
    folder = comfy.base / "models/diffusion_models"
    shutil.copy(folder / "tiny_wan.safetensors", folder / "tiny_untrainable.safetensors")
    unknown = prompt.add("SLA2TestUnknownModel", model=prompt.model("tiny_untrainable.safetensors"))
    prompt.add("SLA2SaveRouter", router=train(prompt, unknown), filename_prefix="wrong")
    assert "SLA2 Train Router: model family UnknownModel is not supported yet" in comfy.error(prompt)[1]


def test_another_models_router_is_not_resumed(comfy, prompt):
    name = prompt.add("SLA2LoadRouter", router_name="other_layers.safetensors")
    prompt.add("SLA2SaveRouter", router=train(prompt, prompt.model(), resume=name), filename_prefix="wrong")
    assert "number of layers is 4, this model's is 3" in comfy.error(prompt)[1]


def test_a_prefix_longer_than_a_file_name_is_refused_before_anything_runs(comfy, prompt):
    prompt.add("SLA2SaveRouter", router=train(prompt, prompt.model()), filename_prefix="wan/" + "长" * 70)
    with pytest.raises(PromptFailed, match="filename_prefix holds a name of 210 bytes: at most 200 are allowed"):
        comfy.server.queue(prompt)


@pytest.mark.parametrize("prefix", ["../outside", "/etc/x", "a/../../x", "..\\x", "", "a//b", "C:x", "a\x00b"])
def test_prefixes_that_lead_elsewhere_are_refused(comfy, new_prompt, prefix):
    prompt = new_prompt()
    name = prompt.add("SLA2LoadRouter", router_name="good.safetensors")
    prompt.add("SLA2SaveRouter", router=name, filename_prefix=prefix)
    before = sorted(comfy.base.rglob("*.safetensors"))
    with pytest.raises(PromptFailed, match="filename_prefix must be a name inside models/sla2"):
        comfy.server.queue(prompt)
    assert sorted(comfy.base.rglob("*.safetensors")) == before


def test_the_untrained_router_is_not_saved(comfy, prompt):
    name = prompt.add("SLA2LoadRouter", router_name="none (untrained)")
    prompt.add("SLA2SaveRouter", router=name, filename_prefix="nothing")
    assert "there is nothing to save" in comfy.error(prompt)[1]
