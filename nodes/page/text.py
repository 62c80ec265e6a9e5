"""Text on a node while and after it runs."""

import sys


def plain(text):
    """Text that no page can take for markup: names from files appear on nodes."""
    return text.replace("<", "\u2039").replace(">", "\u203a")


def show_on_node(node_id, text):
    """Shows ``text`` on the node in the browser; nothing where there is no ComfyUI server."""
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and node_id is not None:
        instance.send_progress_text(plain(text), node_id)
