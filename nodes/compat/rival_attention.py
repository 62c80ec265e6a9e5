"""ComfyUI's own Model Sparse Attention on the same MODEL: of the two, the one placed last runs.

That node puts its override on top again before every step, from a callback, and on MiniMax H3 it replaces whole blocks.
If it was placed before SLA2, it is removed from SLA2's clone; if after, its callbacks are found when the model is sampled.
Its parts are recognised by the state that they share with its callbacks.
"""

import sys

from .override_chain import closed_over, find_in, name_of, states_of

CALLBACK = "block_sparse_attention"  # the key of its callbacks
NAME = "ComfyUI's Model Sparse Attention"
ASIDE = (
    f"{NAME} was placed after SLA2 on this MODEL and runs in place of it, because only one of the two can: "
    "place SLA2 Apply Attention after that node to use SLA2"
)
TAKEN_OFF = (
    f"{NAME} is on this MODEL too: SLA2 was placed after it and runs in place of it from the first step on, "
    "because only one of the two can"
)


NODE = "BlockSparseAttention"  # its class in ComfyUI's list of nodes
# its own defaults
SETTING = "sol-attn, tau 1.3, from 20% of the steps on"


def rivals_node():
    """The class of ComfyUI's own node, or None where this ComfyUI has none."""
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get(NODE)


def with_rival(model):
    """``model`` (ModelPatcher) with ComfyUI's own sparse attention on it, as its node sets it up by default."""
    made = rivals_node().execute(
        model=model, selection={"selection": "sol-attn", "tau": 1.3}, start_percent=0.2, end_percent=1.0
    )
    return made.args[0]


def callbacks_in(callbacks):
    """The rival's functions among callbacks {kind: {key: [function, ...]}}."""
    return [function for by_key in callbacks.values() for function in by_key.get(CALLBACK, ())]


def take_off(patched):
    """Takes the rival off a ModelPatcher; None where it is not on it, else one sentence for the report."""
    callbacks = callbacks_in(patched.callbacks)
    if not callbacks:
        return None
    states = {id(state) for function in callbacks for state in states_of(function)}

    def is_its(function):
        return any(id(state) in states for state in states_of(function))

    for kind in patched.callbacks:
        patched.remove_callbacks_with_key(kind, CALLBACK)
    options = patched.model_options.setdefault("transformer_options", {})
    for blocks in options.get("patches_replace", {}).values():
        _take_off_blocks(blocks, is_its)
    holder = _take_off_override(options, is_its)
    return TAKEN_OFF + (f"; {holder}, which held its attention, went with it" if holder else "")


def _take_off_blocks(blocks, is_its):
    for key, patch in list(blocks.items()):
        while patch is not None and is_its(patch):
            patch = closed_over(patch).get("previous")
        if patch is None:
            del blocks[key]
        else:
            blocks[key] = patch


def _take_off_override(options, is_its):
    """The name of an override of another pack that held the rival's, None where there was none."""
    override, holder = options.pop("optimized_attention_override", None), None
    while (found := find_in(override, is_its)) is not None:
        holder = holder if found is override else name_of(override)
        override = closed_over(found).get("previous")
    if override is not None:
        options["optimized_attention_override"] = override
    return holder
