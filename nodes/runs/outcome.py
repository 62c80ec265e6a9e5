"""What SLA2 Apply Attention shows after each sampling: one line, and why calls ran dense."""

from collections import Counter

from ..page.events import send_event
from ..page.text import plain
from ..settings.values import skips_keeps
from .report_text import error_in_words, how_it_ran, report_data
from .time_saved import faster_in_words, saved_in_words

MAX_REASONS = 4


REPLACED = (
    "replaced by the SLA2 Apply Attention after it: only the last one on a MODEL wire counts, so remove one of the two"
)


class ShownOn:
    """Called by a hook at the end of each run: shows the outcome on the node ``node_id`` in the page."""

    def __init__(self, node_id):
        self.node_id = node_id

    # no reference to the hook: it must be freed with its model, not later by the garbage collector
    def __call__(self, hook, run):
        send_event("outcome", self.node_id, outcome(hook, run))


def show_outcomes(hook, node_id, replaced=None):
    """From now on the node ``node_id`` in the page shows the outcome of each run of ``hook``.

    replaced: the hook that was on the MODEL before, or None; its node says that it no longer counts.
    """
    hook.on_run_end = ShownOn(node_id)
    if replaced is not None and isinstance(replaced.on_run_end, ShownOn):
        empty = {"headline": REPLACED, "detail": "", "reasons": [], "accelerated": 0, "calls": 1, "layers": None}
        send_event("outcome", replaced.on_run_end.node_id, empty)


def outcome(hook, run):
    """{"headline", "detail", "reasons": [sentence, ...], "accelerated", "calls", "layers": of the model} of a closed run.

    headline: what a user wants of a run: time saved, share skipped, attention error, each only where it was measured.
    """
    data = report_data(hook, run)
    sparse = data["sparse_calls"]
    dense = _dense_reasons(data)
    calls = sparse + dense.total()
    counted = f"{sparse} of {calls} attention calls accelerated"
    head = [saved_in_words(data), skips_keeps(run.sparsity), error_in_words(data)] if sparse else [counted]
    detail = [counted, faster_in_words(data)] if sparse else []
    sentences = [
        f"{count} {'call' if count == 1 else 'calls'} ran {how_it_ran(reason)}: {reason}"
        for reason, count in dense.most_common()
    ]
    if len(sentences) > MAX_REASONS:
        left = len(sentences) - MAX_REASONS + 1
        sentences = [*sentences[: MAX_REASONS - 1], f"{left} more reasons: SLA2 Report names them all"]
    return {
        "headline": _line(*head, data["failure"]),
        "detail": _line(*detail),
        "reasons": [plain(sentence) for sentence in [*sentences, *data["notes"]]],
        "accelerated": sparse,
        "calls": calls,
        "layers": hook.facts.num_layers if hook.facts else None,
    }


def _line(*parts):
    return plain(" · ".join(part for part in parts if part))


def _dense_reasons(data):
    reasons = Counter(data["unsupported_calls"])
    for row in data["layers"]:
        reasons.update(row["dense"])
    return reasons
