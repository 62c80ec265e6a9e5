"""The losses of a training in progress as a few curves for the page."""

from .loss_plot import smooth

MAX_POINTS = 120


def loss_curves(losses):
    """losses: {layer: [loss per optimisation step]} -> {"steps", "at", "mean", "low", "high"}, smoothed, thinned out.

    at: optimisation step of each point, from 1. low and high: the best and the worst layer there.
    """
    curves = [smooth(values) for values in losses.values() if values]
    steps = max(map(len, curves), default=0)
    count = min(steps, MAX_POINTS)
    at = [round(number * (steps - 1) / max(1, count - 1)) for number in range(count)]
    columns = [[curve[step] for curve in curves if step < len(curve)] for step in at]
    return {
        "steps": steps,
        "at": [step + 1 for step in at],
        "mean": [sum(column) / len(column) for column in columns],
        "low": [min(column) for column in columns],
        "high": [max(column) for column in columns],
    }
