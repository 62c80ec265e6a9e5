"""The workflows and the blueprint as files: what the page's schema asks of them, and where their nodes come from."""

import json
import math

import pytest

from tooling.workflows import NULL_IS_A_VALUE, SHIPPED, graphs, origins, project_field

ONLY_IN_THE_PAGE = ("MarkdownNote", "Note")


def nulls(value, path=""):
    """Paths of the nulls in a saved value, but for links: the page writes null where nothing is connected."""
    if isinstance(value, dict):
        for key, item in value.items():
            if item is None and key not in NULL_IS_A_VALUE:
                yield f"{path}.{key}"
            yield from nulls(item, f"{path}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from nulls(item, f"{path}[{number}]")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_no_key_is_null_where_the_pages_schema_wants_it_absent(file):
    assert list(nulls(json.loads(file.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_node_names_its_pack_and_version(file):
    """So that the page can name the pack, or the version of ComfyUI, that a node which it does not know comes from."""
    workflow = json.loads(file.read_text(encoding="utf-8"))
    subgraphs = {graph.get("id") for graph in graphs(workflow)}
    nodes = [node for graph in graphs(workflow) for node in graph["nodes"] if node["type"] not in subgraphs]
    named = [node for node in nodes if node["type"] not in ONLY_IN_THE_PAGE]
    assert any(node["type"].startswith("SLA2") for node in named)
    for node in named:
        origin = origins()["ours" if node["type"].startswith("SLA2") else "core"]
        assert node["properties"] | origin == node["properties"], node["type"]


def test_origins_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    with open(SHIPPED[0].parents[1] / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    assert project_field("name") == project["project"]["name"]
    assert project_field("version") == project["project"]["version"]
    assert f">={project_field('requires-comfyui')}" == project["tool"]["comfy"]["requires-comfyui"]


TITLE, SLOT = 30, 20  # heights in the page
SWITCH = "ComfySwitchNode"


def is_dense_end(node):
    """Where a branch without SLA2 ends: a sampler, or the switch between both."""
    return node["type"] == SWITCH or node["type"] == "KSampler" and "(dense)" in node.get("title", "")


BRANCHED = [
    file
    for file in SHIPPED
    if any(is_dense_end(node) for node in json.loads(file.read_text(encoding="utf-8"))["nodes"])
]


def inputs_of(workflow, node):
    """(source, its slot, slot of ``node``) of each MODEL wire into a node."""
    nodes = {each["id"]: each for each in workflow["nodes"]}
    wires = (link for link in workflow["links"] if link[3] == node["id"] and link[5] == "MODEL")
    return [(nodes[source], slot, own) for _, source, slot, _, own, _ in wires]


def passes_apply(workflow, node):
    return node["type"] == "SLA2ApplyAttention" or any(
        passes_apply(workflow, source) for source, *_ in inputs_of(workflow, node)
    )


def wire(source, slot, target, own):
    """Points of a wire as the page draws it: a curve that leaves and arrives level."""
    (x, y), (width, _), (end_x, end_y) = source["pos"], source["size"], target["pos"]
    x, y, end_y = x + width, y + (slot + 0.7) * SLOT, end_y + (own + 0.7) * SLOT
    reach = math.hypot(end_x - x, end_y - y) / 4
    for t in (number / 64 for number in range(1, 64)):
        shares = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        xs, ys = (x, x + reach, end_x - reach, end_x), (y, y, end_y, end_y)
        yield sum(map(float.__mul__, shares, map(float, xs))), sum(map(float.__mul__, shares, map(float, ys)))


@pytest.mark.parametrize("file", BRANCHED, ids=lambda file: file.stem)
def test_a_dense_branch_is_not_wired_to_apply_and_does_not_look_it(file):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"] if node["type"] == "SLA2ApplyAttention"]
    for node in filter(is_dense_end, workflow["nodes"]):
        dense = [wired for wired in inputs_of(workflow, node) if not passes_apply(workflow, wired[0])]
        assert len(dense) == 1 and (node["type"] == SWITCH or len(inputs_of(workflow, node)) == 1), node.get("title")
        source, slot, own = dense[0]
        behind = [
            box
            for box in boxes
            for x, y in wire(source, slot, node, own)
            if box[0] <= x <= box[0] + box[2] and box[1] - TITLE <= y <= box[1] + box[3]
        ]
        assert behind == [], f"the wire into {node['title']} passes behind SLA2 Apply Attention"
