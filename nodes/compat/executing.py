"""Which node of which prompt ComfyUI executes in this thread."""

import sys


def executing_context():
    """(prompt id, node id) of what ComfyUI executes now, or None outside it."""
    utils = sys.modules.get("comfy_execution.utils")
    context = utils.get_executing_context() if utils else None
    return (context.prompt_id, context.node_id) if context else None
