"""SLA2 Train LoRA in a real ComfyUI: what it makes, what it leaves alone, and how it ends where it cannot go on."""

import json
import re
import shutil
from collections import Counter

import pytest
import safetensors.torch
import torch
from tiny_wan import wan_state_dict
from training_events import queue_until

from sla2_kernels.weights import RouterLayer, RouterWeights, load_router
from tooling.server import PromptFailed

pytestmark = pytest.mark.comfyui

LAYERS = 3
SPARSITY = 0.6
# 128 x 128 x 9 makes 3 x 8 x 8 = 192 tokens: of 3 key blocks 2 are left to the linear branch
TRAIN = {
    "seed": 5, "steps": 2, "cfg": 6.0, "sampler_name": "euler", "scheduler": "simple", "sparsity": SPARSITY,
    "bit_width": "16bit", "loss": "match the dense model", "videos": 1, "rank": 4, "training_steps": 2, "batch_size": 1,
    "learning_rate": 0.001,
}  # fmt: skip
FLOW, MIXED = "flow matching on latents", "both, by noise level"
STEPS = "match the dense model step by step"
LINEAR = [f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"] + ["ffn.0", "ffn.2"]


def train(prompt, model, size=128, label="", **changes):
    """Adds the node with conditioning and an empty latent; the link to its LoRA."""
    positive, negative = (prompt.add("SLA2TestConditioning", number=n, image=False, label=label) for n in (1, 2))
    latent = prompt.add("EmptyHunyuanLatentVideo", width=size, height=size, length=9, batch_size=1)
    links = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    return prompt.add("SLA2TrainLora", **links | TRAIN | changes)


def train_and_save(prompt, model, prefix, **changes):
    node = train(prompt, model, **changes)
    prompt.add("SaveLoRA", lora=node, prefix=f"loras/{prefix}")
    prompt.add("SLA2SaveRouter", router=[node[0], 1], filename_prefix=prefix)
    return node[0]


def files(comfy, prefix=""):
    """What lies in the folders of LoRAs and routers, however unfinished."""
    folders = [comfy.base / name for name in ("models/loras", "output/loras", "models/sla2")]
    return sorted(path for folder in folders if folder.is_dir() for path in folder.glob(f"{prefix}*"))


def lora_path(comfy, prefix):
    (path,) = (path for path in files(comfy, prefix) if path.parent.name == "loras")
    return path


def lora(comfy, prefix):
    return safetensors.torch.load_file(lora_path(comfy, prefix))


def same(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


@pytest.fixture(scope="module", autouse=True)
def new_enough(comfy):
    comfy.skip_before(0, 25, "SLA2 Train LoRA")


def errors(text):
    """(before, after) of a report."""
    return tuple(map(float, re.search(r"([\d.e-]+) before, ([\d.e-]+) after", text).groups()))


@pytest.fixture(scope="module")
def trained(comfy, new_prompt):
    """A LoRA and a router, made from a router file and saved as "taught"; the node's report."""
    prompt = new_prompt()
    model = prompt.model()
    before = prompt.save(prompt.sample(model, size=128))
    router = prompt.add("SLA2LoadRouter", router_name="good.safetensors")
    node = train_and_save(prompt, model, "taught", router=router, training_steps=12, learning_rate=0.0002)
    # another label: ComfyUI samples again instead of serving the latent from its cache
    after = prompt.save(prompt.sample(model, size=128, label="again"))
    outputs = comfy.run(prompt)
    assert (comfy.latent(outputs, before) == comfy.latent(outputs, after)).all(), "the user's model stays as it is"
    return outputs[node]


def test_the_error_falls_and_the_calls_ran_sparse(trained):
    before, after = errors(trained["text"][0])
    assert 0 < after < before
    # per layer: 4 calls measure before, 4 after, and 12 steps take a call each; the backward pass repeats that one
    assert f"{LAYERS * (4 + 4 + 12)} attention calls ran sparse" in trained["text"][0]
    assert "ran dense" not in trained["text"][0] and len(trained["images"]) == 1


def test_gradients_came_through_the_sparse_attention(comfy, trained):
    state = lora(comfy, "taught")
    layers = [f"diffusion_model.blocks.{n}.{name}" for n in range(LAYERS) for name in LINEAR]
    assert state.keys() == {
        f"{layer}.{part}" for layer in layers for part in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    # lora_up starts at 0; q and k act on nothing but the attention
    assert all(state[f"{layer}.lora_up.weight"].abs().max() > 0 for layer in layers)
    start, end = (
        load_router(comfy.base / "models/sla2" / name) for name in ("good.safetensors", "taught_00001_.safetensors")
    )
    for number in range(LAYERS):
        assert (start.layers[number].proj_q == end.layers[number].proj_q).all()
        assert (start.ratio(number, SPARSITY) != end.ratio(number, SPARSITY)).any()


def test_comfyuis_loader_takes_the_lora_with_its_router(comfy, new_prompt, trained):
    prompt = new_prompt()
    router = prompt.add("SLA2LoadRouter", router_name="taught_00001_.safetensors")
    models = [prompt.model()]
    for strength in (0.0, 1.0):
        models.append(
            prompt.add(
                "LoraLoaderModelOnly",
                model=models[0],
                lora_name=lora_path(comfy, "taught").name,
                strength_model=strength,
            )
        )
    patched = [prompt.apply(model, router=router, sparsity=SPARSITY) for model in models]
    samples = [prompt.sample(model, size=128) for model in patched]
    saved, report = [prompt.save(sample) for sample in samples], prompt.report(patched[2], samples[2])
    outputs = comfy.run(prompt)
    none, zero, one = (comfy.latent(outputs, node) for node in saved)
    assert (none == zero).all() and (none != one).any()
    found = comfy.report(outputs, report)
    assert found["sparse_calls"] == 3 * LAYERS and found["ratio"] == "learned"


def test_a_seed_decides_the_files_and_a_lora_is_gone_on_from(comfy, new_prompt, trained):
    prompt = new_prompt()
    model = prompt.model()
    videos = prompt.sample(model, size=128, steps=2)
    for prefix, seed in (("once", 5), ("twice", 5), ("other", 6)):
        train_and_save(prompt, model, prefix, latents=videos, seed=seed, label=prefix)
    train_and_save(
        prompt,
        model,
        "further",
        latents=videos,
        resume_lora=lora_path(comfy, "taught").name,
        training_steps=1,
        learning_rate=1e-7,
    )
    comfy.run(prompt)
    once, twice, other = (lora(comfy, prefix) for prefix in ("once", "twice", "other"))
    assert same(once, twice) and not same(once, other)
    for name, tensor in lora(comfy, "further").items():
        assert (tensor - lora(comfy, "taught")[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize(("loss", "name", "rate"), [(FLOW, "flow", 0.01), (MIXED, "mixed", 0.002)])
def test_videos_of_the_users_own_train_by_flow_matching_too(comfy, prompt, loss, name, rate):
    """With a router whose own training was cancelled before it met every layer."""
    learned = torch.tensor([[[2.0], [-1.0]]])
    layers = (RouterLayer(), RouterLayer(alpha_logits=learned), RouterLayer())
    path = comfy.base / "models/sla2/met_one_layer.safetensors"
    RouterWeights(layers, "wan", 2, 128, sparsities=(0.9,)).save(path)
    model, router = prompt.model(), prompt.add("SLA2LoadRouter", router_name=path.name)
    node = train_and_save(
        prompt,
        model,
        name,
        loss=loss,
        router=router,
        latents=prompt.sample(model, size=128, steps=2),
        training_steps=8,
        learning_rate=rate,
        optimizer="Muon",
    )
    text = comfy.run(prompt)[node]["text"][0]
    before, after = errors(text)
    assert 0 < after < before
    assert ("the dense model's at high noise" in text) == (loss == MIXED)
    made = load_router(comfy.base / f"models/sla2/{name}_00001_.safetensors")
    assert made.sparsities == (SPARSITY, 0.9) and all(layer.alpha_logits is not None for layer in made.layers)
    assert 0 < (made.layers[1].alpha_logits[0] - learned[0]).abs().max() < 0.5, "trained from where it was"
    torch.testing.assert_close(made.ratio(1, 0.9), torch.sigmoid(learned[0]))


@pytest.mark.parametrize(("cfg", "calls"), [(1.0, 1), (4.0, 2)])
def test_step_by_step_needs_no_videos_and_no_calls_of_its_own(comfy, prompt, cfg, calls):
    router = prompt.add("SLA2LoadRouter", router_name="good.safetensors")
    settings = {"loss": STEPS, "cfg": cfg, "steps": 3, "videos": 1000, "training_steps": 7, "learning_rate": 0.0005}
    node = train_and_save(prompt, prompt.model(), f"steps_{calls}", router=router, **settings)
    text = comfy.run(prompt)[node]["text"][0]
    before, after = errors(text)
    assert 0 < after < before and "in its own steps from new noise" in text
    # of 3 steps each is measured before and after, then 7 are trained; guidance takes the other prompt's call too
    assert f"{LAYERS * calls * (3 + 3 + 7)} attention calls ran sparse" in text


def test_step_by_step_takes_the_noise_levels_of_a_second_model(comfy, prompt):
    model = prompt.model()
    levels = prompt.add("BasicScheduler", model=model, scheduler="simple", steps=4, denoise=1.0)
    low = [prompt.add("SplitSigmas", sigmas=levels, step=2)[0], 1]
    # no router: the first sampling estimates the ratios
    settings = {"loss": STEPS, "cfg": 1.0, "sigmas": low, "latents": prompt.sample(model, size=128, steps=2)}
    node = train_and_save(prompt, model, "steps_low", training_steps=8, learning_rate=0.0005, **settings)
    text = comfy.run(prompt)[node]["text"][0]
    before, after = errors(text)
    assert 0 < after < before
    assert f"{LAYERS * (2 + 2 + 2 + 8)} attention calls ran sparse" in text


def test_step_by_step_begins_where_the_scheduler_does_and_says_what_it_did_not_reach(comfy, prompt):
    """ddim_uniform begins below 1, in a KSampler too."""
    settings = {"loss": STEPS, "cfg": 1.0, "scheduler": "ddim_uniform", "steps": 3, "training_steps": 2}
    node = train(prompt, prompt.model(), **settings)
    prompt.add("SaveLoRA", lora=node, prefix="loras/ddim")
    text = comfy.run(prompt)[node[0]]["text"][0]
    assert "trained in 2 of the 3 steps of a sampling: more training_steps reach the later ones" in text


def cancelled(comfy, prompt, steps):
    """Queues, cancels after ``steps`` optimisation steps, and waits for the end."""
    number = queue_until(comfy.server, prompt, steps)
    comfy.server.post("/interrupt", {})
    entry = comfy.server.history(number, 60)
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"


def test_cancelling_before_the_first_step_leaves_no_file(comfy, prompt):
    before = files(comfy)
    train_and_save(prompt, prompt.model(), "never", videos=1000)
    cancelled(comfy, prompt, 0)
    assert files(comfy) == before


def test_cancelling_saves_what_is_trained_in_whole_files(comfy, new_prompt):
    prompt, before = new_prompt(), files(comfy)
    train_and_save(prompt, prompt.model(), "never", training_steps=100_000)
    cancelled(comfy, prompt, 2)
    made = sorted(set(files(comfy)) - set(before))
    assert [path.name for path in made] == ["wan_lora_autosave_00001_.safetensors"] * 2
    assert [path.parent.name for path in made] == ["loras", "sla2"]
    assert load_router(made[1]).layers[0].alpha_logits is not None

    prompt = new_prompt()
    router = prompt.add("SLA2LoadRouter", router_name=made[1].name)
    train_and_save(prompt, prompt.model(), "lora_went_on", resume_lora=made[0].name, router=router, training_steps=1)
    comfy.run(prompt)
    assert Counter(path.parent.name for path in files(comfy, "lora_went_on")) == {"loras": 1, "sla2": 1}


def unknown_model(comfy, prompt):
    # a file that no other test loads: the helper node changes the class of what is loaded
    folder = comfy.base / "models/diffusion_models"
    shutil.copy(folder / "tiny_wan.safetensors", folder / "tiny_without_lora.safetensors")
    return {"model": prompt.add("SLA2TestUnknownModel", model=prompt.model("tiny_without_lora.safetensors"))}


def two_prompts_for_three_videos(comfy, prompt):
    one, two = (prompt.add("SLA2TestConditioning", number=n, image=False, label="") for n in (1, 2))
    videos = prompt.add("EmptyHunyuanLatentVideo", width=128, height=128, length=9, batch_size=3)
    return {"positive": prompt.add("ConditioningCombine", conditioning_1=one, conditioning_2=two), "latents": videos}


def video_and_sound(comfy, prompt):
    parts = [prompt.add("EmptyHunyuanLatentVideo", width=128, height=128, length=9, batch_size=1) for _ in range(2)]
    video, sound = parts
    return {"loss": FLOW, "latents": prompt.add("LTXVConcatAVLatent", video_latent=video, audio_latent=sound)}


def model_of_nan(comfy, prompt):
    state = {name: tensor.to(torch.bfloat16) for name, tensor in wan_state_dict().items()}
    state["head.head.bias"].fill_(torch.nan)
    safetensors.torch.save_file(state, comfy.base / "models/diffusion_models/tiny_nan.safetensors")
    return {"model": prompt.model("tiny_nan.safetensors")}


def for_half(prompt):
    text = prompt.add("SLA2TestConditioning", number=1, image=False, label="")
    return prompt.add("ConditioningSetTimestepRange", conditioning=text, start=0.0, end=0.5)


def second_half(comfy, prompt):
    levels = prompt.add("BasicScheduler", model=prompt.model(), scheduler="simple", steps=4, denoise=1.0)
    return {"loss": STEPS, "sigmas": [prompt.add("SplitSigmas", sigmas=levels, step=2)[0], 1]}


def second_half_of_nothing(comfy, prompt):
    return second_half(comfy, prompt) | {
        "latents": prompt.add("EmptyHunyuanLatentVideo", width=128, height=128, length=9, batch_size=1)
    }


def no_noise_levels(comfy, prompt):
    # a scheduler with denoise 0 makes none
    levels = prompt.add("BasicScheduler", model=prompt.model(), scheduler="simple", steps=4, denoise=0.0)
    return {"loss": STEPS, "sigmas": levels}


def damaged_lora(comfy, _):
    (comfy.base / "models/loras").mkdir(exist_ok=True)
    (comfy.base / "models/loras/damaged.safetensors").write_bytes(b"junk")
    return {"resume_lora": "damaged.safetensors"}


WRONG = {
    "another model's router": (
        lambda _, prompt: {"router": prompt.add("SLA2LoadRouter", router_name="other_layers.safetensors")},
        "number of layers is 4, this model's is 3",
    ),
    "a family nobody knows": (unknown_model, "SLA2 Train LoRA: model family UnknownModel is not supported yet"),
    "a loader that cannot be repeated": (
        lambda _, prompt: {"model": prompt.add("SLA2TestQuantisedLoader", name="tiny_wan.safetensors")},
        "this MODEL comes from a loader that ComfyUI cannot repeat",
    ),
    "images": (
        lambda _, prompt: {"latents": prompt.add("EmptyLatentImage", width=128, height=128, batch_size=1)},
        "latents must be videos of this model's VAE, (videos, 16, frames, height, width), and these are (1, 4, 16, 16)",
    ),
    "a prompt for the first half": (
        lambda _, prompt: {"positive": for_half(prompt)},
        "positive holds a prompt for a part of the sampling",
    ),
    "a negative prompt for the first half": (
        lambda _, prompt: {"negative": for_half(prompt)},
        "negative holds a prompt for a part of the sampling",
    ),
    "sound beside the video": (video_and_sound, "models that make sound along with the video cannot be trained yet"),
    "prompts": (two_prompts_for_three_videos, "3 latents need as many prompts or a single one, and positive has 2"),
    "a model that makes NaN": (model_of_nan, "the model's own output holds NaN before anything is trained"),
    "too short": (
        lambda *_: {"size": 64},
        "nothing could be trained: the video is so short (48 tokens) that sparsity 0.6 keeps all",
    ),
    "the second half of a schedule without videos": (second_half, "where another model ends: connect latents"),
    "an empty latent": (second_half_of_nothing, "latents are an empty latent, which holds no video"),
    "a scheduler without noise levels": (
        lambda *_: {"loss": STEPS, "scheduler": "kl_optimal", "steps": 1},
        "with steps 1, scheduler kl_optimal makes noise levels that do not fall from step to step, nan, 0: choose another",
    ),
    "no noise levels": (no_noise_levels, "sigmas must be a list of two noise levels or more"),
    "a damaged LoRA": (damaged_lora, "cannot go on from damaged.safetensors: the file cannot be read"),
    "another rank": (
        lambda comfy, _: {"resume_lora": "wan_lora_autosave_00001_.safetensors", "rank": 3},
        "the file has shape (256, 4), and this training shape (256, 3) (rank 3)",
    ),
}


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (FLOW, f'"{FLOW}" needs videos of yours: connect latents'),
        (MIXED, f'"{MIXED}" needs videos'),
        ("x", "loss must be one of"),
    ],
)
def test_a_loss_without_its_videos_is_refused_before_anything_runs(comfy, prompt, loss, words):
    train_and_save(prompt, prompt.model(), "wrong", loss=loss)
    with pytest.raises(PromptFailed) as refused:
        comfy.server.queue(prompt)
    assert words in json.loads(json.dumps(str(refused.value))).replace('\\"', '"')


@pytest.mark.parametrize("loss", ["match the dense model", MIXED])
def test_noise_levels_that_a_loss_does_not_take_are_refused_before_anything_runs(comfy, prompt, loss):
    train_and_save(prompt, prompt.model(), "wrong", **second_half_of_nothing(comfy, prompt) | {"loss": loss})
    with pytest.raises(PromptFailed) as refused:
        comfy.server.queue(prompt)
    assert f'sigmas are only for "{STEPS}": choose it as loss, or disconnect' in str(refused.value).replace('\\"', '"')


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_sentence(comfy, prompt, name):
    change, words = WRONG[name]
    changes = change(comfy, prompt)
    before = files(comfy)
    node = train_and_save(prompt, changes.pop("model", None) or prompt.model(), "wrong", **changes)
    where, message = comfy.error(prompt)
    assert where == node and words in message
    assert files(comfy) == before
