"""Writes locales/en/nodeDefs.json from what a real ComfyUI says about our nodes: python -m tooling.locales

Also copies each help page to en.md: an English page asks for docs/NODE/en.md first, every other language falls back on
docs/NODE.md. The nodes' own texts are the source; translations in locales/<language>/ must name the same keys (tests/web holds that).
"""

import json
import sys

from .pack_server import pack_server
from .paths import PACK_FOLDER, ROOT

ENGLISH = ROOT / "locales" / "en" / "nodeDefs.json"
HELP = ROOT / "web" / "docs"


def english(object_info):
    """{node id: texts} in the format of nodeDefs.json, of the nodes whose id begins with SLA2 and that are this pack's."""
    ours = {
        name: info
        for name, info in object_info.items()
        if name.startswith("SLA2") and info["python_module"].endswith(PACK_FOLDER)
    }
    return {name: _node_texts(info) for name, info in sorted(ours.items())}


def _node_texts(info):
    inputs = {
        name: _filled(name=name, tooltip=(spec[1] if len(spec) > 1 else {}).get("tooltip"))
        for part in ("required", "optional")
        for name, spec in info["input"].get(part, {}).items()
    }
    tooltips = info.get("output_tooltips") or [None] * len(info["output_name"])
    outputs = {
        str(number): _filled(name=name, tooltip=tooltip)
        for number, (name, tooltip) in enumerate(zip(info["output_name"], tooltips, strict=True))
    }
    texts = {"display_name": info["display_name"], "description": info["description"], "inputs": inputs}
    return texts | ({"outputs": outputs} if outputs else {})


def _filled(**texts):
    return {key: text for key, text in texts.items() if text}


def copy_help():
    for page in HELP.glob("*.md"):
        (HELP / page.stem / "en.md").write_bytes(page.read_bytes())


def main():
    copy_help()
    with pack_server() as server:
        texts = english(server.get("/object_info"))
    if not texts:
        sys.exit("ComfyUI did not load this pack: start it by hand to see why.")
    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    ENGLISH.write_text(json.dumps(texts, indent=2) + "\n", encoding="utf-8")
    print(f"{len(texts)} nodes: {ENGLISH.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
