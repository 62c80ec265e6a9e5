"""The preset *automatic*: which steps of a run are dense and how much the others skip, by what the run turns out to be.

``plan_of`` is the whole choice. Its figures are those of docs/QUALITY.md, measured on the miniature.
"""

from dataclasses import dataclass
from typing import NamedTuple

from .schedule import Rule

# (tokens, highest sparsity) without a trained ratio. At 32,760 tokens 0.90 with a dense start keeps 16 of 18 videos right, 0.95 and
# 0.97 keep 8 and 4 of 12 of few steps; at the other lengths the error is no larger (docs/QUALITY.md, "Presets" and "by length")
UNTRAINED_LIMITS = ((32_000, 0.9), (14_000, 0.8), (0, 0.7))
# with one, 0.95 keeps all 18 right at 32,760 tokens, 0.97 keeps 13; the other lengths by the untrained errors, as they compare with that
TRAINED_LIMITS = ((75_000, 0.97), (32_000, 0.95), (14_000, 0.9), (0, 0.85))
IMAGE_FAMILIES = ("flux", "qwen-image")  # the lengths were measured on video
SLA_SPARSITY = 0.9  # the released SLA weights were trained with it, in every step (docs/FAMILIES.md)
FEW_STEPS = 8
START = 0.1  # share of the sampling in which layout and motion settle
DENSE_FIRST_STEP = Rule(None, numbers=(1, 1))
DENSE_START = Rule(None, steps=(0.0, START))


@dataclass(frozen=True)
class RunFacts:
    """What a plan follows from. tokens: of the video. steps, begins_at (share of the sampling, 0: noise): of this sampler.

    trained: sparsities whose ratio a connected router was trained for. is_sla: SLA weights (version 1) are connected.
    has_target: target_error takes the sparsity's place. Each is None, or empty, if unknown.
    """

    family: str
    tokens: int | None = None
    steps: int | None = None
    begins_at: float | None = None
    trained: tuple[float, ...] = ()
    is_sla: bool = False
    has_target: bool = False


class Plan(NamedTuple):
    """sparsity: of the calls that no rule covers. schedule: of Rule. sentence: what was chosen and why, or None."""

    sparsity: float
    schedule: tuple = ()
    sentence: str | None = None


def plan_of(facts):
    """The Plan for a run with these RunFacts."""
    sparsity, schedule = sparsity_for(facts), dense_steps_for(facts)
    return Plan(sparsity, schedule, _sentence(facts, sparsity, schedule))


def sparsity_for(facts):
    """By length; of a trained router the highest sparsity up to that, because ratios in between are interpolated."""
    if facts.is_sla:
        return SLA_SPARSITY
    tokens = 0 if facts.family in IMAGE_FAMILIES else facts.tokens or 0
    if not facts.trained:
        return untrained_limit(tokens)
    limit = _limit(TRAINED_LIMITS, tokens)
    return max((known for known in facts.trained if known <= limit), default=min(facts.trained))


def untrained_limit(tokens):
    """Highest sparsity at this length that docs/QUALITY.md bears out without a trained ratio."""
    return _limit(UNTRAINED_LIMITS, tokens)


def _limit(limits, tokens):
    return next(limit for least, limit in limits if tokens >= least)


def dense_steps_for(facts):
    """Rules. A sampler that begins later refines what another one laid out (LTX's second stage, Wan 2.2's low noise)."""
    if facts.is_sla:
        return ()
    if facts.steps is None or facts.steps > FEW_STEPS:
        return (DENSE_START,)
    return () if facts.begins_at is not None and facts.begins_at > START else (DENSE_FIRST_STEP,)


def _sentence(facts, sparsity, schedule):
    dense = {(): "no step dense", (DENSE_FIRST_STEP,): "step 1 dense", (DENSE_START,): "the first 10% dense"}[schedule]
    steps = "an unknown number of" if facts.steps is None else facts.steps
    run = [f"{steps} {'step' if steps == 1 else 'steps'}"]
    run += [] if facts.begins_at is None else ["from noise" if facts.begins_at <= START else "continuing a latent"]
    run += [] if facts.tokens is None else [f"{facts.tokens:,} tokens"]
    weights = "SLA weights" if facts.is_sla else "a trained ratio" if facts.trained else "no trained ratio"
    skips = "leaves the sparsity to target_error" if facts.has_target else f"chose sparsity {sparsity:g}"
    return (
        f"preset automatic {skips}, {dense}, for {facts.family}: {', '.join([*run, weights])}; "
        "its quality was measured on the miniature alone, at 32,760 tokens: compare with a dense run"
    )
