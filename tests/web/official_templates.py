"""ComfyUI's official video templates, from the package that run_tests.py installs beside the one that ComfyUI brings."""

import functools
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest

from run_tests import TEMPLATES, templates_folder

PACKAGE, VERSION = TEMPLATES.split("==")


def template_folder():
    """Folder of the JSON files; skips where neither run_tests.py nor the user installed this version."""
    name = PACKAGE.replace("-", "_")
    own = templates_folder() / name
    if own.is_dir():
        return own / "templates"
    found = importlib.util.find_spec(name)
    if found is None or importlib.metadata.version(PACKAGE) != VERSION:
        pytest.skip(f"{TEMPLATES} is not installed")
    return Path(found.origin).parent / "templates"


@functools.cache
def video_templates():
    """{name: workflow} of every local template in the category Video, those used most first."""
    folder = template_folder()
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    [videos] = [category["templates"] for category in index if category["title"] == "Video"]
    local = [
        entry["name"] for entry in videos if entry.get("openSource", True) and not entry["name"].startswith("api_")
    ]
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in local}


def missing_types(workflow, known):
    """Node types that this ComfyUI does not have; the page's own (notes, reroutes, primitives) are no types of the server."""
    inner = (workflow.get("definitions") or {}).get("subgraphs", [])
    own = {graph["id"] for graph in inner} | {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}
    return sorted({node["type"] for graph in [workflow, *inner] for node in graph["nodes"]} - own - set(known))


def samples(info):
    """Whether a node, as the server describes it, samples or guides: steps or conditioning in, latents or a guider out."""
    specs = info["input"].get("required", {}) | info["input"].get("optional", {})
    takes = {spec[0] for spec in specs.values() if isinstance(spec[0], str)}
    prepares = "MODEL" in info["output"] and "steps" not in specs
    return {"MODEL", "CONDITIONING"} <= takes and bool({"LATENT", "GUIDER"} & set(info["output"])) and not prepares


def sampled_models(prompt, known):
    """[(node, source)] of every MODEL wire into a sampler or guider of an API prompt."""
    names = {
        name: [key for part in info["input"].values() for key, spec in part.items() if spec[0] == "MODEL"]
        for name, info in known.items()
        if samples(info)
    }
    return [
        (node_id, node["inputs"][key][0])
        for node_id, node in prompt.items()
        for key in names.get(node["class_type"], [])
        if key in node["inputs"]
    ]
