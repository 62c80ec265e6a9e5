"""The benchmark of whole model calls: one run on ComfyUI's classes at tiny size, and the table it prints."""

import json

import pytest
import torch

from benchmarks import comfyui_calls, comfyui_models, comfyui_variants, table


def test_every_variant_of_tiny_models_runs_whole(comfyui_path, comfy_scripts, tmp_path):
    out = tmp_path / "calls.json"
    parts = "tiny-H3,tiny-LTX-2,tiny-memory"
    options = ["--comfyui", comfyui_path, "--parts", parts, "--weights", "16bit", "--device", "cpu"]
    done = comfy_scripts.run("-m", "benchmarks.comfyui_calls", *options, "--calls", 1, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert not any(row.get("failed") for row in rows), rows
    memory = [row for row in rows if row["part"] == "memory"]
    # dense and SLA2 at 90% and 97%: one attention call; dense and 90% again at two sizes of card
    assert [row["variant"].split(",")[0] for row in memory] == ["dense", "SLA2", "SLA2"] + 2 * ["dense", "SLA2"]
    # 2 heads of 128, 320 video tokens behind 42 others, float32
    assert {row["q_bytes"] for row in memory if "q_bytes" in row} == {362 * 2 * 128 * 4}
    for part in ("tiny H3, 16 bit", "tiny LTX-2, 16 bit"):
        of_part = [row for row in rows if row["part"] == part]
        assert [row["variant"].split(",")[0] for row in of_part] == [comfyui_variants.BOUND, "dense", "SLA2", "SLA2"]
        # 2 blocks, one call to warm up and one that counts
        assert [(row["sparse_calls"], row["dense_calls"]) for row in of_part if "sparse_calls" in row] == [(4, 0)] * 2
    assert f"| {comfyui_variants.BOUND} |" in done.stdout


def test_real_sizes_have_the_tokens_that_they_name():
    cases = comfyui_models.CASES
    h3, ltx, wan = (cases[name] for name in ("MiniMax H3", "LTX-2, second stage", "Wan 2.2 14B, 720p"))
    assert h3.tokens + sum(h3.prefix) == 42_000 and (h3.layers, h3.heads) == (50, 56)
    assert (ltx.tokens, ltx.layers, ltx.heads) == (14_080, 48, 32)
    assert (wan.tokens, wan.layers, wan.heads) == (75_600, 40, 40)
    assert {case.tokens for case in comfyui_models.crossover_cases([1024, 2048]).values()} == {1024, 2048}


def test_the_table_sets_each_variant_beside_the_default():
    rows = [
        {"part": "H3", "variant": comfyui_variants.BOUND, "seconds_per_step": 1.0, "attention_seconds": 0.0},
        {
            "part": "H3",
            "variant": comfyui_variants.DENSE,
            "seconds_per_step": 4.0,
            "attention_seconds": 3.0,
            "peak_bytes": 2**30,
        },
        {"part": "H3", "variant": "SLA2", "seconds_per_step": 1.25, "attention_seconds": 0.25, "peak_bytes": 2**31},
        {"part": "H3", "variant": "rival", "seconds_per_step": None, "failed": "RuntimeError: no kernel"},
    ]
    facts = {"card": "a card", "comfyui": "0.33.0", "torch": "2.11"}
    text = table.calls_markdown({"environment": facts, "parts": {"H3": {}, "crossover": {}}, "rows": rows})
    assert "| dense, ComfyUI's default | 4 s (1.00x), 3 s |" in text
    assert "| **SLA2** | 1.25 s (3.20x), 0.25 s |" in text and "at most 2.000 times dense" in text
    assert "| rival | - |" in text and "Failed: rival at H3: RuntimeError: no kernel." in text


def test_a_buffer_that_a_class_leaves_on_another_device_is_filled_too():
    """As those of MiniMax H3: numbers are drawn on the generator's device, whatever the tensor's."""
    model = torch.nn.Linear(4, 4)
    model.register_buffer("table", torch.empty(8, 4, device="meta"))
    comfyui_models.fill(model, torch.Generator().manual_seed(0), torch.float32)
    assert model.table.shape == (8, 4) and 0 < model.weight.std() < 0.1 and not model.bias.any()


def test_a_part_that_failed_as_a_whole_is_in_the_table():
    failed = {"part": "H3", "variant": "every variant", "seconds_per_step": None, "failed": "RuntimeError: no memory"}
    facts = {"card": "a card", "comfyui": "0.33.0", "torch": "2.11"}
    text = table.calls_markdown({"environment": facts, "parts": {"H3": {}}, "rows": [failed]})
    assert "| every variant | - |" in text and "Failed: every variant at H3: RuntimeError: no memory." in text


def test_a_part_without_the_default_shows_seconds_alone():
    rows = [
        {"part": "H3", "variant": "SLA2", "seconds_per_step": 1.25, "attention_seconds": None, "peak_bytes": 2**31},
        {"part": "LTX", "variant": "SLA2", "seconds_per_step": 0.5, "attention_seconds": None, "peak_bytes": 2**31},
        {
            "part": "LTX",
            "variant": comfyui_variants.DENSE,
            "seconds_per_step": None,
            "failed": "RuntimeError: no kernel",
        },
    ]
    facts = {"card": "a card", "comfyui": "0.33.0", "torch": "2.11"}
    text = table.calls_markdown({"environment": facts, "parts": {"H3": {}, "LTX": {}}, "rows": rows})
    assert "| **SLA2** | 1.25 s | 0.5 s |" in text


def test_memory_is_shown_in_multiples_of_q():
    card = {"part": "memory", "model": "tiny", "loaded_bytes": 2**29, "weight_bytes": 2**30, "cap_gib": 16}
    rows = [
        {"part": "memory", "model": "tiny", "variant": "SLA2", "q_bytes": 2**20, "extra_bytes": 2**20 + 2**19},
        card | {"variant": "rival", "seconds_per_step": None, "failed": "OutOfMemoryError: none left"},
        card | {"variant": "SLA2", "seconds_per_step": 2.5, "peak_bytes": 3 * 2**30},
    ]
    facts = {"card": "a card", "comfyui": "0.33.0", "torch": "2.11"}
    text = table.memory_markdown({"environment": facts, "rows": [*rows, {"part": "H3", "variant": "SLA2"}]})
    assert "| **SLA2** | 1.50 x q |" in text
    assert "| **SLA2** | 16 GiB | 0.5 of 1.0 GiB | 2.5 | 3.0 GiB |" in text
    assert "| failed | - |" in text and text.endswith("Failed: rival: OutOfMemoryError: none left.")
    assert table.memory_markdown({"rows": []}) == ""


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        comfyui_calls.parse(["--parts", "H4"])
    assert "'H4' is not one of H3" in capsys.readouterr().err
