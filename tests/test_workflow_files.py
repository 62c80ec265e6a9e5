"""The workflows and the blueprint as files: what the page's schema asks of them, and where their nodes come from."""

import json

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
