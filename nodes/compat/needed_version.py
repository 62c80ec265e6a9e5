"""What a node says when a prompt is queued on a ComfyUI that is too old for it."""

import comfyui_version


def needs_comfyui(node, version, what):
    """The error for validate_inputs to raise. version: the first ComfyUI that has ``what``."""
    sentence = (
        f"{node} needs ComfyUI {version} or newer, {what}; this is {comfyui_version.__version__}: update ComfyUI."
    )
    return RuntimeError(sentence)
