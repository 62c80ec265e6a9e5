"""The page as the tests use it: graphs from API prompts, both renderers, both themes, prompts queued from the page."""

import json
import time

# the page goes on after its nodes are known: it loads a first workflow over whatever is shown, and a while later is at rest
READY = (
    "window.app?.graph && window.app.canvas && Object.keys(LiteGraph.registered_node_types).length > 100"
    " && window.app.extensionManager?.workflow?.activeWorkflow && !window.app.extensionManager.spinner"
)

# what the page says in a corner, in the pinned frontend and in newer ones
MESSAGE = ".p-toast-message, [data-testid='toast-viewport'] > li"


class Canvas:
    """``page``: a Playwright page of a running ComfyUI."""

    def __init__(self, page, url, pictures):
        self.page, self.pictures, self.errors = page, pictures, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        page.wait_for_function(READY, timeout=60_000)
        self.js("app.ui.settings.setSettingValue?.('Comfy.Workflow.ShowMissingModelsWarning', false)")

    def js(self, body, argument=None):
        """Value of a JavaScript expression; ``argument`` is its variable ``a``."""
        return self.page.evaluate(f"async (a) => ({body})", argument)

    def setting(self, name, value):
        self.js("app.extensionManager.setting.set(a[0], a[1])", [name, value])

    def look(self, vue=False, light=False):
        self.setting("Comfy.VueNodes.Enabled", vue)
        self.setting("Comfy.ColorPalette", "light" if light else "dark")
        self.page.wait_for_timeout(400)

    def load(self, workflow):
        self.js("app.loadGraphData(a)", workflow)
        self.page.wait_for_timeout(300)

    def load_prompt(self, prompt):
        """An API-format prompt as a graph, arranged."""
        self.js("app.loadApiJson(a, 'test')", prompt)
        self.js("app.graph.arrange()")
        self.page.wait_for_timeout(300)

    def save(self):
        return json.loads(self.js("JSON.stringify(app.graph.serialize())"))  # as the page does: undefined is no null

    def alerts(self):
        """Texts of the messages that the page shows; it shows them no longer."""
        shown = self.page.locator(MESSAGE).all_inner_texts()
        self.close_messages()
        return shown

    def close_messages(self):
        self.js("((toast) => (toast.dismissAll ?? toast.removeAll).call(toast))(app.extensionManager.toast)")
        self.page.wait_for_function("(message) => !document.querySelector(message)", arg=MESSAGE)

    def history(self):
        """The newest entries: other tests of this server leave hundreds."""
        return self.js("fetch('/history?max_items=8').then((r) => r.json())")

    def queue(self, wait_s=90):
        """Queues the graph as the button does; waits for the end. The history entry."""
        before = set(self.history())
        self.js("app.queuePrompt(0, 1)")
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            new = [entry for name, entry in self.history().items() if name not in before]
            if new:
                messages = dict(new[0]["status"]["messages"])
                failed = messages.get("execution_error", {})
                assert "execution_success" in messages, failed.get("traceback", [""])[-1] + str(
                    failed.get("exception_message")
                )
                self.page.wait_for_timeout(300)
                return new[0]
            self.page.wait_for_timeout(200)
        raise AssertionError(f"the prompt did not end within {wait_s} s")

    def node(self, kind):
        """JavaScript expression of the first node of a class in the graph that is shown."""
        return f"app.canvas.graph.nodes.find((n) => n.comfyClass === '{kind}')"

    def panel(self, kind):
        """Text of a node's panel, or None."""
        return self.js(f"{self.node(kind)}.sla2Panel?.element.innerText ?? null")

    def hidden(self, kind, widget):
        return self.js(f"!!{self.node(kind)}.widgets.find((w) => w.name === a).hidden", widget)

    def set(self, kind, widget, value):
        """Sets a widget as a user's choice in the page does: value, then callback."""
        self.js(
            f"((n, w) => {{ w.value = a[1]; w.callback?.(a[1], app.canvas, n); }})("
            f"{self.node(kind)}, {self.node(kind)}.widgets.find((w) => w.name === a[0]))",
            [widget, value],
        )
        self.page.wait_for_timeout(150)

    def value(self, kind, widget):
        return self.js(f"{self.node(kind)}.widgets.find((w) => w.name === a).value", widget)

    def picture(self, name, kind=None):
        """A screenshot of the page, centred on a node."""
        if kind:
            self.js(f"app.canvas.centerOnNode({self.node(kind)})")
            self.page.wait_for_timeout(300)
        path = self.pictures / f"{name}.png"
        self.page.screenshot(path=path)
        return path
