"""The main job in a real ComfyUI: patched models sample through SLA2, others are untouched, and the report tells which."""

import pytest
import torch

STEPS, LAYERS = 3, 3


def test_plain_before_and_after_is_bitwise_equal_and_every_self_attention_call_is_sparse(comfy, prompt):
    model = prompt.model()
    patched = prompt.apply(model)
    plain_before, sparse = prompt.save(prompt.sample(model)), prompt.sample(patched)
    plain_after = prompt.save(prompt.sample(model, label="again"))
    report, saved = prompt.report(patched, sparse), prompt.save(sparse)
    again = prompt.save(prompt.sample(model, seed=6))
    outputs = comfy.run(prompt)

    before, after = comfy.latent(outputs, plain_before), comfy.latent(outputs, plain_after)
    assert torch.equal(before, after)
    assert not torch.equal(before, comfy.latent(outputs, saved))
    assert not torch.equal(before, comfy.latent(outputs, again))
    found = comfy.report(outputs, report)
    assert found["model_calls"] == STEPS
    assert [row["layer"] for row in found["layers"]] == list(range(LAYERS))
    assert all(row["sparse"] == STEPS and row["dense"] == {} for row in found["layers"])
    assert found["dense_calls"] == 0 and found["sparse_calls"] == STEPS * LAYERS
    # one cross-attention per block, passed through
    assert found["other_calls"] == STEPS * LAYERS
    assert all(row["sparsity"] == pytest.approx(0.75) for row in found["layers"])
    assert all(0 < row["ratio_range"][0] <= row["ratio_range"][1] <= 1 for row in found["layers"])
