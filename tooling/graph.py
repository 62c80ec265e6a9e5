"""The bundled workflow as a prompt for ComfyUI's API, fitted to the demo's sizes."""

NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
MUTED, BYPASSED = 2, 4


class GraphError(ValueError):
    """A workflow that the demo cannot turn into a prompt; the message is one sentence."""


def to_prompt(workflow, node_info):
    """API prompt {node id: {"class_type", "inputs"}} of a UI-format workflow.

    Args:
        workflow: parsed UI JSON with flat nodes and links (no subgraphs).
        node_info: what GET /object_info answers.
    """
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        kind = node["type"]
        if kind in NOTES or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if kind not in node_info:
            raise GraphError(f"The workflow has a node {kind!r}, which this ComfyUI does not know.")
        inputs = widget_values(node, node_info[kind])
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = list(links[slot["link"]])
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs}
    return prompt


def widget_values(node, info):
    """{input: value} of a node's widgets. The page stores values by position, and after a seed what to do with it."""
    described = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    slots = [slot["widget"]["name"] for slot in node.get("inputs", []) if "widget" in slot]
    names = slots or [name for name, (kind, *rest) in described.items() if is_widget(kind, *rest)]
    values, named = iter(node.get("widgets_values") or []), {}
    for name in names:
        named[name] = next(values, None)
        options = described.get(name, [None])[1:]
        if options and options[0].get("control_after_generate"):
            next(values, None)
    return {name: value for name, value in named.items() if value is not None}


def is_widget(kind, options=None):
    return (isinstance(kind, list) or kind in WIDGETS) and not (options or {}).get("forceInput")


def upstream(prompt, node):
    """Ids of ``node`` and of every node that it depends on."""
    found, waiting = set(), [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += [value[0] for value in prompt[current]["inputs"].values() if is_link(value)]
    return found


def is_link(value):
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def of_class(prompt, *kinds):
    return [node for node, data in prompt.items() if data["class_type"] in kinds]


def samplers(prompt):
    """{"dense": id, "sla2": id} of the two samplers, told apart by what their MODEL came through."""
    found = {}
    for node in of_class(prompt, "KSampler"):
        patched = any(prompt[other]["class_type"] == "SLA2ApplyAttention" for other in upstream(prompt, node))
        found["sla2" if patched else "dense"] = node
    if set(found) != {"dense", "sla2"}:
        raise GraphError("The workflow must hold one KSampler with SLA2 Apply Attention before it and one without.")
    return found


def fit(prompt, plan):
    """Changes ``prompt`` to the plan's seed, steps, sizes and sparsity, and lets both samplers save their latents."""
    for data in prompt.values():
        kind, inputs = data["class_type"], data["inputs"]
        if kind == "KSampler":
            inputs.update(seed=plan.seed, steps=plan.steps)
        elif kind == "ScaleROPE":
            inputs.update(scale_x=plan.rope_scale, scale_y=plan.rope_scale)
        elif kind == "SLA2ApplyAttention":
            inputs.update(sparsity=plan.sparsity, on_unsupported="stop")
        elif {"width", "height", "length"} <= set(inputs):
            inputs.update(width=plan.width, height=plan.height, length=plan.frames)
    for name, node in samplers(prompt).items():
        prompt[f"latent_{name}"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [node, 0], "filename_prefix": f"latents/{name}"},
        }
    return prompt


def branch_of(prompt, node):
    """ "dense" or "sla2": whose result ``node`` handles, or None where of neither or of both."""
    above = upstream(prompt, node)
    names = [name for name, sampler in samplers(prompt).items() if sampler in above]
    return names[0] if len(names) == 1 else None
