#!/usr/bin/env bash
# comfyui-workflow-templates-json 0.1.123: of ComfyUI's 644 official workflows 16 contradict themselves. A link is written three
# times, in the list of links, at the output and at the input, and these disagree: twelve links of one subgraph end in nodes that are
# not there, fourteen outputs name links that are not in the list (video_ltx2_i2v.json is one), and two inputs name another
# link than the list has for them. Who reads workflows should take the list of links alone, and expect ends without a node.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --no-deps comfyui-workflow-templates-json==0.1.123
cat > "$folder/links.py" <<'PY'
import json
from collections import defaultdict
from pathlib import Path

import comfyui_workflow_templates_json as package

OUTSIDE = (-10, -20)  # the two ends of a subgraph
FIELDS = "id", "origin_id", "origin_slot", "target_id", "target_slot", "type"


def graphs(workflow):
    return [workflow, *(workflow.get("definitions") or {}).get("subgraphs", [])]


def contradictions(graph):
    """(what, node's type) of each end of a link that disagrees with the list of links."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = [link if isinstance(link, dict) else dict(zip(FIELDS, link)) for link in graph.get("links", [])]
    known = {link["id"] for link in links}
    for link in links:
        origin, target = nodes.get(link["origin_id"]), nodes.get(link["target_id"])
        if (origin is None and link["origin_id"] not in OUTSIDE) or (target is None and link["target_id"] not in OUTSIDE):
            yield "links to a node that is not there", "none"
        elif target is not None and target["inputs"][link["target_slot"]].get("link") != link["id"]:
            yield "inputs that name another link", target["type"]
    for node in nodes.values():
        for output in node.get("outputs") or []:
            for link in output.get("links") or []:
                if link not in known:
                    yield "outputs that name a link that is not there", node["type"]


found, read = defaultdict(list), 0
for path in sorted(Path(package.__file__).parent.rglob("*.json")):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(workflow, dict) or "nodes" not in workflow:
        continue
    read += 1
    for graph in graphs(workflow):
        for what, _ in contradictions(graph):
            found[what].append(path.name)
files = {name for names in found.values() for name in names}
assert read == 644, read
print(f"{read} workflows, {len(files)} of them contradict themselves")
for what, names in sorted(found.items()):
    print(f"{len(names)} {what}: {', '.join(sorted(set(names)))}")
counts = {what: len(names) for what, names in found.items()}
expected = {"links to a node that is not there": 12, "outputs that name a link that is not there": 14, "inputs that name another link": 2}
assert counts == expected, counts
assert "video_ltx2_i2v.json" in files
print("as seen before")
PY
"$folder/venv/bin/python" "$folder/links.py" || { echo "the templates' links are others now"; exit 1; }
