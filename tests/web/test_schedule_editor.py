"""The map over the text of `schedule`: painting writes it, the text stays the truth, in both renderers."""

import pytest

pytestmark = pytest.mark.web
KIND = "SLA2ApplyAttention"
UNDO = "app.extensionManager.workflow.activeWorkflow.changeTracker.undo()"


@pytest.fixture(params=[False, True], ids=["classic", "vue"])
def renderer(request, canvas):
    canvas.look(vue=request.param)
    yield "vue" if request.param else "classic"
    assert canvas.errors == []


@pytest.fixture
def editor(canvas, renderer, sampling_prompt):
    # what a prompt leaves out keeps the value of the graph before it
    sampling_prompt["2"]["inputs"].update(preset="custom", schedule="")
    canvas.load_prompt(sampling_prompt)
    canvas.load(canvas.save())  # which gives it the id that a saved workflow has
    return Editor(canvas)


class Editor:
    """The map of the graph's SLA2 Apply Attention, which is made anew by every undo."""

    def __init__(self, canvas):
        self.canvas, self.page = canvas, canvas.page
        self.map = self.page.locator(".sla2-map canvas")
        self.summary = self.page.locator(".sla2 summary", has_text="Schedule as a map")

    def centre(self):
        self.canvas.js(f"(app.canvas.ds.scale = 0.7, app.canvas.centerOnNode({self.canvas.node(KIND)}))")
        self.canvas.rest()

    def open(self):
        self.centre()
        self.summary.click()
        self.canvas.rest()
        return self

    @property
    def text(self):
        return self.canvas.value(KIND, "schedule")

    def write(self, text):
        self.canvas.set(KIND, "schedule", text)

    def says(self):
        return self.page.locator(".sla2 details").inner_text()

    def brush(self, name):
        self.page.locator(".sla2-brushes button", has_text=name).click()

    def drag(self, start, end):
        """From the middle of one cell (column, layer) to that of another."""
        box = self.map.bounding_box()
        for n, (column, layer) in enumerate((start, end)):
            x, y = box["x"] + (column + 0.5) / 10 * box["width"], box["y"] + (layer + 0.5) / 30 * box["height"]
            self.page.mouse.move(x, y, steps=4)
            self.page.mouse.down() if n == 0 else self.page.mouse.up()
        self.settle()

    def settle(self):
        self.page.wait_for_timeout(250)  # changes within 50 ms become one step of the undo

    def undo(self):
        self.canvas.js(UNDO)
        self.canvas.rest()

    def redo(self):
        self.canvas.js(UNDO.replace("undo", "redo"))
        self.canvas.rest()

    def colour(self, column, layer, layers=30):
        """Of a cell's middle, as drawn."""
        return self.map.evaluate(
            "(c, a) => [...c.getContext('2d').getImageData(c.width * (a[0] + 0.5) / 10, c.height * (a[1] + 0.5) / a[2],"
            " 1, 1).data]",
            [column, layer, layers],
        )


def test_each_stroke_is_one_rule_and_one_step_of_the_undo(editor):
    editor.open()
    editor.write("layers 7: 0.85")
    editor.settle()
    editor.brush("dense")
    editor.drag((0, 0), (1, 29))
    assert editor.text == "layers 7: 0.85; 0%-20%: dense"
    editor.brush("0.95")
    editor.drag((9, 12), (5, 10))
    assert editor.text == "layers 7: 0.85; 0%-20%: dense; 50%-100%, layers 10-12: 0.95"
    editor.undo()
    assert editor.text == "layers 7: 0.85; 0%-20%: dense" and editor.map.is_visible()
    editor.undo()
    assert editor.text == "layers 7: 0.85"
    editor.redo()
    assert editor.text == "layers 7: 0.85; 0%-20%: dense"
    editor.redo()
    assert editor.text == "layers 7: 0.85; 0%-20%: dense; 50%-100%, layers 10-12: 0.95" and editor.map.is_visible()


def test_over_a_wire_there_is_nothing_to_paint(editor):
    canvas = editor.open().canvas
    canvas.js(
        "((text, node) => (app.graph.add(text), text.connect(0, node, 'schedule')))"
        f"(LiteGraph.createNode('PrimitiveStringMultiline'), {canvas.node(KIND)})"
    )
    assert "comes over a wire" in editor.says() and not editor.map.is_visible()


def test_a_stroke_over_painted_ones_takes_their_place_and_leaves_the_users_own(editor):
    editor.open()
    editor.write("layers -1: 0.9\n0%-5%: dense;")
    editor.drag((0, 0), (0, 0))
    editor.drag((2, 3), (2, 3))
    editor.brush("0.97")
    editor.drag((0, 0), (4, 29))
    assert editor.text == "layers -1: 0.9\n0%-50%: 0.97"


def test_typing_is_seen_in_the_map(editor):
    editor.open()
    editor.write("")
    plain = editor.colour(3, 5)
    editor.write("20%-50%, layers 5: dense")
    assert editor.colour(3, 5) == [240, 180, 41, 255] and editor.colour(3, 6) == editor.colour(7, 5) == plain
    editor.write("layers 39: dense")
    assert editor.colour(3, 39, 40) == [240, 180, 41, 255] and "40 are drawn" in editor.says()
    editor.canvas.set(KIND, "sparsity", 0.5)
    assert editor.colour(3, 5, 40) != plain


def test_a_rule_for_a_step_by_number_stays_and_is_not_drawn(editor):
    editor.open()
    editor.write("step 1: dense")
    assert "not drawn" in editor.says() and editor.colour(0, 0) == editor.colour(9, 29)
    editor.drag((0, 0), (9, 29))
    assert editor.text == "step 1: dense; 0%-100%: 0.9"


def test_what_cannot_be_read_stays_and_the_reason_is_said(editor):
    editor.open()
    editor.write("0%-20%: dense; first half: 0.9")
    assert '"first half" is no range of steps or layers.' in editor.says() and not editor.map.is_visible()
    assert editor.text == "0%-20%: dense; first half: 0.9"
    editor.write("0%-20%: dense")
    assert editor.map.is_visible()


def test_a_saved_workflow_holds_the_text_and_the_map_nothing(editor):
    editor.open()
    for text in ("0%-20%: dense; layers 3: 0.5", "first half: 0.9"):
        editor.write(text)
        saved = editor.canvas.save()
        node = next(node for node in saved["nodes"] if node["type"] == KIND)
        assert [value for value in node["widgets_values"] if value == text] == [text]
        prompt = editor.canvas.prompt()
        inputs = {name for name in prompt["2"]["inputs"] if name.startswith("sla2_")}
        assert prompt["2"]["inputs"]["schedule"] == text and inputs == set()
        editor.write("")
        editor.canvas.load(saved)
        assert editor.text == text and editor.canvas.value(KIND, "preset") == "custom"
        assert editor.map.is_visible() == (text != "first half: 0.9")


def test_it_is_painted_by_keyboard(editor):
    editor.summary.focus()
    editor.page.keyboard.press("Enter")
    editor.settle()
    editor.page.locator(".sla2-brushes button", has_text="0.80").focus()
    editor.page.keyboard.press("Space")
    editor.map.focus()
    for key in ("ArrowDown", "ArrowRight", "Shift+ArrowRight", "Shift+ArrowDown"):
        editor.page.keyboard.press(key)
    assert "20%-30%, layer 2: sparsity 0.75" in editor.says()
    editor.page.keyboard.press("Enter")
    editor.settle()
    assert editor.text == "10%-30%, layers 1-2: 0.8"
    editor.undo()
    assert editor.text == ""


def test_a_preset_hides_it(editor):
    editor.open()
    editor.canvas.set(KIND, "preset", "balanced")
    assert not editor.map.is_visible()
    editor.canvas.set(KIND, "preset", "custom")
    assert editor.map.is_visible()


def test_the_training_suggests_a_schedule(editor, renderer):
    canvas = editor.open().canvas
    canvas.load(canvas.save())  # which gives it the id that a saved workflow has
    editor.centre()
    suggest = editor.page.get_by_role("button", name="Suggest from training")
    suggest.click()
    assert "run SLA2 Train Router" in editor.says() and editor.text == ""
    editor.write("0%-10%: dense; layers 0: 0.5; step 1: dense")
    editor.settle()
    event = {
        "node": "8",
        "workflow": canvas.js("app.rootGraph.id"),
        "headline": "trained",
        "curves": {"at": [], "steps": 0, "mean": [], "low": [], "high": []},
        "suggestion": {"schedule": "layers 0, 2: 0.9; layers 1: 0.97", "layers": 3},
    }
    canvas.js(
        "(app.graph.add(Object.assign(LiteGraph.createNode('SLA2TrainRouter'), { id: 8 })),"
        " app.api.dispatchEvent(new CustomEvent('sla2.training', { detail: a })))",
        event,
    )
    suggest.click()
    editor.settle()
    canvas.picture(f"suggested_{renderer}")
    assert (
        editor.text == "layers 0, 2: 0.9; layers 1: 0.97; 0%-10%: dense; step 1: dense"
        and "unknown" not in editor.says()
    )
    editor.undo()
    assert editor.text == "0%-10%: dense; layers 0: 0.5; step 1: dense"


def test_an_open_map_is_one_workflows_alone(editor, canvas):
    is_open = (
        f"{canvas.node(KIND)}.widgets.find((w) => w.name === 'sla2_schedule').element.querySelector('details').open"
    )
    editor.open()
    saved = canvas.save()
    found = [canvas.js(is_open)]
    for other in ({"id": "11111111-2222-4333-8444-555555555555"}, {}):
        canvas.load(saved | other)
        found.append(canvas.js(is_open))
    assert found == [True, False, True]
