"""The menu's "Accelerate with SLA2" and "Remove SLA2": on ComfyUI's official video templates, all in one page, and step by step."""

import json
import re
import time
import urllib.error
import urllib.request

import pytest
from canvas import CLOSE_MESSAGES, MESSAGE
from official_templates import missing_types, sampled_models, video_templates

from tooling.paths import ROOT

pytestmark = pytest.mark.web
APPLY = "SLA2ApplyAttention"
# the first table of templates: the most used that ComfyUI 0.33 has the nodes for
SECTION = (
    (ROOT / "docs/FAMILIES.md").read_text(encoding="utf-8").split("## ComfyUI's official templates")[1].split("###")[0]
)
DOCUMENTED = set(re.findall(r"^\| (video_\w+) \|", SECTION, re.M))
EXECUTE = "app.extensionManager.command.execute"
PROMPT = "(await app.graphToPrompt()).output"
OURS = (
    f"[app.rootGraph, ...app.rootGraph.subgraphs.values()].flatMap((g) => g.nodes.filter((n) => n.comfyClass === '{APPLY}')"
    ".map((n) => ({ id: String(n.id), preset: n.widgets.find((w) => w.name === 'preset').value,"
    " covers: g.nodes.filter((o) => o !== n && [0, 1].every((k) => o.pos[k] - 30 * k < n.pos[k] + n.size[k]"
    " && n.pos[k] - 30 * k < o.pos[k] + o.size[k])).map((o) => o.type) })))"
)
THERE_AND_BACK = f"""(async () => {{
  await app.loadGraphData(a);
  const plain = {PROMPT};
  await {EXECUTE}('SLA2.Accelerate');
  const [accelerated, ours] = [{PROMPT}, {OURS}];
  await {EXECUTE}('SLA2.Remove');
  {CLOSE_MESSAGES};
  return {{ plain, accelerated, ours, removed: {PROMPT}, left: {OURS}.length }};
}})()"""


@pytest.fixture(scope="module")
def known(server):
    return server.get("/object_info")


def server_says(server, prompt):
    """node_errors of a prompt that cannot run, for want of its models."""
    body = json.dumps({"prompt": prompt, "client_id": "templates"}).encode()
    try:
        with urllib.request.urlopen(server.url + "/prompt", body, timeout=60) as answer:
            said = json.loads(answer.read())
            server.post("/queue", {"delete": [said["prompt_id"]]})
    except urllib.error.HTTPError as error:
        said = json.loads(error.read())
    return said["node_errors"]


def check(server, known, result):
    """The wires of one template, accelerated and restored: how many MODELs of ours they come from."""
    plain, prompt = result["plain"], result["accelerated"]
    wires = sampled_models(prompt, known)
    assert len(wires) == len(sampled_models(plain, known)) > 0
    assert {prompt[source]["class_type"] for _, source in wires} == {APPLY}, wires
    assert result["removed"] == plain and result["left"] == 0
    assert [node["covers"] for node in result["ours"]] == [[]] * len(result["ours"])
    errors = server_says(server, plain)
    assert errors and server_says(server, prompt) == errors
    assert {node["preset"] for node in result["ours"]} == {"automatic"}
    return len({source for _, source in wires})


@pytest.mark.usefixtures("small_window")
def test_every_official_video_template_is_accelerated_and_restored(canvas, server, known):
    done, left_out = {}, {}
    for name, workflow in video_templates().items():
        missing = missing_types(workflow, known)
        if missing:
            left_out[name] = missing
            continue
        result = canvas.data(THERE_AND_BACK, workflow)
        if not sampled_models(result["plain"], known):
            left_out[name] = ["no sampler in use"]
            continue
        done[name] = check(server, known, result)
    print(*(f"\n{name}: {models}" for name, models in done.items()))
    print(*(f"\nleft out: {name}, for {', '.join(why)}" for name, why in left_out.items()))
    if "MiniMaxH3SigmaShift" in known:
        assert len(DOCUMENTED) == 16 and DOCUMENTED <= set(done)
    assert canvas.errors == []


def toasts(canvas):
    return " ".join(canvas.page.locator(MESSAGE).all_inner_texts())


def execute(canvas, command):
    """What the page says of it."""
    canvas.close_messages()
    canvas.js(f"{EXECUTE}(a)", command)
    canvas.page.wait_for_selector(MESSAGE)
    return toasts(canvas)


def settle(canvas):
    """Waits until nothing in the graph changes by itself: the page takes that for a step of the user's, and forgets what to redo."""
    before, deadline = None, time.monotonic() + 10
    while (now := canvas.js("JSON.stringify(app.graph.serialize())")) != before and time.monotonic() < deadline:
        before = now
        canvas.page.wait_for_timeout(300)


def nodes_after(canvas, keys, count):
    """How many nodes of ours the workflow has some time after these keys; ``count`` is waited for."""
    canvas.page.locator("#graph-canvas").focus()
    canvas.page.keyboard.press(keys)
    deadline = time.monotonic() + 30
    while len(canvas.js(OURS)) != count and time.monotonic() < deadline:
        canvas.page.wait_for_timeout(100)
    settle(canvas)
    return len(canvas.js(OURS))


def test_inside_a_subgraph_it_is_one_step_of_the_undo(canvas):
    canvas.load(video_templates()["video_wan2_2_14B_i2v"])
    settle(canvas)
    plain = canvas.prompt()
    # what an undo lays out late, on a busy machine, the page takes for the user's step, and forgets what to redo
    for _ in range(3):
        assert "SLA2 on 2 models" in execute(canvas, "SLA2.Accelerate")
        accelerated = canvas.prompt()
        assert accelerated != plain
        assert nodes_after(canvas, "Control+z", 0) == 0 and canvas.prompt() == plain
        redone = nodes_after(canvas, "Control+y", 2)
        if redone:
            break
    assert redone == 2 and canvas.prompt() == accelerated
    assert "SLA2 is already on 2 models" in execute(canvas, "SLA2.Accelerate")
    assert canvas.prompt() == accelerated
    assert "SLA2 removed from 2 models" in execute(canvas, "SLA2.Remove")
    assert nodes_after(canvas, "Control+z", 2) == 2 and canvas.prompt() == accelerated


def test_a_node_that_the_user_placed_is_kept(canvas, sampling_prompt):
    canvas.load_prompt(sampling_prompt)
    plain = canvas.prompt()
    assert "already on 1 model" in execute(canvas, "SLA2.Accelerate")
    assert "Nothing to remove" in execute(canvas, "SLA2.Remove")
    assert canvas.prompt() == plain
    canvas.js(f"{canvas.node(APPLY)}.mode = 4")
    assert "on again" in execute(canvas, "SLA2.Accelerate")
    assert canvas.prompt() == plain


def test_without_a_sampler_it_says_why_nothing_was_done(canvas, sampling_prompt):
    canvas.load_prompt({"1": sampling_prompt["1"]})
    assert "no MODEL wire reaches a sampler here" in execute(canvas, "SLA2.Accelerate")
    assert canvas.js("app.graph.nodes.length") == 1


def test_it_stands_in_the_menu_and_among_the_commands(server, canvas):
    texts = json.loads((ROOT / "locales/en/commands.json").read_text(encoding="utf-8"))
    store = "document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s"
    menu = f"{store}.get('menuItem').menuItems.find((m) => m.label === 'SLA2')"
    group = canvas.js(f"{menu}.items.map((item) => item.label)")
    commands = canvas.js(f"{store}.get('command').commands.filter((c) => c.id.startsWith('SLA2.')).map((c) => c.label)")
    assert group == commands == [entry["label"] for entry in texts.values()]
    served = server.get("/i18n")
    assert all(set(texts) <= set(served[language]["commands"]) for language in ("en", "zh"))
