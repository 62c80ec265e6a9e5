"""SLA2 with what people combine it with: LoRAs, quantised weights, caches, batches, context windows, compiled models."""

import pytest
import safetensors.torch
import torch
from tiny_wan import DIM, LAYERS

STEPS = 3
ALL = STEPS * LAYERS
# ComfyUI's own choice on a CPU
ALONE = "SLA2; its dense calls run in PyTorch's scaled_dot_product_attention"


def sample(prompt, model, width=256, height=256, frames=9, batch=1, longer=0, seed=5, steps=STEPS, label=""):
    """longer: how many more times the positive text is appended to itself."""
    positive, negative = (prompt.add("SLA2TestConditioning", number=n, image=False, label=label) for n in (1, 2))
    text = positive
    for _ in range(longer):
        text = prompt.add("ConditioningConcat", conditioning_to=text, conditioning_from=positive)
    latent = prompt.add("EmptyHunyuanLatentVideo", width=width, height=height, length=frames, batch_size=batch)
    return prompt.add(
        "KSampler",
        model=model,
        positive=text,
        negative=negative,
        latent_image=latent,
        denoise=1.0,
        seed=seed,
        steps=steps,
        cfg=6.0,
        sampler_name="euler",
        scheduler="simple",
    )


def run(comfy, prompt, patched, **sampling):
    """(report, latent) of one sampling."""
    samples = sample(prompt, patched, **sampling)
    report, saved = prompt.report(patched, samples), prompt.save(samples)
    outputs = comfy.run(prompt)
    return comfy.report(outputs, report), comfy.latent(outputs, saved)


def dense(comfy, prompt, model, **sampling):
    saved = prompt.save(sample(prompt, model, **sampling))
    return comfy.latent(comfy.run(prompt), saved)


def gap(latent, other):
    return ((latent - other).norm() / other.norm()).item()


def known(comfy, node):
    return node in comfy.server.get("/object_info")


def lora(prompt, model):
    return prompt.add("LoraLoaderModelOnly", model=model, lora_name="tiny_lora.safetensors", strength_model=1.0)


@pytest.fixture(scope="module")
def lora_file(comfy):
    folder = comfy.base / "models/loras"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(LAYERS):
        for name in "qkvo":
            key = f"diffusion_model.blocks.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, DIM, generator=generator) / 16
            tensors[f"{key}.lora_B.weight"] = torch.randn(DIM, 4, generator=generator) / 2
    safetensors.torch.save_file(tensors, folder / "tiny_lora.safetensors")
    comfy.server.get("/object_info/LoraLoaderModelOnly")


def test_a_lora_before_and_after_is_the_same_and_both_count(comfy, new_prompt, lora_file):
    _, without = run(comfy, p := new_prompt(), p.apply(p.model()))
    before, first = run(comfy, p := new_prompt(), p.apply(lora(p, p.model())))
    after, second = run(comfy, p := new_prompt(), lora(p, p.apply(p.model())))
    assert before["sparse_calls"] == after["sparse_calls"] == ALL
    assert torch.equal(first, second) and gap(first, without) > 1e-3
    assert before["stack"] == after["stack"] == {"attention": ALONE, "also": [f"LoRA on {4 * LAYERS} weights"]}


def fp8(prompt):
    return prompt.add("UNETLoader", unet_name="tiny_wan.safetensors", weight_dtype="fp8_e4m3fn")


def packed(prompt):
    return prompt.add("SLA2TestQuantisedLoader", name="tiny_wan.safetensors")


@pytest.mark.parametrize("load", [fp8, packed])
def test_quantised_weights(comfy, new_prompt, load):
    plain = dense(comfy, p := new_prompt(), load(p))
    found, exact = run(comfy, p := new_prompt(), p.apply(load(p), sparsity=0.0))
    assert found["sparse_calls"] == ALL and gap(exact, plain) < 1e-5
    found, sparse = run(comfy, p := new_prompt(), p.apply(load(p)))
    assert found["sparse_calls"] == ALL and 1e-4 < gap(sparse, plain)
    assert torch.isfinite(sparse).all()


@pytest.mark.parametrize("order", ["cache after", "cache before"])
def test_easycache_skips_whole_model_calls(comfy, prompt, order):
    def cached(model):
        return prompt.add(
            "EasyCache", model=model, reuse_threshold=3.0, start_percent=0.2, end_percent=0.95, verbose=False
        )

    model = prompt.model()
    patched = cached(prompt.apply(model)) if order == "cache after" else prompt.apply(cached(model))
    found, latent = run(comfy, prompt, patched, steps=8)
    computed = found["model_calls"] - found["answered_calls"]
    assert found["dense_calls"] == 0 and found["sparse_calls"] == LAYERS * computed
    assert 0 < computed < 8 and found["model_calls"] == 8
    assert found["stack"] == {"attention": ALONE, "also": ["EasyCache"]}
    assert torch.isfinite(latent).all()


def test_a_batch_of_two_videos_is_each_of_them(comfy, new_prompt):
    plain = dense(comfy, p := new_prompt(), p.model(), batch=2)
    found, exact = run(comfy, p := new_prompt(), p.apply(p.model(), sparsity=0.0), batch=2)
    assert exact.shape[0] == 2 and found["sparse_calls"] == ALL and gap(exact, plain) < 1e-5
    _, sparse = run(comfy, p := new_prompt(), p.apply(p.model()), batch=2)
    assert not torch.equal(sparse[0], sparse[1])


def test_cond_and_uncond_in_separate_model_calls(comfy, new_prompt):
    # texts whose lengths differ too much to share a batch
    found, sparse = run(comfy, p := new_prompt(), p.apply(p.model(), sparsity=0.0), longer=4)
    assert found["model_calls"] == 2 * STEPS and found["sparse_calls"] == 2 * ALL and found["dense_calls"] == 0
    plain = dense(comfy, p := new_prompt(), p.model(), longer=4)
    assert gap(sparse, plain) < 1e-5


def test_unloading_between_prompts_changes_nothing(comfy, new_prompt):
    _, first = run(comfy, p := new_prompt(), p.apply(p.model()), seed=61)
    comfy.server.post("/free", {"unload_models": True, "free_memory": True})
    dense(comfy, p := new_prompt(), p.model("tiny_vace.safetensors"), seed=62)
    found, again = run(comfy, p := new_prompt(), p.apply(p.model()), seed=61, label="")
    assert found["sparse_calls"] == ALL and torch.equal(first, again)


def test_two_patched_models_in_one_prompt_have_their_own_settings(comfy, prompt):
    model = prompt.model()
    low, high = prompt.apply(model, sparsity=0.25), prompt.apply(model, sparsity=0.75, dense_layers="0")
    other = prompt.apply(prompt.model("tiny_vace.safetensors"), sparsity=0.5)
    models = [low, high, other, low]
    samples = [sample(prompt, patched, seed=70 + number) for number, patched in enumerate(models)]
    reports = [prompt.report(patched, made) for patched, made in zip(models, samples, strict=True)]
    outputs = comfy.run(prompt)
    found = [comfy.report(outputs, report) for report in reports]
    assert [report["sparsity_setting"] for report in found] == [0.25, 0.75, 0.5, 0.25]
    assert [report["sparse_calls"] for report in found] == [ALL, ALL - STEPS, STEPS * 4, ALL]
    assert [report["layers"][1]["sparsity"] for report in found] == pytest.approx([0.25, 0.75, 0.5, 0.25])


def test_context_windows_change_the_token_count_within_a_run(comfy, new_prompt):
    def windows(prompt, model):
        # 6 latent frames in windows of 4, the last of them shifted
        spec = comfy.server.get("/object_info/WanContextWindowsManual")["WanContextWindowsManual"]["input"]["required"]
        more = {"retain_first_frame": False, "split_conds_to_windows": False}
        more = {name: value for name, value in more.items() if name in spec}
        return prompt.add(
            "WanContextWindowsManual",
            model=model,
            context_length=13,
            context_overlap=4,
            context_schedule="standard_static",
            context_stride=1,
            closed_loop=False,
            fuse_method="pyramid",
            freenoise=False,
            **more,
        )

    if not known(comfy, "WanContextWindowsManual"):
        pytest.skip("this ComfyUI has no context windows")
    size = {"width": 128, "height": 128, "frames": 21}
    plain = dense(comfy, p := new_prompt(), windows(p, p.model()), **size)
    found, exact = run(comfy, p := new_prompt(), windows(p, p.apply(p.model(), sparsity=0.0)), **size)
    assert found["model_calls"] > STEPS and found["sparse_calls"] == LAYERS * found["model_calls"]
    assert found["dense_calls"] == 0 and gap(exact, plain) < 1e-5
    assert found["stack"] == {"attention": ALONE, "also": ["context windows"]}


def test_a_last_block_of_a_single_token(comfy, new_prompt):
    size = {"width": 304, "height": 144}  # 3 x 9 x 19 = 513 = 8 x 64 + 1 tokens
    plain = dense(comfy, p := new_prompt(), p.model(), **size)
    found, exact = run(comfy, p := new_prompt(), p.apply(p.model(), sparsity=0.0), **size)
    assert found["sparse_calls"] == ALL and gap(exact, plain) < 1e-5
    found, sparse = run(comfy, p := new_prompt(), p.apply(p.model()), **size)
    assert found["layers"][0]["sparsity"] == pytest.approx(1 - 2 * 64 / 513) and torch.isfinite(sparse).all()


def test_cores_attention_backend_before_us_runs_the_other_calls(comfy, new_prompt):
    if not known(comfy, "ModelAttentionBackend"):
        pytest.skip("this ComfyUI has no ModelAttentionBackend node")
    _, alone = run(comfy, p := new_prompt(), p.apply(p.model()))
    backend = (p := new_prompt()).add("ModelAttentionBackend", model=p.model(), attention="pytorch attention")
    found, latent = run(comfy, p, p.apply(backend))
    assert found["sparse_calls"] == ALL and found["other_calls"] == ALL and found["notes"] == []
    assert found["stack"] == {"attention": f"{ALONE}, which a node chose for this model", "also": []}
    assert gap(latent, alone) < 1e-5


@pytest.mark.parametrize("order", ["ours last", "core last"])
def test_cores_sparse_attention_in_the_same_graph(comfy, new_prompt, order):
    """What its kernel does beside us: test_neighbour_models.py. On a CPU it never runs, but who steps aside is the same."""
    nodes = comfy.server.get("/object_info")
    name = next((name for name in ("BlockSparseAttention", "ModelSparseAttention") if name in nodes), None)
    if name is None:
        pytest.skip("this ComfyUI has no sparse attention of its own")
    defaults = {
        key: spec[1]["default"]
        for part in ("required", "optional")
        for key, spec in nodes[name]["input"].get(part, {}).items()
        if len(spec) > 1 and "default" in spec[1]
    } | {"selection": "sol-attn", "selection.tau": 1.3}
    p = new_prompt()
    if order == "ours last":
        patched = p.apply(p.add(name, model=p.model(), **defaults))
    else:
        patched = p.add(name, model=p.apply(p.model()), **defaults)
    found, latent = run(comfy, p, patched)
    assert found["sparse_calls"] == (ALL if order == "ours last" else 0) and torch.isfinite(latent).all()
    assert sum("Model Sparse Attention" in note for note in found["notes"]) == 1


@pytest.mark.parametrize("order", ["compiled after", "compiled before"])
def test_a_compiled_model(comfy, new_prompt, order):
    def compiled(prompt, model):
        return prompt.add("TorchCompileModel", model=model, backend="inductor")

    # a decision per step, which a traced one would repeat
    settings = {"schedule": "0%-40%: dense"}
    _, eager = run(comfy, p := new_prompt(), p.apply(p.model(), **settings), steps=2)
    p = new_prompt()
    patched = p.apply(compiled(p, p.model()), **settings)
    if order == "compiled after":
        # first without us: its graphs, in which no layer is marked, must not be taken for ours
        dense(comfy, plain := new_prompt(), compiled(plain, plain.model()), steps=2)
        patched = compiled(p, p.apply(p.model(), **settings))
    found, latent = run(comfy, p, patched, steps=2)
    assert found["sparse_calls"] == found["dense_calls"] == LAYERS and found["other_calls"] == 2 * LAYERS
    assert found["stack"] == {"attention": ALONE, "also": ["torch.compile"]}
    assert gap(latent, eager) < 2e-2
