"""What our nodes show and hide in the page, in the classic canvas and as Vue nodes, light and dark."""

import itertools
import json
import re
import time

import pytest
from canvas import Canvas

from tooling.paths import PACK_FOLDER

pytestmark = pytest.mark.web
LOOKS = [(False, False), (False, True), (True, False), (True, True)]
# the routing map, not the schedule's
REPORT_CANVAS = ".sla2 canvas:not(.sla2-map *)"
seeds = itertools.count(100)


def look_name(look):
    return f"{'vue' if look[0] else 'classic'}_{'light' if look[1] else 'dark'}"


@pytest.fixture(params=LOOKS, ids=look_name)
def look(request, canvas):
    canvas.look(*request.param)
    yield look_name(request.param)
    assert canvas.errors == []


@pytest.fixture(params=[False, True], ids=["classic", "vue"])
def renderer(request, canvas):
    canvas.look(vue=request.param)
    yield "vue" if request.param else "classic"
    assert canvas.errors == []


def is_shown(canvas, renderer, label, shown=True):
    """Whether the page draws (or, where not ``shown``, has stopped drawing) a widget of SLA2 Apply Attention."""
    node = canvas.node("SLA2ApplyAttention")
    if renderer == "classic":
        return canvas.js(f"{node}.isWidgetVisible({node}.widgets.find((w) => w.name === a))", label) == shown
    drawn = canvas.page.locator(f"[data-node-id='{canvas.js(node + '.id')}']").get_by_text(label, exact=True)
    deadline = time.monotonic() + 30
    while (drawn.count() > 0) != shown and time.monotonic() < deadline:
        canvas.page.wait_for_timeout(50)
    return (drawn.count() > 0) == shown


def top(canvas, renderer, label):
    """How far down a widget of SLA2 Apply Attention is drawn."""
    node = canvas.node("SLA2ApplyAttention")
    if renderer == "classic":
        canvas.js("app.canvas.draw(true, true)")
        return canvas.js(f"{node}.widgets.find((w) => w.name === a).y", label)
    drawn = canvas.page.locator(f"[data-node-id='{canvas.js(node + '.id')}']").get_by_text(label, exact=True)
    return drawn.bounding_box()["y"]


def unfold(canvas, renderer):
    """The button for the advanced inputs: ours in the classic canvas, the page's own in Nodes 2.0."""
    if renderer == "classic":
        canvas.js(f"{canvas.node('SLA2ApplyAttention')}.widgets.find((w) => w.name === 'sla2_advanced').callback()")
    else:
        node = canvas.js(f"{canvas.node('SLA2ApplyAttention')}.id")
        canvas.page.locator(f"[data-node-id='{node}']").get_by_text("Show advanced inputs").click()


def colours(canvas, selector):
    """Number of different colours in a canvas of the page."""
    return canvas.js(
        "((c) => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size)"
        "(document.querySelector(a))",
        selector,
    )


def test_after_a_run_the_nodes_say_what_happened(canvas, look, sampling_prompt):
    sampling_prompt["6"]["inputs"]["seed"] = next(seeds)
    canvas.load_prompt(sampling_prompt)
    assert canvas.panel("SLA2ApplyAttention") is None
    canvas.queue()
    canvas.picture(f"apply_{look}", "SLA2ApplyAttention")
    text = canvas.panel("SLA2ApplyAttention")
    head, detail = [line for line in text.splitlines() if line][:2]
    assert re.match(
        r"(saved [\d.]+ s of attention in this run|attention took [\d.]+ s longer than dense in this run)"
        r" · skips 75%, keeps 25% · attention error \d\.\d\d",
        head,
    )
    assert re.match(r"6 of 9 attention calls accelerated · [\d.]+x (faster|slower) per call", detail)
    assert "3 calls ran dense: dense_layers keeps this layer dense" in text
    canvas.picture(f"report_{look}", "SLA2Report")
    bars = canvas.page.locator(".sla2 svg g title")
    assert [bar.split("\n")[0] for bar in bars.all_text_contents()] == [
        "layer 0: 3 accelerated, 0 dense",
        "layer 1: 0 accelerated, 3 dense",
        "layer 2: 3 accelerated, 0 dense",
    ]
    bars_are_coloured_by_error(canvas)
    assert colours(canvas, REPORT_CANVAS) >= 2
    choose_by_keyboard(canvas)
    scrolling = "[...document.querySelectorAll('.sla2')].filter((e) => e.scrollHeight > e.clientHeight).length"
    assert canvas.js(scrolling) == 0, "a panel is as high as what it shows"
    # a bypassed node says so, and what it said again where it is on and nothing is sampled anew
    modes = ((4, "Switched off"), (0, "6 of 9 attention calls accelerated"))
    for mode, words in modes if look in ("classic_dark", "vue_light") else ():
        canvas.js(f"({canvas.node('SLA2ApplyAttention')}.mode = a)", mode)
        canvas.queue()
        assert words in canvas.panel("SLA2ApplyAttention")


def bars_are_coloured_by_error(canvas):
    """The larger a layer's attention error, the more of the second colour; full at 0.3. A layer that ran dense has no bar."""
    bars = canvas.js(
        "[...document.querySelectorAll('.sla2 svg g')].map((bar) => [bar.querySelector('title').textContent, "
        "getComputedStyle(bar.querySelectorAll('rect')[1]).fill])"
    )
    measured = [(re.search(r"attention error (\S+)", title), fill) for title, fill in bars]
    errors = [float(found[1]) for found, _ in measured if found]
    assert len(errors) == 2  # of three layers, one of which ran dense
    for found, fill in measured:
        red = float(re.search(r"[\d.]+", fill.removeprefix("color(srgb"))[0]) * (255 if "srgb" in fill else 1)
        share = min(1, float(found[1]) / 0.3) if found else 0
        assert red == pytest.approx(0x2F + share * (0xE0 - 0x2F), abs=2)
    assert "orange: 0.3 or more" in canvas.panel("SLA2Report")


def test_another_workflow_with_the_same_settings_is_told_on_its_own_node(canvas, sampling_prompt):
    sampling_prompt["6"]["inputs"]["seed"] = next(seeds)
    canvas.load_prompt(sampling_prompt)
    canvas.queue()
    other = json.loads(json.dumps(sampling_prompt).replace('["2", 0]', '["20", 0]'))
    other["20"], other["2"] = other["2"], other.pop("5")
    other["6"]["inputs"] |= {"latent_image": ["2", 0], "seed": next(seeds)}
    canvas.load_prompt(other)
    canvas.queue()
    assert "6 of 9 attention calls accelerated" in (canvas.panel("SLA2ApplyAttention") or "")
    assert canvas.panel("EmptyHunyuanLatentVideo") is None


def choose_by_keyboard(canvas):
    """Another layer and step of the routing map."""
    layer, step = canvas.page.locator(".sla2 select").all()
    assert layer.locator("option").all_text_contents() == ["0", "2"]
    assert step.locator("option").all_text_contents() == ["1", "2", "3"]
    drawn = canvas.page.locator(REPORT_CANVAS)
    first = drawn.evaluate("(c) => c.toDataURL()")
    for choice in (layer, step):
        choice.focus()
        canvas.page.keyboard.press("ArrowDown")
    assert drawn.get_attribute("aria-label") == "routing map of layer 2, step 2"
    assert drawn.evaluate("(c) => c.toDataURL()") != first


def test_a_run_whose_every_call_is_dense_says_why(canvas, sampling_prompt):
    canvas.look()
    sampling_prompt["2"]["inputs"].update(minimum_tokens=-1, dense_layers="")
    sampling_prompt["6"]["inputs"]["seed"] = next(seeds)
    canvas.load_prompt(sampling_prompt)
    canvas.queue()
    text = canvas.panel("SLA2ApplyAttention")
    assert "0 of 9 attention calls accelerated" in text
    assert "9 calls ran dense: the sequence has 768 tokens, minimum_tokens is 8192" in text
    assert canvas.page.locator(".sla2 .sla2-warn").count() == 1
    assert canvas.page.locator(REPORT_CANVAS).count() == 0


def test_markup_from_the_server_stays_text(canvas, sampling_prompt):
    canvas.look()
    canvas.load_prompt(sampling_prompt)
    evil = "<img src=x onerror=window.broken=1><b>bold</b>"
    detail = {"headline": evil, "reasons": [evil], "accelerated": 1, "calls": 1, "node": "2", "workflow": None}
    canvas.js("app.api.dispatchEvent(new CustomEvent('sla2.outcome', { detail: a }))", detail)
    canvas.rest()
    assert evil in canvas.panel("SLA2ApplyAttention")
    assert canvas.page.locator(".sla2 :is(img, b)").count() == 0 and canvas.js("window.broken === undefined")


def test_fixed_ratio_is_shown_only_where_it_counts(canvas, renderer, sampling_prompt):
    canvas.load_prompt(sampling_prompt)
    kind = "SLA2ApplyAttention"
    unfold(canvas, renderer)
    assert is_shown(canvas, renderer, "fixed_ratio", False) and is_shown(canvas, renderer, "start_percent")
    canvas.set(kind, "ratio_mode", "fixed")
    assert is_shown(canvas, renderer, "fixed_ratio")
    canvas.picture(f"fixed_{renderer}", kind)
    canvas.set(kind, "fixed_ratio", 0.35)
    canvas.set(kind, "ratio_mode", "estimated")
    assert is_shown(canvas, renderer, "fixed_ratio", False) and canvas.value(kind, "fixed_ratio") == 0.35
    saved = canvas.save()
    prompt = canvas.prompt()
    assert prompt["2"]["inputs"]["fixed_ratio"] == 0.35
    canvas.load(saved)
    assert canvas.value(kind, "fixed_ratio") == 0.35 and is_shown(canvas, renderer, "fixed_ratio", False)
    assert canvas.value(kind, "on_unsupported") == "run dense and say so"
    canvas.set(kind, "ratio_mode", "fixed")
    assert is_shown(canvas, renderer, "fixed_ratio") and canvas.value(kind, "fixed_ratio") == 0.35


def test_a_preset_hides_what_it_fills_in(canvas, renderer, sampling_prompt):
    canvas.load_prompt(sampling_prompt)
    kind = "SLA2ApplyAttention"
    options = canvas.js(f"{canvas.node(kind)}.widgets.find((w) => w.name === 'preset').options.values")
    assert is_shown(canvas, renderer, "sparsity")
    canvas.set(kind, "preset", "balanced")
    assert "custom" in options and is_shown(canvas, renderer, "sparsity", False)
    canvas.picture(f"preset_{renderer}", kind)
    canvas.set(kind, "preset", "custom")
    assert is_shown(canvas, renderer, "sparsity") and canvas.value(kind, "sparsity") == 0.75


def test_the_preset_comes_first_and_expert_inputs_are_folded_away(canvas, renderer, sampling_prompt):
    expert = ("bit_width", "start_percent", "minimum_tokens", "target_error")
    sampling_prompt["2"]["inputs"].update(preset="custom", minimum_tokens=-1, dense_layers="", bit_width="auto")
    canvas.load_prompt(sampling_prompt)
    canvas.js(f"(app.canvas.ds.scale = 0.7, app.canvas.centerOnNode({canvas.node('SLA2ApplyAttention')}))")
    assert all(is_shown(canvas, renderer, name, False) for name in expert)
    assert top(canvas, renderer, "preset") < top(canvas, renderer, "sparsity")
    canvas.picture(f"folded_{renderer}")
    order = canvas.js(f"{canvas.node('SLA2ApplyAttention')}.widgets.map((w) => w.name)")
    unfold(canvas, renderer)
    assert all(is_shown(canvas, renderer, name) for name in expert)
    assert top(canvas, renderer, "preset") < min(top(canvas, renderer, name) for name in ("sparsity", *expert))
    canvas.picture(f"unfolded_{renderer}")
    assert canvas.js(f"{canvas.node('SLA2ApplyAttention')}.widgets.map((w) => w.name)") == order
    # a workflow from before anything was folded, as it is and with one of these inputs set
    saved = canvas.save()
    node = next(node for node in saved["nodes"] if node["type"] == "SLA2ApplyAttention")
    assert node.pop("showAdvanced") and "sla2_advanced" not in node["widgets_values_named"]
    canvas.load(saved)
    assert is_shown(canvas, renderer, "minimum_tokens", False)
    node["widgets_values_named"]["minimum_tokens"] = 0
    node["widgets_values"][node["widgets_values"].index(-1)] = 0
    canvas.load(saved)
    assert is_shown(canvas, renderer, "minimum_tokens")


def test_hidden_values_survive_undo(canvas, renderer, sampling_prompt):
    canvas.load_prompt(sampling_prompt)
    kind, tracker = "SLA2ApplyAttention", "app.extensionManager.workflow.activeWorkflow.changeTracker"
    capture = f"({tracker}.captureCanvasState ?? {tracker}.checkState).call({tracker})"
    canvas.set(kind, "fixed_ratio", 0.4)
    canvas.js(capture)
    canvas.page.wait_for_timeout(150)  # changes within 50 ms become one step of the undo
    canvas.set(kind, "ratio_mode", "fixed")
    canvas.js(capture)
    canvas.page.wait_for_timeout(150)  # changes within 50 ms become one step of the undo
    canvas.js(f"{tracker}.undo()")
    canvas.rest()
    assert canvas.value(kind, "ratio_mode") == "learned" and canvas.value(kind, "fixed_ratio") == 0.4
    assert is_shown(canvas, renderer, "fixed_ratio", False)


def test_after_an_undo_the_page_shows_the_panels_of_the_new_node(canvas, renderer, sampling_prompt):
    sampling_prompt["6"]["inputs"]["seed"] = next(seeds)
    canvas.load_prompt(sampling_prompt)
    canvas.load(canvas.save())  # which gives it the id that a saved workflow has
    canvas.queue()
    kind, tracker = "SLA2ApplyAttention", "app.extensionManager.workflow.activeWorkflow.changeTracker"
    capture = f"({tracker}.captureCanvasState ?? {tracker}.checkState).call({tracker})"
    canvas.js(f"({capture}, {canvas.node(kind)}.isOld = true)")
    canvas.page.wait_for_timeout(150)  # changes within 50 ms become one step of the undo
    canvas.set(kind, "fixed_ratio", 0.4)
    canvas.js(capture)
    canvas.page.wait_for_timeout(150)
    canvas.js(f"{tracker}.undo()")
    canvas.rest()
    assert not canvas.js(f"{canvas.node(kind)}.isOld")
    canvas.js(f"(app.canvas.ds.scale = 0.7, app.canvas.centerOnNode({canvas.node(kind)}))")
    canvas.rest()
    panels = canvas.js(f"{canvas.node(kind)}.widgets.filter((w) => w.element?.dataset.panel).map((w) => w.name)")
    shown = canvas.js(
        f"{canvas.node(kind)}.widgets.filter((w) => w.element?.getBoundingClientRect().height > 9"
        " && w.element.isConnected).map((w) => w.name)"
    )
    assert set(panels) == {"sla2_schedule", "sla2_panel"} <= set(shown)
    assert canvas.page.locator(".sla2", has_text="6 of 9 attention calls accelerated").count() == 1


def test_in_a_subgraph_modes_and_outcome_work(canvas, renderer, sampling_prompt):
    sampling_prompt["6"]["inputs"]["seed"] = next(seeds)
    canvas.load_prompt(sampling_prompt)
    kind = "SLA2ApplyAttention"
    canvas.set(kind, "fixed_ratio", 0.45)
    made = canvas.js(f"app.graph.convertToSubgraph(new Set([{canvas.node(kind)}])).node.id")
    canvas.queue()
    canvas.js("app.canvas.openSubgraph(app.graph.getNodeById(a).subgraph, app.graph.getNodeById(a))", made)
    canvas.rest()
    assert "6 of 9 attention calls accelerated" in canvas.panel(kind)
    assert canvas.value(kind, "fixed_ratio") == 0.45 and is_shown(canvas, renderer, "fixed_ratio", False)
    canvas.set(kind, "ratio_mode", "fixed")
    assert is_shown(canvas, renderer, "fixed_ratio") and canvas.value(kind, "fixed_ratio") == 0.45
    canvas.picture(f"subgraph_{renderer}")
    canvas.js("app.canvas.setGraph(app.rootGraph)")
    prompt = canvas.prompt()
    inner = next(entry for entry in prompt.values() if entry["class_type"] == kind)
    assert inner["inputs"]["fixed_ratio"] == 0.45 and inner["inputs"]["ratio_mode"] == "fixed"


def test_another_tab_and_back_shows_the_outcome_again(canvas, sampling_prompt):
    canvas.look(vue=True)
    sampling_prompt["6"]["inputs"]["seed"] = next(seeds)
    canvas.load_prompt(sampling_prompt)
    canvas.load(canvas.save())  # which gives it the id that a saved workflow has
    canvas.queue()
    saved = canvas.save()
    canvas.load_prompt({"1": sampling_prompt["1"]})
    canvas.load(saved)
    assert "6 of 9 attention calls accelerated" in canvas.panel("SLA2ApplyAttention")


def test_while_a_router_trains_its_loss_is_drawn(canvas, renderer, sampling_prompt):
    sampler = {"seed": next(seeds), "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    train = {"sparsities": "0.75", "training_steps": 8, "learning_rate": 0.003, "query_blocks": 4}
    links = {"model": ["1", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]}
    nodes = {name: sampling_prompt[name] for name in ("1", "3", "4", "5")}
    nodes["8"] = {"class_type": "SLA2TrainRouter", "inputs": links | sampler | train}
    nodes["9"] = {"class_type": "SLA2SaveRouter", "inputs": {"router": ["8", 0], "filename_prefix": "trained"}}
    canvas.load_prompt(nodes)
    canvas.js(
        "(window.seen = [], window.listens ??= "
        "app.api.addEventListener('sla2.training', (e) => window.seen.push(e.detail.curves.steps)) ?? true)"
    )
    canvas.queue()
    canvas.picture(f"training_{renderer}", "SLA2TrainRouter")
    assert canvas.js("window.seen") == [4, 8, 8, 8, 8], "two steps that train, two that measure, the end"
    assert canvas.page.locator(".sla2 svg polyline").count() == 1
    assert "step 8" in canvas.page.locator(".sla2 svg").text_content()
    assert "mean loss" in canvas.panel("SLA2TrainRouter")


@pytest.fixture(scope="module")
def chinese(server, browser, pictures):
    """A page of its own, in the language that its browser asks for."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, locale="zh-CN")
    yield Canvas(context.new_page(), server.url, pictures)
    context.close()


REFUSED = [
    ("2", {"dense_layers": "0\uff0cfirst"}, "而 'first' 不是层或层的范围。"),
    ("2", {"schedule": "layers 3-1: dense"}, "时间表（schedule）中范围 '3-1' 的终点小于起点。"),
    ("2", {"schedule": "0%-20% dense"}, "而 '0%-20% dense' 中没有冒号。"),
    ("2", {"schedule": "first half: dense"}, "而 'first half' 不是步骤或层的范围。"),
    ("2", {"schedule": "50%-20%: dense"}, "步骤 '50%-20%' 必须递增，且在 0% 到 100% 之间。"),
    ("2", {"schedule": "step 0: dense"}, "步骤 'step 0'：步号从 1 开始，且必须递增。"),
    ("2", {"schedule": "0%-20%: 1.5"}, "且小于 1 的稀疏度，而现在是 '1.5'。"),
    ("2", {"schedule": "1" * 301}, "有一条 301 个字符的规则：最多 300 个。"),
    ("2", {"start_percent": 0.8, "end_percent": 0.2}, "且都在 0 到 1 之间，而现在是 0.8 和 0.2。"),
    ("2", {"preset": "automatic", "method": "top-k only"}, "请将预设设为 custom，并设置稀疏度。"),
    ("8", {"sparsities": "0.9; 1.5"}, "稀疏度列表（sparsities）必须是 0 到 1 之间互不相同的数"),
    ("9", {"filename_prefix": "../x"}, "SLA2 保存路由器：文件名前缀（filename_prefix）必须是 models/sla2 之内的名称"),
]


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_why_a_prompt_is_refused_is_shown_in_the_pages_language(chinese, vue, sampling_prompt):
    chinese.look(vue=vue)
    links = {"model": ["1", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]}
    train = {"sparsities": "0.75", "training_steps": 8, "learning_rate": 0.003, "query_blocks": 4}
    sampling_prompt["8"] = {"class_type": "SLA2TrainRouter", "inputs": links | sampling_prompt["6"]["inputs"] | train}
    sampling_prompt["9"] = {"class_type": "SLA2SaveRouter", "inputs": {"router": ["8", 0], "filename_prefix": "x"}}
    for name, settings, sentence in REFUSED[:1] + REFUSED[-1:] if vue else REFUSED:
        prompt = json.loads(json.dumps(sampling_prompt))
        for other in ("8", "9") if name == "2" else ("6", "7"):
            del prompt[other]
        prompt["2"]["inputs"] |= {"schedule": "", "method": "automatic", "dense_layers": ""}
        prompt[name]["inputs"] |= settings
        chinese.load_prompt(prompt)
        chinese.js("app.queuePrompt(0, 1)")
        chinese.page.get_by_text(sentence).first.wait_for()
        chinese.picture(f"refused_{'vue' if vue else 'classic'}_{name}")
    assert chinese.errors == []


def test_the_pages_default_graph_takes_no_file_of_the_miniature(canvas):
    """Refused as without the miniature, whose VAE became what the graph was to run with where there was no other."""
    canvas.js("app.loadGraphData()")
    for kind, name, ours in (("VAELoader", "vae_name", "vae"), ("UNETLoader", "unet_name", "dit")):
        files = canvas.js(f"{canvas.node(kind)}.widgets.find((w) => w.name === '{name}').options.values")
        assert f"wan_miniature_{ours}.safetensors" in files
        assert canvas.value(kind, name) == next(file for file in files if not file.startswith("wan_miniature_"))
    answer = canvas.js(
        "app.graphToPrompt().then((p) => fetch('/prompt', { method: 'POST', body: JSON.stringify({ prompt: p.output }) }))"
        ".then((r) => r.json())"
    )
    assert [node["class_type"] for node in answer["node_errors"].values()] == ["CLIPLoader"]
    node = (
        "{ widgets_values: [a], widgets: [{ value: 'wan_miniature_dit', options: { values: ['wan_miniature_dit'] } }] }"
    )
    left = f"((n) => (m.leaveOutMiniature(n), n.widgets[0].value))({node})"
    script = f"import('/extensions/{PACK_FOLDER}/js/miniature_files.js').then((m) => {left})"
    assert canvas.js(script, "z_image.safetensors") == "z_image.safetensors"
    assert canvas.js(script, "wan_miniature_dit") == "wan_miniature_dit"
