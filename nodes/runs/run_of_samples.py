"""Which run of a MODEL made the samples that a report is given.

A latent is recognised by its values; what was made from it, such as an image, by the nodes that it came through.
"""

from .history import KEPT_RUNS
from .record import difference, sample_of

SAME_LATENT = 0.02  # the intermediate dtype may be 16 bit
INDIRECT = "these samples are not the direct result of a run of this model"
NOT_KEPT = (
    f"these samples are not the direct result of one of the last {KEPT_RUNS} runs of this model, and no other is kept"
)
CACHED = "the sampler did not run in this prompt (its result came from the cache)"
APPLY = "SLA2ApplyAttention"


def find_run(runs, samples, makers, prompt_id, fed=False):
    """(run, caveat): the run that made these samples, or the newest that may have, with a sentence on what is not certain.

    (None, None) where no node that made them ran this model, no node that ran it still gets it, and nothing did in this prompt.

    runs: closed RunRecords of one model, oldest first. samples: LATENT or IMAGE. makers: ids of the nodes that these samples
    come from and that ran this model, as of ``makers_of``, None if unknown. prompt_id: of the prompt that executes.
    fed: what ``still_fed`` says.
    """
    if not runs:
        return None, None
    distance, run = _nearest_run(runs, samples)
    if distance <= SAME_LATENT:
        was_now = prompt_id is None or run.context is None or run.context[0] == prompt_id
        return run, None if was_now else f"{CACHED}: its own run is shown"
    if (
        makers is not None
        and not makers
        and not fed
        and all(run.context and run.context[0] != prompt_id for run in runs)
    ):
        return None, None
    run, caveat = _made_by(runs, makers, prompt_id)
    if isinstance(samples, dict) and distance != float("inf"):
        not_its = NOT_KEPT if runs[0].number > 1 else INDIRECT
        caveat = f"{not_its}: {caveat or 'that of the sampler before them is shown'}"
    return run, caveat


def _nearest_run(runs, samples):
    """(difference, run), of equal runs the newest; infinite for an image, and for latents of another size."""
    sample = sample_of(samples.get("samples")) if isinstance(samples, dict) else None
    return min(((difference(sample, run.latent_sample), run) for run in reversed(runs)), key=lambda found: found[0])


def _made_by(runs, makers, prompt_id):
    if makers is None:
        possible = runs
    else:
        possible = [run for node in makers for run in _latest_of(node, runs, prompt_id)]
    if not possible:
        return runs[-1], "which run made these samples is not known: the newest one of this model is shown"
    run = max(possible, key=lambda run: run.number)
    if len(possible) > 1:
        return run, f"{len(possible)} runs of this model may have made these samples: the newest of them is shown"
    if makers is not None and run.context[0] != prompt_id:
        return run, f"{CACHED}: its newest run is shown"
    return run, None


def _latest_of(node, runs, prompt_id):
    """The runs that a node made in this prompt, else its newest one."""
    own = [run for run in runs if run.context and run.context[1] == node]
    return [run for run in own if run.context[0] == prompt_id] or own[-1:]


def makers_of(runs, graph, node_id, input_name, model_input="model"):
    """Ids of the nodes that ran this model and whose result reaches this input with no other of them in between.

    A node that ran it in an earlier prompt counts only while the MODEL still comes to it from the same SLA2 Apply Attention.

    graph: ComfyUI's DynamicPrompt; None where there is none gives None.
    """
    if graph is None or not graph.has_node(node_id):
        return None
    applied = _nearest_apply(graph, node_id, model_input)
    ran = {}
    for run in runs:
        if run.context:
            node = run.context[1]
            # outside a node that put others into the graph, they count as that one
            for known_as in {node, graph.get_real_node_id(node)}:
                ran.setdefault(known_as, set()).add(node)
    found, seen, ahead = set(), set(), [graph.get_node(node_id)["inputs"].get(input_name)]
    while ahead:
        link = ahead.pop()
        if not _is_link(link) or link[0] in seen or not graph.has_node(link[0]):
            continue
        seen.add(link[0])
        if link[0] in ran and (applied is None or applied in _before(graph, link[0])):
            found |= ran[link[0]]
        else:
            ahead += graph.get_node(link[0])["inputs"].values()
    return found


def still_fed(runs, graph, node_id, model_input="model"):
    """Whether a node that ran this model, such as a trainer whose result is cached, still gets it from the Apply before this input."""
    applied = graph is not None and graph.has_node(node_id) and _nearest_apply(graph, node_id, model_input)
    ran = {run.context[1] for run in runs if run.context} if applied else ()
    return any(graph.has_node(node) and applied in _before(graph, node) for node in ran)


def _nearest_apply(graph, node_id, input_name):
    """Id of the SLA2 Apply Attention that an input's MODEL comes from, or None where it is not in the graph."""
    link, seen = graph.get_node(node_id)["inputs"].get(input_name), set()
    while _is_link(link) and link[0] not in seen and graph.has_node(link[0]):
        seen.add(link[0])
        node = graph.get_node(link[0])
        if node.get("class_type") == APPLY:
            return link[0]
        link = node["inputs"].get("model")
    return None


def _before(graph, node_id):
    """Ids of all nodes that a node's inputs come from."""
    seen, ahead = set(), [node_id]
    while ahead:
        links = filter(_is_link, graph.get_node(ahead.pop())["inputs"].values())
        new = {link[0] for link in links if graph.has_node(link[0])} - seen
        seen |= new
        ahead += new
    return seen


def _is_link(value):
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
