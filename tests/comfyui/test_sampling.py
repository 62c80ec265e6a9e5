"""The main job in a real ComfyUI: patched models sample through SLA2, others are untouched, and the report tells which."""

import pytest
import torch
from tiny_wan import save_wan

STEPS, LAYERS = 3, 3
ALL = STEPS * LAYERS


def sampled(comfy, prompt, model, patched, **sampling):
    """(report, latent) of one sampling of ``patched``."""
    samples = prompt.sample(patched, **sampling)
    report, saved = prompt.report(patched, samples), prompt.save(samples)
    outputs = comfy.run(prompt)
    return comfy.report(outputs, report), comfy.latent(outputs, saved)


def test_plain_before_and_after_is_bitwise_equal_and_every_self_attention_call_is_sparse(comfy, prompt):
    model = prompt.model()
    patched = prompt.apply(model)
    plain_before, sparse = prompt.save(prompt.sample(model)), prompt.sample(patched)
    plain_after = prompt.save(prompt.sample(model, label="again"))
    report, saved = prompt.report(patched, sparse), prompt.save(sparse)
    outputs = comfy.run(prompt)

    before, after = comfy.latent(outputs, plain_before), comfy.latent(outputs, plain_after)
    assert torch.equal(before, after)
    assert not torch.equal(before, comfy.latent(outputs, saved))
    found = comfy.report(outputs, report)
    assert found["model_calls"] == STEPS
    assert [row["layer"] for row in found["layers"]] == list(range(LAYERS))
    assert all(row["sparse"] == STEPS and row["dense"] == {} for row in found["layers"])
    assert found["dense_calls"] == 0 and found["sparse_calls"] == ALL
    assert found["other_calls"] == ALL  # one cross-attention per block, passed through
    assert all(row["sparsity"] == pytest.approx(0.75) for row in found["layers"])
    assert all(0 < row["ratio_range"][0] <= row["ratio_range"][1] <= 1 for row in found["layers"])
    assert found["notes"] == [] and found["caveat"] is None
    assert f"{ALL} of {ALL} self-attention calls ran sparse (skips 75%, keeps 25%)" in outputs[report]["text"][0]


def test_sparsity_0_at_16bit_equals_dense_to_rounding(comfy, prompt):
    model = prompt.model()
    plain = prompt.save(prompt.sample(model))
    patched = prompt.apply(model, sparsity=0.0)
    samples = prompt.sample(patched)
    report, saved = prompt.report(patched, samples), prompt.save(samples)
    outputs = comfy.run(prompt)
    dense, sparse = comfy.latent(outputs, plain), comfy.latent(outputs, saved)
    assert comfy.report(outputs, report)["sparse_calls"] == ALL
    assert (sparse - dense).norm() / dense.norm() < 1e-5


def test_cross_attention_with_as_many_keys_as_video_tokens_stays_dense(comfy, prompt):
    model = prompt.model()
    # 2 x 16 x 16 = 512 tokens, as many as the text has
    found, _ = sampled(comfy, prompt, model, prompt.apply(model), frames=5)
    assert found["sparse_calls"] == ALL and found["other_calls"] == ALL


def test_image_to_video_passes_both_cross_attentions(comfy, prompt):
    model = prompt.model("tiny_wan_i2v.safetensors")
    found, _ = sampled(comfy, prompt, model, prompt.apply(model), image=True)
    assert found["sparse_calls"] == ALL and found["dense_calls"] == 0 and found["other_calls"] == 2 * ALL


def test_int8_on_a_cpu_runs_and_says_so(comfy, prompt):
    model = prompt.model()
    found, latent = sampled(comfy, prompt, model, prompt.apply(model, bit_width="int8"))
    assert found["bit_widths"] == ["int8"] and found["sparse_calls"] == ALL
    assert torch.isfinite(latent).all()


def test_settings_that_keep_calls_dense_are_counted_by_reason(comfy, prompt):
    model = prompt.model()
    patched = prompt.apply(model, dense_layers="0, -1", start_percent=0.5)
    found, _ = sampled(comfy, prompt, model, patched, steps=4)
    dense = [row["dense"] for row in found["layers"]]
    assert dense[0] == dense[2] == {"dense_layers keeps this layer dense": 4}
    early = dense[1]["the step lies outside start_percent to end_percent"]
    assert 1 <= early <= 3 and found["layers"][1]["sparse"] == 4 - early


def test_a_target_error_chooses_the_sparsity_step_by_step(comfy, prompt):
    model = prompt.model()
    patched = [prompt.apply(model, target_error=target, bit_width="16bit") for target in (0.3, 1e-6)]
    found, _ = sampled(comfy, prompt, model, patched[0], steps=4)
    target = found["target_error"]
    low, high = target["sparsities"]
    assert target["error"] == 0.3 and 0.5 <= low < high <= 0.996 and not target["is_out_of_reach"]
    assert found["sparse_calls"] == 4 * LAYERS and 0 < found["attention_error"] < 0.3
    assert found["ratio"] == "fitted (target_error measures with it)"
    found, _ = sampled(comfy, prompt, model, patched[1], steps=4)
    assert found["target_error"]["is_out_of_reach"] and found["dense_calls"] == 3 * LAYERS


def test_short_sequences_run_dense_and_equal_the_plain_model(comfy, prompt):
    model = prompt.model()
    plain = prompt.save(prompt.sample(model))
    patched = prompt.apply(model, minimum_tokens=-1)
    samples = prompt.sample(patched)
    report, saved = prompt.report(patched, samples), prompt.save(samples)
    outputs = comfy.run(prompt)
    assert torch.equal(comfy.latent(outputs, plain), comfy.latent(outputs, saved))
    found = comfy.report(outputs, report)
    assert found["sparse_calls"] == 0 and found["dense_calls"] == ALL
    assert found["layers"][0]["dense"] == {"the sequence has 768 tokens, minimum_tokens is 8192": STEPS}


def test_two_samplers_on_one_patched_model_have_a_report_each(comfy, prompt):
    patched = prompt.apply(prompt.model())
    first, second = prompt.sample(patched, steps=2, seed=21), prompt.sample(patched, steps=4, seed=22)
    # what was made of a latent is known by the nodes that it came through, as an IMAGE is
    made = [prompt.add("LatentMultiply", samples=samples, multiplier=1.5) for samples in (first, second)]
    blended = prompt.add("LatentAdd", samples1=made[0], samples2=made[1])
    reports = [prompt.report(patched, samples) for samples in (first, second, *made, blended)]
    outputs = comfy.run(prompt)
    found = [comfy.report(outputs, report) for report in reports]
    assert [report["model_calls"] for report in found[:4]] == [2, 4, 2, 4]
    assert [report["sparse_calls"] for report in found[:2]] == [2 * LAYERS, 4 * LAYERS]
    assert [report["caveat"] for report in found[:2]] == [None, None]
    again = comfy.run(prompt)
    found = [comfy.report(again, report) for report in reports]
    assert [report["model_calls"] for report in found[:4]] == [2, 4, 2, 4]
    for report, words in zip(found[2:], ("from the cache", "from the cache", "2 runs of this model"), strict=True):
        assert "not the direct result" in report["caveat"] and words in report["caveat"]


def test_a_cached_sampler_is_reported_with_its_own_run(comfy, prompt):
    patched = prompt.apply(prompt.model(), sparsity=0.5)
    samples = prompt.sample(patched, steps=2, seed=31)
    report = prompt.report(patched, samples)
    first = comfy.report(comfy.run(prompt), report)
    prompt[samples[0]]["inputs"].update(seed=32, steps=4)
    second = comfy.report(comfy.run(prompt), report)
    third = comfy.report(comfy.run(prompt), report)
    assert [first["model_calls"], second["model_calls"], third["model_calls"]] == [2, 4, 4]
    assert second["run"] == third["run"] == first["run"] + 1
    assert first["caveat"] is None and second["caveat"] is None
    assert "came from the cache" in third["caveat"]


def test_a_preset_of_few_steps_keeps_the_first_of_two_plus_two_dense(comfy, prompt):
    patched = prompt.apply(prompt.model(), preset="balanced, 4-8 steps")
    inputs = prompt[prompt.sample(patched, steps=4)[0]]["inputs"]
    inputs["noise_seed"] = inputs.pop("seed")
    del inputs["denoise"]
    halves, latent = [], inputs.pop("latent_image")
    for first, noise, left in ((0, "enable", "enable"), (2, "disable", "disable")):
        steps = {
            "start_at_step": first,
            "end_at_step": first + 2,
            "add_noise": noise,
            "return_with_leftover_noise": left,
        }
        latent = prompt.add("KSamplerAdvanced", latent_image=latent, **inputs, **steps)
        halves.append(prompt.report(patched, latent))
    del prompt[next(name for name, node in prompt.items() if node["class_type"] == "KSampler")]
    outputs = comfy.run(prompt)
    first, second = (comfy.report(outputs, half) for half in halves)
    assert (first["dense_calls"], first["sparse_calls"]) == (LAYERS, LAYERS)
    assert (second["dense_calls"], second["sparse_calls"]) == (0, 2 * LAYERS)
    assert any("goes on with what another one began" in note for note in second["notes"])


def unknown(comfy, prompt):
    """A model of a class without a row in our table; its file is no other test's."""
    path = comfy.base / "models/diffusion_models/tiny_unknown.safetensors"
    if not path.exists():
        save_wan(path, layers=2, seed=7)
    return prompt.add("SLA2TestUnknownModel", model=prompt.model(path.name))


def test_an_unsupported_family_is_passed_through_with_the_reason(comfy, prompt):
    model = unknown(comfy, prompt)
    plain = prompt.save(prompt.sample(model))
    patched = prompt.apply(model)
    samples = prompt.sample(patched)
    report, saved = prompt.report(patched, samples), prompt.save(samples)
    outputs = comfy.run(prompt)
    assert torch.equal(comfy.latent(outputs, plain), comfy.latent(outputs, saved))
    found = comfy.report(outputs, report)
    # a self- and a cross-attention in each of the 2 blocks
    assert found["unsupported_calls"] == {"model family UnknownModel is not supported yet": STEPS * 4}


def test_stop_refuses_an_unsupported_family_in_one_sentence(comfy, prompt):
    patched = prompt.apply(unknown(comfy, prompt), on_unsupported="stop")
    prompt.save(prompt.sample(patched))
    node, message = comfy.error(prompt)
    assert node == patched[0]
    assert "model family UnknownModel is not supported yet (on_unsupported is set to stop)." in message


def test_vace_runs_its_control_blocks_sparse_too(comfy, prompt):
    model = prompt.model("tiny_vace.safetensors")
    found, latent = sampled(comfy, prompt, model, prompt.apply(model))
    assert found["sparse_calls"] == STEPS * 4 and found["dense_calls"] == 0 and found["other_calls"] == STEPS * 4
    assert torch.isfinite(latent).all()


# what no model can have is refused as the prompt is queued: test_early_checks.py
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dense_layers": "0, 3"}, "dense_layers names layer 3, but this model has layers 0 to 2."),
        ({"target_error": 0.1, "ratio_mode": "fixed"}, "target_error needs calls that measure their error"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_sentence(comfy, prompt, changes, sentence):
    patched = prompt.apply(prompt.model(), **changes)
    prompt.save(prompt.sample(patched))
    node, message = comfy.error(prompt)
    assert node == patched[0] and sentence in message


def test_a_report_without_sla2_says_so(comfy, prompt):
    model = prompt.model()
    report = prompt.report(model, prompt.sample(model))
    assert "did not come through SLA2 Apply Attention" in comfy.run(prompt)[report]["text"][0]
