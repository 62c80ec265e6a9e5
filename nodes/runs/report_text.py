"""A sampling run in words and as data that JSON can hold."""

import math
import os
import time

from ..compat.rival_attention import ASIDE
from ..settings.values import skips_keeps
from .advice import advice
from .time_saved import saved_in_words

NOT_SAMPLED = (
    "Nothing was sampled through this MODEL in this run: connect the sampler's model to the MODEL that this report gets, "
    "and its LATENT, so that the report runs after it."
)
UNREACHED = "another node's attention took the call before SLA2 could see it"


def how_it_ran(reason):
    """What is known of a call that SLA2 did not take."""
    return "in another node's attention" if reason in (ASIDE, UNREACHED) else "dense"


def report_data(hook, run, caveat=None):
    """The run as a dictionary of plain values: what ``report_text`` says, for programs."""
    settings = hook.settings
    data = {
        "sparsity_setting": settings.sparsity if run is None or run.plan is None else run.plan.sparsity,
        "method": method_name(hook),
        "router": router_name(hook.router),
        "ratio": ratio_name(hook),
        "caveat": caveat,
        "run": None,
    }
    if run is None:
        return data
    layers = [layer_data(layer, run.layers[layer]) for layer in sorted(run.layers)]
    return data | {
        "run": run.number,
        "failure": run.failure,
        "model_calls": run.model_calls,
        "answered_calls": run.answered_calls,
        "sparsity": run.sparsity,
        "bit_widths": sorted(run.precisions),
        "sparse_calls": sum(row["sparse"] for row in layers),
        "loops": [
            {"loop": loop.name, "calls": count, "why_not_faster": loop.why_not_faster}
            for loop, count in run.loops.most_common()
        ],
        "dense_calls": sum(sum(row["dense"].values()) for row in layers),
        "other_calls": run.other_calls,
        "unsupported_calls": dict(run.family_reasons),
        "layers": layers,
        "attention_error": run.attention_error,
        "target_error": target_data(run),
        "notes": list(run.notes),
        "advice": advice(hook, run),
    }


def layer_data(layer, record):
    dense = dict(record.dense)
    if record.unreached:
        dense[UNREACHED] = record.unreached
    return {
        "layer": layer,
        "sparse": record.sparse,
        "dense": dense,
        "sparsity": record.sparsity,
        "ratio_range": None if record.ratio_range is None else [finite(bound) for bound in record.ratio_range],
        "attention_error": record.attention_error,
        "not_finite": record.not_finite,
        "milliseconds": dict(record.milliseconds),
    }


def target_data(run):
    """{"error", "sparsities": (lowest, highest) chosen or None, "is_out_of_reach"} of a run with a target_error, else None."""
    target = run.error_target
    if target is None:
        return None
    chosen = (min(target.chosen), max(target.chosen)) if target.chosen else None
    return {"error": target.error, "sparsities": chosen, "is_out_of_reach": target.is_out_of_reach}


def error_in_words(data):
    """In words, of report_data(): attention error 0.15 (layers 0.08 to 0.31); or target error 0.12, measured 0.117, sparsity
    0.93 chosen. None where no call measured it."""
    errors = [row["attention_error"] for row in data["layers"] if row["attention_error"] is not None]
    if data["attention_error"] is None or not errors:
        return None
    target = data["target_error"]
    if target is None:
        error = _with_layers(f"{data['attention_error']:.2f}", errors)
        return f"attention error {error}"
    chosen = " to ".join(dict.fromkeys(f"{sparsity:.2f}" for sparsity in target["sparsities"]))
    measured = _with_layers(f"{data['attention_error']:.3f}", errors)
    return f"target error {target['error']:g}, measured {measured}, sparsity {chosen} chosen"


def _with_layers(error, errors):
    """An error in words, and the range of the layers' where there are several."""
    return f"{error} (layers {min(errors):.2f} to {max(errors):.2f})" if len(errors) > 1 else error


def finite(number):
    """None for NaN and infinity, which JSON cannot hold."""
    return number if math.isfinite(number) else None


def router_name(router):
    if router is None:
        return "none (untrained)"
    return os.path.basename(router.source) or "unsaved"


def method_name(hook):
    if hook.sla_weights is not None:
        return f"SLA version 1, weights of {hook.sla_weights.source or 'an unnamed file'}"
    return "top-k only" if hook.settings.method == "top-k only" else "SLA2"


def ratio_name(hook):
    if method_name(hook) != "SLA2":
        return "none"
    mode = hook.settings.ratio_mode
    if mode == "fixed":
        return f"fixed at {hook.settings.fixed_ratio:g}"
    if hook.settings.target_error:
        return "fitted (target_error measures with it)"
    if mode == "learned" and (hook.router is None or hook.router.ratio(0, hook.settings.sparsity) is None):
        return "fitted (no trained ratio)"
    return mode


def report_text(hook, run, caveat=None):
    """The report: one summary line, the settings, a line per layer, reasons, notes."""
    if run is None:
        return NOT_SAMPLED
    data = report_data(hook, run, caveat)
    setting = skips_keeps(run.sparsity)
    found = (_headline(data, run, setting), saved_in_words(data), error_in_words(data))
    lines = [
        ", ".join(part for part in found if part),
        f"run {run.number} of this model, {run.model_calls} model calls, ended {_ago(run)}"
        + (f", {run.failure}" if run.failure else ""),
        f"method: {data['method']}; router: {data['router']}; ratio: {data['ratio']}; bit width: {', '.join(data['bit_widths']) or 'not used'}",
    ]
    lines += [_loop_line(row) for row in data["loops"]]
    lines += [f"{count} calls ran dense: {reason}" for reason, count in data["unsupported_calls"].items()]
    lines += [_layer_line(row) for row in data["layers"]]
    if data["answered_calls"]:
        lines.append(
            f"a step cache answered {data['answered_calls']} of {run.model_calls} model calls without the model"
        )
    if data["other_calls"]:
        lines.append(f"other attention calls (cross-attention and the like), passed through: {data['other_calls']}")
    lines += [f"note: {sentence}" for sentence in ([caveat] if caveat else []) + data["notes"]]
    lines += [f"advice: {sentence}" for sentence in data["advice"]]
    return "\n".join(lines)


def _headline(data, run, setting):
    if run.aside:
        return "SLA2: not used in this run"
    total = data["sparse_calls"] + data["dense_calls"]
    return f"SLA2: {data['sparse_calls']} of {total} self-attention calls ran sparse ({setting})"


def _ago(run):
    return f"{time.monotonic() - run.ended:.0f} s ago"


def _loop_line(row):
    why = f" ({row['why_not_faster']})" if row["why_not_faster"] else ""
    return f"{row['calls']} sparse {'call' if row['calls'] == 1 else 'calls'} ran in {row['loop']}{why}"


def _layer_line(row):
    parts = [f"layer {row['layer']}: {row['sparse']} sparse"]
    if row["sparsity"] is not None:
        parts.append(f"skipped {100 * row['sparsity']:.1f}%")
    if row["ratio_range"] is not None:
        low, high = ("not finite" if bound is None else f"{bound:.3f}" for bound in row["ratio_range"])
        parts.append(f"ratio {low} to {high}")
    if row["attention_error"] is not None:
        parts.append(f"attention error {row['attention_error']:.3f}")
    if row["not_finite"]:
        parts.append(f"{row['not_finite']} outputs with NaN or infinity")
    parts += [f"{count} {how_it_ran(reason)} ({reason})" for reason, count in row["dense"].items()]
    parts += [f"{value:.3f} ms per {kind} call" for kind, value in row["milliseconds"].items()]
    return ", ".join(parts)
