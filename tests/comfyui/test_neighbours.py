"""SLA2 beside other nodes that touch the same model."""

import pytest
import torch

STEPS, LAYERS = 3, 3
ALL = STEPS * LAYERS
NEIGHBOUR = "sla2_test_helpers"
DEFAULT = "PyTorch's scaled_dot_product_attention"


def patched_report(comfy, prompt, patched):
    samples = prompt.sample(patched)
    report, saved = prompt.report(patched, samples), prompt.save(samples)
    outputs = comfy.run(prompt)
    return comfy.report(outputs, report), comfy.latent(outputs, saved)


def neighbour(prompt, model, kind):
    return prompt.add("SLA2TestNeighbour", model=model, kind=kind)


@pytest.fixture(scope="module")
def alone(comfy, new_prompt):
    """The latent that SLA2 makes without neighbours."""
    prompt = new_prompt()
    return patched_report(comfy, prompt, prompt.apply(prompt.model()))[1]


@pytest.mark.parametrize("kind", ["chains", "copies options"])
def test_a_later_node_that_keeps_us_changes_nothing(comfy, prompt, alone, kind):
    found, latent = patched_report(comfy, prompt, neighbour(prompt, prompt.apply(prompt.model()), kind))
    assert found["sparse_calls"] == ALL and found["other_calls"] == ALL and found["notes"] == []
    first = f"{NEIGHBOUR}.chaining.override, which holds SLA2" if kind == "chains" else "SLA2"
    assert found["stack"] == {"attention": f"{first}; its dense calls run in {DEFAULT}", "also": []}
    assert torch.equal(latent, alone)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("overwrites", "replaced the attention override"), ("removes", "removed the attention override")],
)
def test_a_later_node_that_drops_us_is_noticed_and_said(comfy, prompt, alone, kind, words):
    found, latent = patched_report(comfy, prompt, neighbour(prompt, prompt.apply(prompt.model()), kind))
    assert found["sparse_calls"] == ALL and found["dense_calls"] == 0
    assert len(found["notes"]) == 1 and words in found["notes"][0]
    below = f"{NEIGHBOUR}.overwriting.override" if kind == "overwrites" else DEFAULT
    assert found["stack"]["attention"] == f"SLA2; its dense calls run in {below}"
    assert torch.equal(latent, alone)


def test_a_later_node_that_holds_us_but_never_calls_us_is_noticed_after_one_model_call(comfy, prompt):
    found, _ = patched_report(comfy, prompt, neighbour(prompt, prompt.apply(prompt.model()), "keeps but never calls"))
    assert found["sparse_calls"] == ALL - LAYERS
    lost = {"another node's attention took the call before SLA2 could see it": 1}
    assert [row["dense"] for row in found["layers"]] == [lost] * LAYERS
    assert len(found["notes"]) == 1 and "does not call SLA2" in found["notes"][0]


@pytest.mark.parametrize("kind", ["chains", "overwrites"])
def test_an_earlier_node_is_chained(comfy, prompt, alone, kind):
    found, latent = patched_report(comfy, prompt, prompt.apply(neighbour(prompt, prompt.model(), kind)))
    assert found["sparse_calls"] == ALL and found["notes"] == []
    function = {"chains": "chaining", "overwrites": "overwriting"}[kind]
    assert found["stack"]["attention"] == f"SLA2; its dense calls run in {NEIGHBOUR}.{function}.override"
    assert torch.equal(latent, alone)


def test_without_us_the_report_still_names_what_runs(comfy, prompt):
    model = neighbour(prompt, prompt.model(), "overwrites")
    report = prompt.report(model, prompt.sample(model))
    (text,) = comfy.run(prompt)[report]["text"]
    assert text.split("\n")[1:] == [
        f"attention of this model: {NEIGHBOUR}.overwriting.override",
        "also on this model: nothing",
    ]


def test_cores_attention_backend_after_us_is_noticed_and_said(comfy, prompt, alone):
    if "ModelAttentionBackend" not in comfy.server.get("/object_info"):
        pytest.skip("this ComfyUI has no ModelAttentionBackend node")
    patched = prompt.add("ModelAttentionBackend", model=prompt.apply(prompt.model()), attention="pytorch attention")
    found, latent = patched_report(comfy, prompt, patched)
    assert found["sparse_calls"] == ALL
    assert "set_model_optimized_attention" in found["notes"][0]
    assert torch.equal(latent, alone)


def test_a_failing_neighbour_is_not_swallowed_and_the_next_prompt_runs(comfy, prompt, new_prompt, alone):
    # our calls are sparse, so it is the cross-attention that reaches the neighbour
    prompt.save(prompt.sample(prompt.apply(neighbour(prompt, prompt.model(), "fails"))))
    _, message = comfy.error(prompt)
    assert "the neighbour's override fails" in message
    again = new_prompt()
    found, latent = patched_report(comfy, again, again.apply(again.model(), end_percent=0.999))
    assert found["sparse_calls"] == ALL
    assert torch.equal(latent, alone)


def test_a_second_apply_replaces_the_first(comfy, prompt, alone):
    first = prompt.apply(prompt.model(), sparsity=0.3, dense_layers="1")
    found, latent = patched_report(comfy, prompt, prompt.apply(first))
    assert found["sparsity_setting"] == 0.75 and found["sparse_calls"] == ALL and found["dense_calls"] == 0
    assert torch.equal(latent, alone)


TRAINED = {
    "plain": ({}, {}),
    "a window": ({"start_percent": 0.001}, {}),
    "a schedule": ({"schedule": "0%-50%: 0.6; 50%-100%: 0.75"}, {}),
    "blocks recomputed one by one": ({"end_percent": 0.999}, {"checkpoint_depth": 2}),
}


def test_cores_lora_training_goes_through_us(comfy, prompt):
    """The training node works on a copy of the model, reloaded from its file (from 0.25 on), with gradients. It recomputes
    the model in the backward pass: what is done once a step must not be recorded, and no call counts twice."""
    node = comfy.server.get("/object_info/TrainLoraNode")["TrainLoraNode"]
    defaults = {
        name: options[1]["default"]
        for part in node["input"].values()
        for name, options in part.items()
        if len(options) > 1 and isinstance(options[1], dict) and "default" in options[1]
    }
    latent = prompt.add("EmptyHunyuanLatentVideo", width=128, height=128, length=9, batch_size=1)
    positive = prompt.add("SLA2TestConditioning", number=1, image=False, label="training")
    changes = {"steps": 2, "rank": 2, "training_dtype": "fp32", "lora_dtype": "fp32", "existing_lora": "[None]"}
    patched = [prompt.apply(prompt.model(), **settings) for settings, _ in TRAINED.values()]
    graphs = []
    for model, (_, how) in zip(patched, TRAINED.values(), strict=True):
        known = {name: value for name, value in how.items() if name in defaults}
        trained = prompt.add(
            "TrainLoraNode", model=model, latents=latent, positive=positive, **defaults | changes | known
        )
        loss = [trained[0], node["output"].index("LOSS_MAP")]
        graphs.append(prompt.add("LossGraphNode", loss=loss, filename_prefix="loss"))
        # a report in the prompt: maps are made
        prompt.report(model, latent)
    outputs = comfy.run(prompt)
    assert all(outputs[graph[0]]["images"] for graph in graphs)
    # what the training did is the newest run of this model
    reports = [prompt.report(model, latent) for model in patched]
    outputs = comfy.run(prompt)
    for report in reports:
        found = comfy.report(outputs, report)
        assert (found["sparse_calls"], found["dense_calls"], found["model_calls"]) == (2 * 3, 0, 2), found
