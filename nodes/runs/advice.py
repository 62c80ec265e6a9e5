"""What a run says about whether SLA2 pays here, and what to change. Every sentence rests on what was counted or measured."""

from collections import Counter

from ...sla2_kernels import default_precision
from ..compat.rival_attention import ASIDE
from ..settings.automatic import untrained_limit
from .inexact_dense import sage_warning

SMALL_SHARE = 0.2  # of the sampling time: below it even free attention saves little
LITTLE_GAIN = 1.15  # times faster per call


def advice(hook, run):
    """Sentences, the most important first; none where nothing stands out."""
    found = [
        sage_warning(run),
        _too_short(run),
        _not_faster(run),
        _small_share(run),
        _other_dense(run),
        _untrained(hook, run),
        _sixteen_bit(hook, run),
    ]
    return [sentence for sentence in found if sentence]


def attention_milliseconds(run):
    """Time in the self-attention calls that were timed, or None where none was."""
    counts = {"sparse": lambda record: record.sparse, "dense": lambda record: record.dense.total()}
    spent = [
        value * counts[kind](record) for record in run.layers.values() for kind, value in record.milliseconds.items()
    ]
    return sum(spent) if spent else None


def _reasons(run):
    return sum((record.dense for record in run.layers.values()), Counter())


def _too_short(run):
    short = next((reason for reason in _reasons(run) if reason.startswith("the sequence has")), None)
    if short is None or run.sparse_calls:
        return None
    return (
        f"SLA2 does not pay here: {short}, and shorter ones cost more to route than they save. "
        "Longer or larger videos gain; for this one leave SLA2 out."
    )


def _per_call(run, kind):
    values = [record.milliseconds[kind] for record in run.layers.values() if kind in record.milliseconds]
    return sum(values) / len(values) if values else None


def _not_faster(run):
    sparse, dense = _per_call(run, "sparse"), _per_call(run, "dense")
    if not sparse or not dense or dense / sparse >= LITTLE_GAIN:
        return None
    return (
        f"a sparse call took {sparse:.2f} ms and a dense one {dense:.2f} ms: SLA2 does not pay at this length and "
        "sparsity. Raise sparsity (preset custom, with a trained router), or leave SLA2 out."
    )


def _small_share(run):
    spent = attention_milliseconds(run)
    if spent is None or run.ended is None or not run.sparse_calls:
        return None
    share = spent / 1000 / max(run.ended - run.started, 1e-9)
    if share >= SMALL_SHARE:
        return None
    return (
        f"self-attention took {100 * share:.0f}% of the sampling time: a higher sparsity saves little more. "
        "The rest of the model takes most of the time: fp8 weights, TorchCompileModel or fewer steps help more."
    )


def _other_dense(run):
    settings = (
        "dense_layers",
        "the step lies outside",
        "the schedule keeps",
        "the sequence has",
        "the queries are",
        "target_error",
        ASIDE,
    )
    reasons = {reason: count for reason, count in _reasons(run).items() if not reason.startswith(settings)}
    unreached = sum(record.unreached for record in run.layers.values())
    total = sum(reasons.values()) + unreached
    if not total or total < run.sparse_calls:
        return None
    if unreached > sum(reasons.values()):
        return "most calls went to another node's attention: place SLA2 Apply Attention after it on the MODEL wire"
    return f"most calls could not run sparse: {max(reasons, key=reasons.get)}"


def _untrained(hook, run):
    high = max(hook.settings.sparsities, default=0)
    trained = hook.router is not None or hook.sla_weights is not None or hook.settings.method == "top-k only"
    if trained or not run.sparse_calls:
        return None
    limit = untrained_limit(run.shortest)
    if high <= limit:
        return None
    return (
        f"sparsity {high:g} without a trained router costs quality at {run.shortest:,} tokens: stay at or below {limit:g}, "
        "or train one (SLA2 Train Router)"
    )


def _sixteen_bit(hook, run):
    if "16bit" not in run.precisions or hook.settings.precision != "16bit":
        return None
    others = sorted({default_precision(device) for device in run.devices} - {"16bit"})
    return f"bit_width is set to 16bit: auto would take {' or '.join(others)} on this device" if others else None
