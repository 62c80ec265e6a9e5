"""The page as the tests use it: graphs from API prompts, both renderers, both themes, prompts queued from the page."""

import json
import time

PATIENCE_S = 300  # with a state that comes in seconds: only what hangs is ended by it, on a slow and busy machine too

# the page goes on after its nodes are known: it loads a first workflow over whatever is shown, and a while later is at rest
READY = (
    "window.app?.graph && window.app.canvas && Object.keys(LiteGraph.registered_node_types).length > 100"
    " && window.app.extensionManager?.workflow?.activeWorkflow && !window.app.extensionManager.spinner"
)

# until the page is at rest: six frames in which it changed nothing, which a busy machine draws later; a second where something moves
REST = """new Promise((done) => {
  let drawn = 0, still = 0;
  const observer = new MutationObserver(() => (still = 0));
  observer.observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });
  const frame = () => {
    still += 1;
    drawn += 1;
    if (still <= 6 && drawn < 60) return requestAnimationFrame(frame);
    observer.disconnect();
    done();
  };
  requestAnimationFrame(frame);
})"""

# the prompts that the server has told this page the end of: all that it sent of them before has arrived
ENDED = """(window.endedPrompts ??= ((ended) => {
  for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
    app.api.addEventListener(kind, (event) => ended.add(event.detail.prompt_id));
  return ended;
})(new Set()))"""

# what the page says in a corner, in the pinned frontend and in newer ones
MESSAGE = ".p-toast-message, [data-testid='toast-viewport'] > li"
CLOSE_MESSAGES = "((toast) => (toast.dismissAll ?? toast.removeAll).call(toast))(app.extensionManager.toast)"


class Canvas:
    """``page``: a Playwright page of a running ComfyUI."""

    def __init__(self, page, url, pictures):
        self.page, self.pictures, self.errors = page, pictures, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(PATIENCE_S * 1000)
        page.goto(url)
        page.wait_for_function(READY)
        self.js("app.ui.settings.setSettingValue?.('Comfy.Workflow.ShowMissingModelsWarning', false)")

    def js(self, body, argument=None):
        """Value of a JavaScript expression; ``argument`` is its variable ``a``."""
        # as text: the driver would look at each value of a workflow several times
        return self.page.evaluate(f"(text) => (async (a) => ({body}))(JSON.parse(text))", json.dumps(argument))

    def data(self, body, argument=None):
        """js() where the value is large: as the page would send it, without what is undefined."""
        return json.loads(self.js(f"(async () => JSON.stringify(await ({body})))()", argument))

    def prompt(self):
        """The API prompt that the page makes of what it shows."""
        return self.data("app.graphToPrompt().then((made) => made.output)")

    def setting(self, name, value):
        at = "app.extensionManager.setting"
        self.js(f"{at}.get(a[0]) === a[1] || {at}.set(a[0], a[1])", [name, value])

    def rest(self):
        """Waits until the page has drawn what it was told and changes no more."""
        self.js(REST)

    def until(self, expression, argument=None):
        """Waits until a JavaScript expression holds; ``argument`` is its variable ``a``."""
        self.page.wait_for_function(f"(a) => ({expression})", arg=argument)

    def look(self, vue=False, light=False):
        self.setting("Comfy.VueNodes.Enabled", vue)
        self.setting("Comfy.ColorPalette", "light" if light else "dark")
        self.rest()

    def load(self, workflow):
        self.js("app.loadGraphData(a)", workflow)
        self.rest()

    def load_prompt(self, prompt):
        """An API-format prompt as a graph, arranged."""
        self.js("app.loadApiJson(a, 'test')", prompt)
        self.js("app.graph.arrange()")
        self.rest()

    def save(self):
        return self.data("app.graph.serialize()")

    def alerts(self):
        """Texts of the messages that the page shows; it shows them no longer."""
        shown = self.page.locator(MESSAGE).all_inner_texts()
        self.close_messages()
        return shown

    def close_messages(self):
        self.js(CLOSE_MESSAGES)
        self.page.wait_for_function("(message) => !document.querySelector(message)", arg=MESSAGE)

    def history(self):
        """The newest entries: other tests of this server leave hundreds."""
        return self.data("fetch('/history?max_items=8').then((r) => r.json())")

    def queue(self):
        """Queues the graph as the button does; waits for the end. The history entry."""
        before = set(self.history())
        self.js(f"({ENDED}, app.queuePrompt(0, 1))")
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            new = [(name, entry) for name, entry in self.history().items() if name not in before]
            if new:
                name, entry = new[0]
                messages = dict(entry["status"]["messages"])
                failed = messages.get("execution_error", {})
                assert "execution_success" in messages, failed.get("traceback", [""])[-1] + str(
                    failed.get("exception_message")
                )
                self.until(f"{ENDED}.has(a)", name)
                self.rest()
                return entry
            self.page.wait_for_timeout(100)
        raise AssertionError(f"the prompt did not end within {PATIENCE_S} s")

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
        self.rest()

    def value(self, kind, widget):
        return self.js(f"{self.node(kind)}.widgets.find((w) => w.name === a).value", widget)

    def picture(self, name, kind=None):
        """A screenshot of the page, centred on a node."""
        if kind:
            self.js(f"app.canvas.centerOnNode({self.node(kind)})")
            self.rest()
        path = self.pictures / f"{name}.jpg"
        self.page.screenshot(path=path, type="jpeg")
        return path
