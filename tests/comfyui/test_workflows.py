"""The bundled workflows, as the template browser and the server see them; node help and the model folder, too."""

import json
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
from comfy_server import PACK, PACK_FOLDER

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
PAGE_ONLY = ["MarkdownNote", "Note"]
OURS = ["SLA2ApplyAttention", "SLA2LoadRouter", "SLA2Report"]


def test_there_are_workflows():
    assert "Wan 2.1 text to video" in [path.stem for path in WORKFLOWS]


def test_the_template_browser_lists_them_with_thumbnails(comfy):
    assert sorted(comfy.server.get("/workflow_templates")[PACK_FOLDER]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        served = comfy.server.get(f"/api/workflow_templates/{PACK_FOLDER}/{quote(path.name)}")
        assert served == json.loads(path.read_text(encoding="utf-8"))
        assert path.with_suffix(".jpg").read_bytes()[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_node_is_known_and_every_value_is_allowed(comfy, path):
    workflow, known = json.loads(path.read_text(encoding="utf-8")), comfy.server.get("/object_info")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node in nodes.values():
        assert node["type"] in known or node["type"] in PAGE_ONLY, node["type"]
    for _, source, slot, target, target_slot, kind in workflow["links"]:
        assert kind in nodes[source]["outputs"][slot]["type"].split(",")
        assert kind in nodes[target]["inputs"][target_slot]["type"].split(",")
    for node in nodes.values():
        if node["type"] in OURS:
            check_values(node, known[node["type"]]["input"])


def check_values(node, inputs):
    widgets = {
        name: spec
        for part in ("required", "optional")
        for name, spec in inputs.get(part, {}).items()
        if isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "COMBO")
    }
    values = node.get("widgets_values") or []
    # an older file has fewer: the page fills in the defaults of inputs that came later
    assert len(values) <= len(widgets) and bool(values) == bool(widgets)
    for value, (name, spec) in zip(values, widgets.items(), strict=False):
        options = spec[0] if isinstance(spec[0], list) else spec[1].get("options")
        if options:
            assert value in options, name
        if spec[0] in ("INT", "FLOAT"):
            assert spec[1]["min"] <= value <= spec[1]["max"], name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_dense_and_sla2_share_seed_and_inputs_and_models_have_links(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    samplers = [node for node in workflow["nodes"] if node["type"] == "KSampler"]
    assert len({json.dumps(sampler["widgets_values"]) for sampler in samplers}) <= 1
    assert len(samplers) == 2 or not path.stem.endswith("_sla2")
    loaders = [node for node in workflow["nodes"] if node["type"] in ("UNETLoader", "CLIPLoader", "VAELoader")]
    for node in loaders:
        if node["widgets_values"][0].startswith("wan_miniature_"):
            continue  # comes with the clone
        (model,) = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0] and model["url"].startswith("https://")


@pytest.mark.parametrize("node", OURS)
def test_node_help_is_served(comfy, node):
    with urllib.request.urlopen(f"{comfy.server.url}/extensions/{PACK_FOLDER}/docs/{node}.md", timeout=60) as page:
        assert page.read().decode().startswith("# SLA2")


def test_routers_are_listed_from_models_sla2(comfy):
    spec = comfy.server.get("/object_info/SLA2LoadRouter")["SLA2LoadRouter"]["input"]["required"]["router_name"]
    options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
    assert options[0] == "none (untrained)" and "good.safetensors" in options


def test_inputs_are_append_only(comfy):
    """Saved workflows store widget values by position: this list may grow at its end, nothing else."""
    spec = comfy.server.get("/object_info/SLA2ApplyAttention")["SLA2ApplyAttention"]["input"]
    first = [
        "sparsity",
        "bit_width",
        "ratio_mode",
        "fixed_ratio",
        "start_percent",
        "end_percent",
        "dense_layers",
        "minimum_tokens",
        "on_unsupported",
    ]
    assert [name for name in spec["required"] if name != "model"][: len(first)] == first


def test_the_pack_was_imported_without_complaint(comfy):
    lines = Path(comfy.server.log).read_text(errors="replace").splitlines()
    complaints = [
        line for line in lines if PACK_FOLDER in line and ("IMPORT FAILED" in line or "comfy_entrypoint" in line)
    ]
    assert any(PACK_FOLDER in line for line in lines) and not complaints
