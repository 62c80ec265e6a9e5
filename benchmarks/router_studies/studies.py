"""All experiments in one run."""

from .budgets import budget_study
from .frozen import freeze
from .orders import order_study
from .query_blocks import query_block_study
from .ratios import ratio_study
from .routers import router_study

STUDIES = {
    "routers": router_study,
    "ratios": ratio_study,
    "budgets": budget_study,
    "orders": order_study,
    "query_blocks": query_block_study,
}


def run_studies(train_captures, held_out, *, steps, sparsities, options, names=tuple(STUDIES), say=print, frozen=False):
    """Runs the named studies and says each table as it is ready.

    Args:
        train_captures, held_out: lists of Capture of one model and grid, the second from other prompts and seeds.
        steps: optimisation steps per layer of every training. sparsities: shares of skipped key blocks.
        options: TrainerOptions that the variants start from. say: takes each finished text.
        frozen: draw the query blocks of a capture once, which makes the studies of one token order several times faster
        and takes memory (see FrozenLayer).
    """
    kept = train_captures, held_out
    if frozen:
        kept = freeze(train_captures, options.query_blocks), freeze(held_out, options.query_blocks)
    for name in names:
        captures = kept if name in ("routers", "ratios") else (train_captures, held_out)
        say(STUDIES[name](*captures, steps=steps, sparsities=sparsities, options=options))
        say("")
