"""Takes the pictures of the bundled workflows that the template browser shows: python -m tooling.thumbnails [NAME ...]

Those of tooling/recipes get a drawn card, the others a picture of their graph.
Needs ComfyUI, Playwright, Chromium, and fonts for every script that a workflow holds (on Debian fonts-noto-cjk for the
default negative prompt of Wan, which is Chinese): where a font is missing, its letters are empty boxes.
"""

import argparse
import json

from miniature.captions import split_captions
from miniature.images import to_bytes, write_png
from miniature.videos import render, simulate

from .browser import find_chromium, open_chromium
from .environment import say
from .pack_server import pack_server
from .paths import ROOT
from .recipes.cards import CARDS, SIZE, card

WORKFLOWS = ROOT / "workflows"
WIDTH, MARGIN = 1430, 30
LARGEST = 160_000  # bytes: 12 of them are less than 2 MB of every clone
READY = "window.app?.graph && window.app.canvas && Object.keys(LiteGraph.registered_node_types).length > 100"
# nodes and groups, with titles; Note and MarkdownNote are longer than what a picture shows, so they count, too
BOUNDS = """() => {
  const boxes = [...app.graph.nodes.map((n) => [n.pos[0], n.pos[1] - 40, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]),
                 ...app.graph.groups.map((g) => [g.pos[0], g.pos[1], g.pos[0] + g.size[0], g.pos[1] + g.size[1]])];
  return [0, 1, 2, 3].map((i) => (i < 2 ? Math.min : Math.max)(...boxes.map((box) => box[i])));
}"""
PLACE = """([left, top, scale, margin]) => {
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [margin / scale - left, margin / scale - top];
  app.canvas.setDirty(true, true);
}"""
# nothing but the graph, and the widgets that the page lays over it
BARE = "body * { visibility: hidden } #graph-canvas, .dom-widget, .dom-widget * { visibility: visible }"


def lay_out_files(base, workflow):
    """What the workflow names, the models empty: the page draws nodes whose file is missing in red."""
    for node in workflow["nodes"]:
        for model in node.get("properties", {}).get("models", ()):
            folder = base / "models" / model["directory"]
            folder.mkdir(exist_ok=True)
            (folder / model["name"]).touch()
        if node["type"] == "LoadImage":
            write_png(base / "input" / node["widgets_values"][0], a_frame())


def a_frame():
    """(480, 832, 3) uint8: a scene of the miniature's kind."""
    caption = next(caption for caption in split_captions()[0] if "blue stars" in str(caption))
    scene = simulate([caption], frames=1, height=480, width=832, seed=1)
    return to_bytes(render(scene, frames=1, height=480, width=832)[0])[0]


def picture(page, workflow, path):
    """Writes the JPEG of one workflow, as wide as WIDTH, its whole graph in view."""
    page.set_viewport_size({"width": WIDTH, "height": 800})
    page.evaluate("(w) => app.loadGraphData(w)", workflow)
    page.wait_for_timeout(1000)
    left, top, right, bottom = page.evaluate(BOUNDS)
    scale = (WIDTH - 2 * MARGIN) / (right - left)
    page.set_viewport_size({"width": WIDTH, "height": round((bottom - top) * scale) + 2 * MARGIN})
    page.wait_for_timeout(300)
    page.evaluate(PLACE, [left, top, scale, MARGIN])
    page.wait_for_timeout(700)
    shoot(page, path)


def draw_card(browser, name, path):
    """Writes the JPEG of a workflow's card."""
    page = browser.new_page(viewport=SIZE)
    page.set_content(card(name))
    shoot(page, path)
    page.close()


def shoot(page, path):
    for quality in (88, 80, 70, 60, 50, 40):
        page.screenshot(path=path, type="jpeg", quality=quality)
        if path.stat().st_size <= LARGEST:
            break


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    parser.add_argument("names", nargs="*", default=known, metavar="NAME", help="workflows (all)")
    names = parser.parse_args().names
    from playwright.sync_api import sync_playwright

    workflows = {name: json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    with pack_server() as server, sync_playwright() as driver:
        for workflow in workflows.values():
            lay_out_files(server.base, workflow)
        browser = open_chromium(driver, find_chromium())
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_function(READY, timeout=60_000)
        page.add_style_tag(content=BARE)
        for name, workflow in workflows.items():
            path = WORKFLOWS / f"{name}.jpg"
            if name in CARDS:
                draw_card(browser, name, path)
            else:
                picture(page, workflow, path)
            say(f"workflows/{name}.jpg")
        browser.close()


if __name__ == "__main__":
    main()
