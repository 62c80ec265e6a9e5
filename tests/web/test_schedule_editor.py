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
    canvas.load_prompt(sampling_prompt)
    return Editor(canvas)


class Editor:
    """The map of the graph's SLA2 Apply Attention, which is made anew by every undo."""

    def __init__(self, canvas):
        self.canvas, self.page = canvas, canvas.page
        self.map = self.page.locator(".sla2-map canvas")
        self.summary = self.page.locator(".sla2 summary", has_text="Schedule as a map")

    def open(self):
        self.canvas.js(f"app.canvas.centerOnNode({self.canvas.node(KIND)})")
        self.summary.click()
        self.page.wait_for_timeout(300)
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
        self.page.wait_for_timeout(400)

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
