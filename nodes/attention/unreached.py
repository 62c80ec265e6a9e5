"""Self-attention calls that bypass all overrides, and model calls without a marked one: counted, with the reason if it is known."""

from .model_marks import has_layers, on_the_way
from .run_dense import say_once, stop_where_asked
from .steps import kept_dense_reason

WITHOUT_OPTIONS = "this self-attention takes no transformer_options, so SLA2 cannot intercept its call"
PAST = "the model is called past SLA2's wrappers, so that nothing says where the video's tokens lie"
OTHER_MODEL = "they were calls of a model that SLA2 was not applied to"
NO_MARKS = (
    "SLA2's marks are not on its layers: a later node took them off, or loaded the model without them; "
    "place SLA2 Apply Attention after that node"
)
NOT_KNOWN = "the node responsible is not known"
CACHES = {"easycache", "lazycache"}  # keys of wrappers that answer model calls without the model


def count_hidden(settings, run, layer, in_window, reason):
    """A self-attention call that no override can take over."""
    run.has_hidden_calls = True
    kept = kept_dense_reason(settings, layer, in_window)
    run.count_dense(layer, kept or reason)
    if kept is None:
        stop_where_asked(settings, reason, f" in layer {layer}")
        say_once(run, layer, reason)


def past_reason(facts, model, options):
    """Why a call bypassed our wrappers, as far as the model shows it; model None: it was freed."""
    way = None if model is None else in_the_way(facts, model, options)
    return f"{PAST}; {way}" if way else PAST


def count_unmet(settings, facts, run, frame, marked_model):
    """Counts a model call that reached no marked layer, with the reason if it is known. marked_model: the one that SLA2 was
    applied to, None if it was freed."""
    met_before = any(record.entered for record in run.layers.values())
    wrappers = (frame.options.get("wrappers") or {}).values()
    if met_before and any(CACHES & by_key.keys() for by_key in wrappers):
        run.count_answered()
    elif not has_layers(facts, frame.diffusion_model):
        run.count_unmet(NO_MARKS if frame.diffusion_model is marked_model else OTHER_MODEL)
    else:
        reason = in_the_way(facts, frame.diffusion_model, frame.options) or NOT_KNOWN
        run.count_unmet(reason)
        if not met_before:
            stop_where_asked(
                settings, f"this model call came to none of the self-attentions that SLA2 marked: {reason}"
            )


def require_met(settings, run):
    """At the end of a sampling: with on_unsupported "stop", raises if no model call reached a marked layer."""
    if run.unmet and not any(record.entered for record in run.layers.values()):
        first = next(iter(run.unmet))
        stop_where_asked(settings, f"no model call came to the self-attentions that SLA2 marked: {first}")


def in_the_way(facts, diffusion_model, options):
    """What other packs put between a model's call and its first layer, as a clause, or None."""
    names = on_the_way(facts, diffusion_model, options)
    return f"between the model's call and its layers there is {', '.join(names)}" if names else None
