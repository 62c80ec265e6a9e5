"""Text on a node while and after it runs."""

from .events import server_of_page


def plain(text):
    """Text that no page can take for markup: names from files appear on nodes."""
    return text.replace("<", "\u2039").replace(">", "\u203a")


def show_on_node(node_id, text):
    """Shows ``text`` on the node in the browser; nothing where there is no ComfyUI server."""
    server = server_of_page()
    if server is not None and node_id is not None:
        server.send_progress_text(plain(text), node_id)
