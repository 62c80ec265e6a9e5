"""Router files on a real server: the good one is used, every wrong one gives one sentence and harms nobody."""

import pytest

STEPS, LAYERS = 3, 3


def with_router(prompt, name, **changes):
    return prompt.apply(prompt.model(), router=prompt.add("SLA2LoadRouter", router_name=name), **changes)


def test_a_trained_router_is_used(comfy, prompt):
    patched = with_router(prompt, "good.safetensors")
    report = prompt.report(patched, prompt.sample(patched))
    found = comfy.report(comfy.run(prompt), report)
    assert found["router"] == "good.safetensors" and found["ratio"] == "learned"
    assert found["sparse_calls"] == STEPS * LAYERS
    # sigmoid(1.4), one knot
    assert found["layers"][0]["ratio_range"] == pytest.approx([0.8022, 0.8022], abs=1e-3)


def test_a_sparsity_the_router_was_not_trained_for_is_said(comfy, prompt):
    patched = with_router(prompt, "good.safetensors", sparsity=0.5)
    report = prompt.report(patched, prompt.sample(patched))
    notes = comfy.report(comfy.run(prompt), report)["notes"]
    assert "trained for sparsity 0.75, 0.97" in notes[0]
    assert notes[1:] == ["the router was trained at int8 and this run uses 16bit"]


def test_a_fixed_ratio_wins_over_the_router(comfy, prompt):
    patched = with_router(prompt, "good.safetensors", ratio_mode="fixed", fixed_ratio=0.6)
    report = prompt.report(patched, prompt.sample(patched))
    found = comfy.report(comfy.run(prompt), report)
    assert found["ratio"] == "fixed at 0.6"
    assert found["layers"][1]["ratio_range"] == pytest.approx([0.6, 0.6])


def test_untrained_is_a_choice(comfy, prompt):
    patched = with_router(prompt, "none (untrained)")
    report = prompt.report(patched, prompt.sample(patched))
    found = comfy.report(comfy.run(prompt), report)
    assert found["router"] == "none (untrained)" and found["ratio"] == "fitted (no trained ratio)"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated.safetensors", ()),
        ("no_safetensors.safetensors", ()),
        ("nan_inside.safetensors", ("finite",)),
        ("other_layers.safetensors", ("number of layers", "4", "3")),
        ("other_heads.safetensors", ("number of heads", "3", "2")),
        ("other_head_dim.safetensors", ("head_dim", "64", "128")),
        ("other_family.safetensors", ("model family", "ltx", "wan")),
        ("other_order.safetensors", ("hilbert",)),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_it(comfy, prompt, name, words):
    prompt.save(prompt.sample(with_router(prompt, name)))
    _, message = comfy.error(prompt)
    assert message.strip().count("\n") == 0
    assert name in message
    assert all(word in message for word in words), message


def test_a_file_saved_over_the_one_in_use_is_read_again(comfy, prompt):
    from tiny_wan import save_router

    path = comfy.base / "models/sla2/changing.safetensors"
    save_router(path)
    patched = with_router(prompt, "changing.safetensors")
    report = prompt.report(patched, prompt.sample(patched))
    assert comfy.report(comfy.run(prompt), report)["ratio"] == "learned"
    save_router(path, layers=5)
    _, message = comfy.error(prompt)
    assert "number of layers" in message


def test_a_name_that_comes_over_a_wire_is_no_reason_to_load_again(comfy, prompt):
    """ComfyUI does not say what a wire brings when it asks whether an input has changed."""
    from tiny_wan import save_router

    save_router(comfy.base / "models/sla2/wired.safetensors")
    patched = with_router(prompt, prompt.add("SLA2TestAnything", text="wired.safetensors"))
    sampled = prompt.sample(patched)
    prompt.save(sampled)

    def is_cached():
        messages = dict(comfy.server.run(prompt)["status"]["messages"])
        assert "execution_success" in messages
        return sampled[0] in messages["execution_cached"]["nodes"]

    assert [is_cached(), is_cached()] == [False, True]
    save_router(comfy.base / "models/sla2/wired.safetensors", precision="16bit")
    assert not is_cached(), "saved over the one in use"


def test_a_saved_file_that_is_gone_is_saved_again_and_one_that_is_there_is_not(comfy, prompt):
    """ComfyUI would say "saved as ..." from its cache."""
    folder = comfy.base / "models/sla2/said"
    loaded = prompt.add("SLA2LoadRouter", router_name="good.safetensors")
    prompt.add("SLA2SaveRouter", router=loaded, filename_prefix="said/saved")
    for _ in range(2):
        comfy.run(prompt)
        (path,) = folder.iterdir()
    size = path.stat().st_size
    path.unlink()
    for _ in range(2):
        comfy.run(prompt)
        assert [found.stat().st_size for found in folder.iterdir()] == [size]
