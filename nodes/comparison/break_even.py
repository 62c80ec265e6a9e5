"""From how many tokens on SLA2's attention is faster than the dense one, on this very device."""

import math
import time

import torch

from ...sla2_kernels.support import on_device
from ..attention.layer_weights import LayerWeights
from ..attention.sparse_call import VideoPart, sparse_video
from ..attention.video_tokens import ExactTokens
from ..runs.fitted_ratios import CallRatio

MIN_TOKENS, MAX_TOKENS = 1024, 131_072
SECONDS = 20  # that the search may take, about
REPEATS_S = 0.3  # per length and kind
CLEARLY_FASTER = 1.5


def attend_as(hook, device, precision):
    """attend(q, k, v) of (B, N, H, D): what ``hook`` computes in its first layer, by its own method and weights."""
    settings = hook.settings
    weights = LayerWeights(settings, hook.router, hook.facts.num_heads, hook.sla_weights)
    first_layer = weights.on_device(0, device, settings.sparsity)
    call_ratio = CallRatio(0) if first_layer.fits else None

    def attend(q, k, v):
        part = VideoPart(q, k, v, k, "BNHD")
        options = {"sparsity": settings.sparsity, "precision": precision, "scale": None, "call_ratio": call_ratio}
        return sparse_video(part, ExactTokens(), first_layer, **options)[0]

    return attend


def time_lengths(dense, sparse, device, seconds=SECONDS):
    """[(tokens, dense seconds, sparse seconds)] at doubling lengths. dense(tokens), sparse(tokens) make a call to time.

    Stops where SLA2 is clearly faster, or the next length would take longer than the time that is left.
    """
    # dense attention of another pack may launch kernels on the current device
    with on_device(device):
        return _time_lengths(dense, sparse, device, seconds)


def _time_lengths(dense, sparse, device, seconds):
    begun, rows, tokens = time.perf_counter(), [], MIN_TOKENS
    while tokens <= MAX_TOKENS:
        times = [_median_time(make(tokens), device) for make in (dense, sparse)]
        rows.append((tokens, *times))
        # twice the length takes four times as long; a first call, for warming up, and one repeat
        left = seconds - (time.perf_counter() - begun)
        if times[0] >= CLEARLY_FASTER * times[1] or 4 * 2 * sum(times) + 2 * REPEATS_S > left:
            break
        tokens *= 2
    return rows


def _median_time(call, device):
    call()
    times, begun = [], time.perf_counter()
    while not times or (time.perf_counter() - begun < REPEATS_S and len(times) < 50):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def break_even(rows):
    """Tokens from which on SLA2 is faster at every length measured, interpolated; None where it is not at the longest."""
    first = None
    for number in reversed(range(len(rows))):
        _, dense, sparse = rows[number]
        if sparse >= dense:
            break
        first = number
    if first is None:
        return None
    if first == 0:
        return rows[0][0]
    (short, slow), (long, fast) = (
        (tokens, math.log(sparse / dense)) for tokens, dense, sparse in rows[first - 1 : first + 1]
    )
    share = slow / (slow - fast)
    return math.ceil(short * (long / short) ** share / 128) * 128
