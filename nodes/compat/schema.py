"""What io.Schema gained over ComfyUI's versions, used where it is there."""

import inspect

from comfy_api.latest import io

SEARCHABLE = "search_aliases" in inspect.signature(io.Schema.__init__).parameters  # since 0.19
# ComfyUI before 0.19 has no advanced inputs: there they are ordinary ones
ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Int.Input.__init__).parameters else {}


def search_aliases(*words):
    """Keyword arguments for io.Schema: what else a user may type to find the node."""
    return {"search_aliases": list(words)} if SEARCHABLE else {}
