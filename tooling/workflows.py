"""Writes workflows/ and subgraphs/ as ComfyUI's page saves them: python -m tooling.workflows [FILE ...]

Those of tooling/recipes are built anew; the others are loaded from their files.
Run it after a workflow was changed, and at a release, whose version every node of ours carries. Needs ComfyUI, Playwright and
Chromium. The page turns its graph into text itself: handed through the browser driver, an object has null wherever the page
has undefined, and the page's own schema refuses that.
"""

import argparse
import json
import re
import uuid
from pathlib import Path

from .browser import find_chromium, open_chromium
from .environment import say
from .pack_server import pack_server
from .paths import PACK_FOLDER, ROOT
from .recipes import RECIPES
from .recipes.in_page import build

READY = "window.app?.graph && window.app.canvas && Object.keys(LiteGraph.registered_node_types).length > 100"

BUILT = {ROOT / "workflows" / f"{name}.json": recipe for name, recipe in RECIPES.items()}
SHIPPED = sorted({*(ROOT / "workflows").glob("*.json"), *BUILT}) + sorted((ROOT / "subgraphs").glob("*.json"))
# where the page itself writes null: nothing is connected
NULL_IS_A_VALUE = ("link", "links")
LOAD = "(w) => app.loadGraphData(w)"
SAVED = "() => JSON.stringify(app.rootGraph.serialize())"


def project_field(name):
    """What pyproject.toml says of "name", "version" or "requires-comfyui", the latter without its comparison."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(rf'^{name} = "(?:>=)?(.+?)"', text, re.MULTILINE)[1]


def origins():
    """{"ours" and "core": what their nodes carry as properties}: the page names what is missing, and from which version, by it.

    Of core that is the oldest ComfyUI that the pack claims, for which the workflows are made.
    """
    return {
        "ours": {"cnr_id": project_field("name"), "ver": project_field("version")},
        "core": {"cnr_id": "comfy-core", "ver": project_field("requires-comfyui")},
    }


def graphs(workflow):
    """The workflow's own graph and those of its subgraphs, as saved."""
    return [workflow, *(workflow.get("definitions") or {}).get("subgraphs", ())]


def without_nulls(value):
    """A saved value without the keys whose null the page's schema refuses."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None or key in NULL_IS_A_VALUE}
        return {key: without_nulls(item) for key, item in kept.items()}
    return value


def name_origins(workflow, object_info):
    """Every node that the server knows gets its origin. object_info: of GET /object_info."""
    for graph in graphs(workflow):
        for node in graph["nodes"]:
            if node["type"] in object_info:
                ours = object_info[node["type"]]["python_module"].endswith(PACK_FOLDER)
                node["properties"] |= origins()["ours" if ours else "core"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=SHIPPED, metavar="FILE", help="workflows (all)")
    files = parser.parse_args().files
    from playwright.sync_api import sync_playwright

    with pack_server() as server, sync_playwright() as driver:
        browser = open_chromium(driver, find_chromium())
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_function(READY, timeout=60_000)
        for file in map(Path.absolute, files):
            if file in BUILT:
                build(page, BUILT[file])
                workflow = json.loads(page.evaluate(SAVED))
            else:
                workflow = without_nulls(json.loads(file.read_text(encoding="utf-8")))
            name_origins(workflow, server.get("/object_info"))
            page.evaluate(LOAD, workflow)
            saved = json.loads(page.evaluate(SAVED))
            # the page's is new each time, as is where it looked; it keeps by id what a run told of a workflow
            saved["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, file.name))
            saved["extra"].pop("ds", None)
            file.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            say(file.name)
        browser.close()


if __name__ == "__main__":
    main()
