"""The bundled workflow as an API prompt, and what the demo changes in it."""

import json

import pytest

from benchmarks import results
from miniature.captions import Caption
from tooling.checkpoint import DIT, VAE
from tooling.comfyui_demo import WORKFLOW
from tooling.demo_plan import CAPTION, plan_for
from tooling.graph import GraphError, branch_of, fit, samplers, to_prompt, upstream
from tooling.paths import ROOT


def info(required=None, optional=None):
    return {"input": {"required": required or {}, "optional": optional or {}}}


SEED = ["INT", {"control_after_generate": True}]
WIRE = ["MODEL", {}]
NODE_INFO = {
    "UNETLoader": info({"unet_name": [["a"]], "weight_dtype": [["default"], {"advanced": True}]}),
    "ScaleROPE": info({"model": WIRE, "scale_x": ["FLOAT", {}], "scale_y": ["FLOAT", {}]}),
    "SLA2MiniatureCaption": info({"colour": ["COMBO", {}]}),
    "VAELoader": info({"vae_name": [["v"]]}),
    "EmptyHunyuanLatentVideo": info({name: ["INT", {}] for name in ("width", "height", "length", "batch_size")}),
    "KSampler": info(
        {
            "model": WIRE,
            "seed": SEED,
            "steps": ["INT", {}],
            "cfg": ["FLOAT", {}],
            "positive": WIRE,
            "latent_image": WIRE,
        }
    ),
    "SLA2LoadRouter": info({"router_name": ["COMBO", {}]}),
    "SLA2ApplyAttention": info(
        {"model": WIRE, "sparsity": ["FLOAT", {}], "on_unsupported": ["COMBO", {}]}, {"router": ["SLA2_ROUTER", {}]}
    ),
    "SLA2Report": info({"model": WIRE, "samples": ["LATENT,IMAGE", {}]}),
    "VAEDecode": info({"samples": WIRE, "vae": WIRE}),
    "SaveVideo": info({"video": WIRE, "prefix": ["STRING", {}], "format": ["COMFY_DYNAMICCOMBO_V3", {}]}),
}


class Page:
    """Builds a UI-format workflow node by node, as the page saves it."""

    def __init__(self):
        self.workflow = {"nodes": [], "links": []}

    def add(self, number, kind, widgets=(), slots=(), mode=0, **wires):
        node = {"id": number, "type": kind, "mode": mode, "widgets_values": list(widgets), "inputs": []}
        for name in slots:
            node["inputs"].append({"name": name, "widget": {"name": name}, "link": None})
        for name, source in wires.items():
            link = len(self.workflow["links"]) + 1
            self.workflow["links"].append([link, source, 0, number, len(node["inputs"]), "*"])
            node["inputs"].append({"name": name, "link": link})
        self.workflow["nodes"].append(node)
        return self


def page():
    seed = (7, "randomize", 30, 6.0)
    return (
        Page()
        .add(1, "UNETLoader", ["wan.safetensors", "fp8"])
        .add(2, "ScaleROPE", [2.0, 2.0], model=1)
        .add(3, "SLA2MiniatureCaption", ["blue"])
        .add(4, "VAELoader", ["vae"], slots=["vae_name"])
        .add(5, "EmptyHunyuanLatentVideo", [832, 480, 81, 1])
        .add(6, "KSampler", seed, slots=["seed", "steps", "cfg"], model=2, positive=3, latent_image=5)
        .add(7, "SLA2LoadRouter", ["good"])
        .add(8, "SLA2ApplyAttention", [0.9, "dense"], model=2, router=7)
        .add(9, "KSampler", seed, model=8, positive=3, latent_image=5)
        .add(10, "SLA2Report", model=8, samples=9)
        .add(11, "VAEDecode", samples=6, vae=4)
        .add(12, "VAEDecode", samples=10, vae=4)
        .add(13, "SaveVideo", ["video/a", "auto"], slots=["prefix", "format"], video=12)
        .add(14, "MarkdownNote", ["read me"])
        .add(15, "UNETLoader", ["other", "default"], mode=2)
    )


def test_widgets_land_on_their_inputs_with_and_without_slots():
    prompt = to_prompt(page().workflow, NODE_INFO)
    for sampler in ("6", "9"):
        inputs = prompt[sampler]["inputs"]
        assert (inputs["seed"], inputs["steps"], inputs["cfg"]) == (7, 30, 6.0)
        assert inputs["positive"] == ["3", 0]
    assert prompt["8"]["inputs"] == {"sparsity": 0.9, "on_unsupported": "dense", "model": ["2", 0], "router": ["7", 0]}
    assert prompt["13"]["inputs"] == {"prefix": "video/a", "format": "auto", "video": ["12", 0]}


def test_notes_and_muted_nodes_are_left_out():
    assert {"14", "15"}.isdisjoint(to_prompt(page().workflow, NODE_INFO))


def test_an_unknown_node_is_named():
    with pytest.raises(GraphError, match="'Mystery'"):
        to_prompt(page().add(16, "Mystery").workflow, NODE_INFO)


def test_branches_are_told_apart_by_the_patch():
    prompt = to_prompt(page().workflow, NODE_INFO)
    assert samplers(prompt) == {"dense": "6", "sla2": "9"}
    assert [branch_of(prompt, node) for node in ("11", "12", "13", "4")] == ["dense", "sla2", "sla2", None]
    assert upstream(prompt, "11") == {"11", "6", "1", "3", "2", "5", "4"}


def test_a_workflow_without_a_dense_branch_is_refused():
    prompt = to_prompt(page().workflow, NODE_INFO)
    prompt["6"]["inputs"]["model"] = ["8", 0]
    with pytest.raises(GraphError, match="one without"):
        samplers(prompt)


def test_fit_changes_seed_steps_sizes_and_sparsity_and_saves_latents():
    plan = plan_for("cpu")
    prompt = fit(to_prompt(page().workflow, NODE_INFO), plan)
    assert prompt["2"]["inputs"] == {"model": ["1", 0], "scale_x": 3.75, "scale_y": 3.75}
    assert prompt["5"]["inputs"] == {"width": 208, "height": 128, "length": 81, "batch_size": 1}
    assert (prompt["8"]["inputs"]["sparsity"], prompt["8"]["inputs"]["on_unsupported"]) == (plan.sparsity, "stop")
    for sampler in ("6", "9"):
        inputs = prompt[sampler]["inputs"]
        assert (inputs["seed"], inputs["steps"], inputs["cfg"]) == (plan.seed, plan.steps, 6.0)
    assert prompt["latent_sla2"]["inputs"]["samples"] == ["9", 0]
    json.dumps(prompt)
    dangling = {
        value[0] for data in prompt.values() for value in data["inputs"].values() if isinstance(value, list)
    } - set(prompt)
    assert not dangling


def test_at_480_pixels_positions_are_the_models_own():
    prompt = fit(to_prompt(page().workflow, NODE_INFO), plan_for("cuda"))
    assert (prompt["2"]["inputs"]["scale_x"], prompt["2"]["inputs"]["scale_y"]) == (1, 1)


def test_plans_are_as_long_and_as_sparse_as_they_say():
    assert [(plan_for(device).tokens, plan_for(device).minimum_tokens) for device in ("cpu", "cuda")] == [
        (2184, 0),
        (32760, 0),
    ]
    measured = results.load(results.RESULTS / "demo-sparsity.json")
    assert (measured["tokens"], measured["reference"]["sparsity"]) == (2184, plan_for("cuda").sparsity)
    error = next(error for _, sparsity, error in measured["rows"] if sparsity == plan_for("cpu").sparsity)
    assert error <= measured["reference"]["error"]


@pytest.mark.parametrize(
    ("name", "device"), [("First look, nothing to download", "cpu"), ("Miniature, both stages beside dense", "cuda")]
)
def test_the_miniatures_workflows_are_made_as_the_demo_is(name, device):
    workflow, plan = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")), plan_for(device)
    found = {node["type"]: node.get("widgets_values") for node in workflow["nodes"]}
    assert found["EmptyHunyuanLatentVideo"] == [plan.width, plan.height, plan.frames, 1]
    assert found["ModelSamplingSD3"] == [plan.shift]
    assert found.get("ScaleROPE", [1, 0, 1, 0, 1, 0]) == [plan.rope_scale, 0, plan.rope_scale, 0, 1, 0]
    assert found["KSampler"][2:] == [plan.steps, plan.cfg, "euler", "simple", 1]
    assert found["SLA2ApplyAttention"][0] == plan.sparsity
    assert str(Caption(*found["SLA2MiniatureCaption"])) == CAPTION


def test_what_the_demo_leaves_as_it_is_in_the_workflow_first_look():
    nodes = json.loads(WORKFLOW.read_text(encoding="utf-8"))["nodes"]
    values = {node["type"]: node.get("widgets_values") for node in nodes}
    assert (values["UNETLoader"], values["VAELoader"]) == ([DIT, "default"], [VAE])
    assert values["SLA2LoadRouter"] == ["none (untrained)"]
    (apply,) = (node for node in nodes if node["type"] == "SLA2ApplyAttention")
    names = [slot["name"] for slot in apply["inputs"] if "widget" in slot]
    settings = dict(zip(names, apply["widgets_values"], strict=True))
    expected = {"preset": "custom", "minimum_tokens": 0, "start_percent": 0, "end_percent": 1, "dense_layers": ""}
    assert expected.items() <= settings.items()
