"""What SLA2 Apply Attention shows after each sampling: one line, and why calls ran dense."""

from collections import Counter

from ..page.events import send_event
from ..page.text import plain
from ..settings.values import skips_keeps
from .report_text import error_in_words, how_it_ran, report_data

MAX_REASONS = 4


def show_outcomes(hook, node_id):
    """From now on the node ``node_id`` in the page tells how each run of ``hook`` ended."""
    # no reference to the hook in the hook: it goes when its model goes, and not when Python looks for cycles
    hook.on_run_end = lambda hook, run: send_event("outcome", node_id, outcome(hook, run))


def outcome(hook, run):
    """{"headline", "reasons": [sentence, ...], "accelerated", "calls", "layers": of the model} of a closed run."""
    data = report_data(hook, run)
    sparse = data["sparse_calls"]
    dense = _dense_reasons(data)
    calls = sparse + dense.total()
    parts = [skips_keeps(run.sparsity), f"{sparse} of {calls} attention calls accelerated"]
    parts += _faster(data)
    parts += [part for part in [error_in_words(data)] if part]
    parts += [data["failure"]] if data["failure"] else []
    sentences = [
        f"{count} {'call' if count == 1 else 'calls'} ran {how_it_ran(reason)}: {reason}"
        for reason, count in dense.most_common()
    ]
    if len(sentences) > MAX_REASONS:
        left = len(sentences) - MAX_REASONS + 1
        sentences = [*sentences[: MAX_REASONS - 1], f"{left} more reasons: SLA2 Report names them all"]
    return {
        "headline": plain(" · ".join(parts)),
        "reasons": [plain(sentence) for sentence in [*sentences, *data["notes"]]],
        "accelerated": sparse,
        "calls": calls,
        "layers": hook.facts.num_layers if hook.facts else None,
    }


def _dense_reasons(data):
    reasons = Counter(data["unsupported_calls"])
    for row in data["layers"]:
        reasons.update(row["dense"])
    return reasons


def _faster(data):
    """["8.2x faster per call"] or how much slower, where the run timed calls of both kinds."""
    times = {"sparse": [], "dense": []}
    for row in data["layers"]:
        for kind, value in row["milliseconds"].items():
            times[kind].append(value)
    if not all(times.values()):
        return []
    sparse, dense = (sum(values) / len(values) for values in (times["sparse"], times["dense"]))
    if not sparse or not dense:
        return []
    return [f"{dense / sparse:.1f}x faster per call" if dense >= sparse else f"{sparse / dense:.1f}x slower per call"]
