"""Bundled workflows, the blueprint and the museum, loaded in the page; what trains, compares and accelerates is queued, too."""

import json

import pytest

from tooling.paths import ROOT
from tooling.recipes.cards import CARDS
from tooling.thumbnails import MAX_BYTES, draw

pytestmark = pytest.mark.web

BUNDLED = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINT = ROOT / "subgraphs" / "Accelerate this model.json"
MUSEUM = sorted((ROOT / "tests" / "museum").glob("*/*.json"))
TINY = {"width": 256, "height": 256, "length": 9}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def saved_nodes(workflow):
    """Nodes of ours in a saved workflow by (subgraph's id or None, id), those inside its subgraphs too."""
    inner = (workflow.get("definitions") or {}).get("subgraphs", [])
    graphs = [(None, workflow), *((graph["id"], graph) for graph in inner)]
    return {
        (graph_id, str(node["id"])): node
        for graph_id, graph in graphs
        for node in graph["nodes"]
        if node["type"].startswith("SLA2")
    }


@pytest.fixture
def validating(canvas):
    """The page holds workflows to its own schema while they load, which is off by default."""
    canvas.setting("Comfy.Validation.Workflows", True)
    canvas.alerts()
    yield
    canvas.setting("Comfy.Validation.Workflows", False)


@pytest.mark.parametrize("path", BUNDLED + [BLUEPRINT] + MUSEUM, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_it_loads_without_a_missing_node_and_with_every_value(canvas, validating, path):
    workflow = read(path)
    canvas.load(workflow)
    # users have some, and so has the museum, with nulls that the schema refuses: they load all the same
    old = path in MUSEUM and '"slot_index": null' in path.read_text(encoding="utf-8")
    alerts = [text for text in canvas.alerts() if "schema" in text]
    assert len(alerts) == old, alerts
    unknown = canvas.js(
        "[app.rootGraph, ...(app.rootGraph.subgraphs?.values() ?? [])].flatMap((g) => g.nodes)"
        ".filter((n) => !LiteGraph.registered_node_types[n.type]).map((n) => n.type)"
    )
    assert unknown == []
    shown = canvas.js(
        "[app.rootGraph, ...(app.rootGraph.subgraphs?.values() ?? [])].flatMap((g) =>"
        " g.nodes.filter((n) => n.type.startsWith('SLA2')).map((n) => [g === app.rootGraph ? null : g.id, String(n.id), n.type,"
        " Object.fromEntries((n.widgets ?? []).map((w) => [w.name, w.value]))]))"
    )
    found = {(graph_id, node_id): (kind, values) for graph_id, node_id, kind, values in shown}
    nodes = saved_nodes(workflow)
    assert nodes and {key: node["type"] for key, node in nodes.items()} == {
        key: kind for key, (kind, _) in found.items()
    }
    for key, node in nodes.items():
        saved = node.get("widgets_values_named") or {}
        assert {name: found[key][1].get(name) for name in saved} == saved, node["type"]
        if node["type"] == "SLA2ApplyAttention" and "preset" not in saved:
            assert found[key][1]["preset"] == "custom", "its own sparsity and schedule count, as they did"
    assert canvas.errors == []


def test_values_are_saved_by_name_in_every_exhibit():
    nodes = [node for path in MUSEUM for node in saved_nodes(read(path)).values() if node.get("widgets_values")]
    assert len(nodes) >= 6 and all(node["widgets_values_named"] for node in nodes)


def test_every_workflow_has_a_card_that_can_be_drawn(browser, tmp_path):
    assert set(CARDS) == {path.stem for path in BUNDLED}
    for name in ("First look, nothing to download", "LTX-2.5 image to video"):
        draw(browser, name, tmp_path / "x.jpg")
        taken = (tmp_path / "x.jpg").read_bytes()
        assert taken.startswith(b"\xff\xd8\xff") and 20_000 < len(taken) <= MAX_BYTES


def test_a_new_node_chooses_for_itself_and_one_saved_by_position_keeps_its_settings(canvas):
    node = "LiteGraph.createNode('SLA2ApplyAttention')"
    preset = "n.widgets.find((w) => w.name === 'preset').value"
    assert canvas.js(f"(() => {{ const n = {node}; return {preset}; }})()") == "automatic"
    for count, expected in ((9, "custom"), (10, "custom"), (11, "fast")):
        values = [0.8, "auto", "learned", 0.9, 0, 1, "", -1, "stop", "automatic", "fast"][:count]
        saved = f"{{...n.serialize(), widgets_values: {json.dumps(values)}, widgets_values_named: undefined}}"
        assert canvas.js(f"(() => {{ const n = {node}; n.configure({saved}); return {preset}; }})()") == expected


def made_tiny(prompt, **changes):
    """The page's prompt with the tiny model and random conditioning; what decodes or saves videos is left out."""
    kept = {}
    for name, node in prompt.items():
        kind, inputs = node["class_type"], dict(node["inputs"])
        if kind == "CLIPTextEncode":
            kind, inputs = "SLA2TestConditioning", {"number": len(name), "image": False, "label": ""}
        elif kind in (
            "CLIPLoader",
            "VAELoader",
            "VAEDecode",
            "CreateVideo",
            "SaveVideo",
            "ImageStitch",
            "MarkdownNote",
        ):
            continue
        inputs.pop("vae", None)
        if kind == "UNETLoader":
            inputs["unet_name"] = "tiny_wan.safetensors"
        for key, value in (TINY | changes).items():
            inputs = inputs | ({key: value} if key in inputs else {})
        kept[name] = {"class_type": kind, "inputs": inputs}
    return kept


def prompt_of(canvas, workflow):
    canvas.load(workflow)
    return canvas.prompt()


def output_of(server, prompt, kind):
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    return entry["outputs"][name_of(prompt, kind)]


def name_of(prompt, kind):
    return next(name for name, node in prompt.items() if node["class_type"] == kind)


def test_the_training_workflow_trains_and_uses_its_router(server, canvas):
    prompt = made_tiny(prompt_of(canvas, read(ROOT / "workflows/Train a router (Wan 2.1).json")), steps=2,
                       training_steps=8, minimum_tokens=0, sparsity=0.75, sparsities="0.75", cfg=1.0)  # fmt: skip
    apply, sampler = (name_of(prompt, kind) for kind in ("SLA2ApplyAttention", "KSampler"))
    prompt["report"] = {"class_type": "SLA2Report", "inputs": {"model": [apply, 0], "samples": [sampler, 0]}}
    report = output_of(server, prompt, "SLA2Report")["sla2_report"][0]
    assert report["sparse_calls"] == 6 and report["dense_calls"] == 0 and report["router"] == "unsaved"
    assert list((server.base / "models/sla2").glob("wan2.1_t2v_1.3b_*_.safetensors"))


def test_the_lora_workflow_trains_saves_and_uses_lora_and_router(comfy, server, canvas):
    comfy.skip_before(0, 25, "SLA2 Train LoRA")
    workflow = read(ROOT / "workflows/Train a LoRA (Wan 2.1).json")
    prompt = made_tiny(prompt_of(canvas, workflow), steps=2, width=128, height=128, sparsity=0.6, videos=1, rank=4,
                       training_steps=2, batch_size=1, minimum_tokens=0, cfg=1.0)  # fmt: skip
    apply, sampler = (name_of(prompt, kind) for kind in ("SLA2ApplyAttention", "KSampler"))
    prompt["report"] = {"class_type": "SLA2Report", "inputs": {"model": [apply, 0], "samples": [sampler, 0]}}
    report = output_of(server, prompt, "SLA2Report")["sla2_report"][0]
    assert report["sparse_calls"] == 6 and report["dense_calls"] == 0 and report["ratio"] == "learned"
    assert len(list((server.base / "output/loras").glob("wan2.1_t2v_1.3b_sla2_2_steps_*_.safetensors"))) == 1
    assert list((server.base / "models/sla2").glob("wan2.1_t2v_1.3b_lora_*_.safetensors"))


def test_the_comparing_workflow_compares(server, canvas):
    workflow = read(ROOT / "workflows/Measure on this card (Wan 2.1).json")
    prompt = made_tiny(prompt_of(canvas, workflow), steps=3, minimum_tokens=0, find_break_even=False)
    data = output_of(server, prompt, "SLA2Compare")["sla2_comparison"][0]
    assert "(9 of 9 calls accelerated)" in dict(data["rows"])["seconds per step, SLA2"]


def test_the_miniatures_workflow_samples_twice(server, canvas):
    prompt = made_tiny(prompt_of(canvas, read(ROOT / "workflows/First look, nothing to download.json")), steps=2)
    kinds = [node["class_type"] for node in prompt.values()]
    assert kinds.count("KSampler") == 2 and kinds.count("SLA2MiniatureCaption") == 1
    report = output_of(server, prompt, "SLA2Report")["sla2_report"][0]
    # 2 steps of 3 layers
    assert (report["sparse_calls"], report["dense_calls"]) == (6, 0)


def test_the_blueprint_is_offered_and_accelerates(server, canvas, sampling_prompt):
    offered = [entry for entry in server.get("/global_subgraphs").values() if entry["source"] == "custom_node"]
    assert [entry["name"] for entry in offered] == [BLUEPRINT.stem]
    known = "document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('subgraph')"
    shown = canvas.js(f"{known}.subgraphBlueprints.map((blueprint) => blueprint.display_name)")
    assert BLUEPRINT.stem in shown, "the page refuses a blueprint that it cannot read"
    canvas.load(read(BLUEPRINT))
    canvas.picture("blueprint")
    canvas.js(
        "(() => { const g = app.graph, src = LiteGraph.createNode('UNETLoader'), end = LiteGraph.createNode('KSampler');"
        "g.add(src); g.add(end); const sub = g.nodes.find((n) => n.subgraph);"
        "sub.widgets.find((w) => w.name === 'sparsity').value = 0.75;"
        "sub.widgets.find((w) => w.name === 'minimum_tokens').value = 0;"
        "src.connect(0, sub, 'model'); sub.connect(0, end, 'model'); })()"
    )
    inside = canvas.prompt()
    apply = next(name for name, node in inside.items() if node["class_type"] == "SLA2ApplyAttention")
    assert inside[apply]["inputs"]["sparsity"] == 0.75 and inside[apply]["inputs"]["minimum_tokens"] == 0
    loader = inside[apply]["inputs"]["model"][0]
    prompt = {name: node for name, node in inside.items() if node["class_type"] != "KSampler"}
    prompt[loader]["inputs"]["unet_name"] = "tiny_wan.safetensors"
    for name in ("3", "4", "5", "6", "7"):
        inputs = sampling_prompt[name]["inputs"]
        moved = {
            key: [f"test{value[0]}", value[1]] if isinstance(value, list) else value for key, value in inputs.items()
        }
        moved |= {"model": [apply, 0]} if "model" in inputs else {}
        prompt[f"test{name}"] = {"class_type": sampling_prompt[name]["class_type"], "inputs": moved}
    assert output_of(server, prompt, "SLA2Report")["sla2_report"][0]["sparse_calls"] == 9
