"""Granularity of the selection: one set of key blocks for 128 query tokens, or one for every 64 of them."""

from dataclasses import replace

import torch

from miniature.captures import by_layer, model_shape
from sla2_kernels.router import K_BLOCK, Q_BLOCK, pool_blocks
from sla2_training.trainer import RouterTrainer

from .training import layer_tensors, table

HALF = Q_BLOCK // 2


def query_block_study(train_captures, held_out, *, steps, sparsities, options):
    """Text: error of the untrained router with the estimated ratio, per size of a choice, with and without its own blocks.

    Nothing is trained, so train_captures and steps do not matter. Every variant keeps equally many key blocks per token.
    """
    rows = []
    for size in (Q_BLOCK, HALF):
        for keep_diagonal in (False, True):
            changed = replace(options, keep_diagonal=keep_diagonal)
            trainer = RouterTrainer("explored", *model_shape(held_out), sparsities=sparsities, options=changed)
            name = f"{size} query tokens{', own key blocks kept' if keep_diagonal else ''}"
            rows.append((name, choice_errors(trainer, held_out, size)))
    return table("tokens that share a choice (estimated ratio)", [*map(str, sparsities)], rows)


@torch.no_grad()
def choice_errors(trainer, captures, size):
    """Root mean square over layers of the error at each sparsity, with a choice of key blocks per ``size`` query tokens."""
    trainer.generator.manual_seed(1)
    relative = []
    for of_layer in by_layer(captures).values():
        squared, energy = 0.0, 0.0
        for capture in of_layer:
            tensors = layer_tensors(capture)
            blocks = tensors.draw(trainer.query_blocks, trainer.generator)
            pooled = pool_blocks(tensors.q, size).float().flatten(0, 1)
            keys = tensors.k_pooled.flatten(0, 1)
            for pairs, drawn in tensors.chunks(blocks, trainer.memory_bytes):
                sums = tensors.sums(blocks, (pairs, drawn))
                energy = energy + sums.energy().sum()
                for part in range(Q_BLOCK // size):
                    chosen = blocks.flatten(0, 1)[pairs, drawn] * (Q_BLOCK // size) + part
                    # a part past a ragged end has no valid rows: whatever it chooses counts nothing
                    place = chosen.clamp_max(pooled.shape[1] - 1)[..., None].expand(-1, -1, pooled.shape[2])
                    scores = pooled[pairs].gather(1, place) @ keys[pairs].transpose(1, 2) * tensors.scale
                    own = _own(chosen, size, scores.shape[-1]) if trainer.keep_diagonal else None
                    mask = trainer.hard_masks(scores[None], None if own is None else own[None])
                    rows = sums.rows(slice(part * size, (part + 1) * size))
                    out = rows.output(mask, rows.estimated_ratio(mask))
                    squared = squared + rows.squared_error(out).sum(dim=(0, 1))
        relative.append(squared / energy)
    return torch.stack(relative).mean(dim=0).sqrt().tolist()


def _own(chosen, size, key_block_count):
    """bool (..., T_n): the key blocks that hold the tokens of the choices (...), each of ``size`` query tokens."""
    columns = torch.arange(key_block_count, device=chosen.device) * K_BLOCK
    begin = chosen[..., None] * size
    return (columns < begin + size) & (columns + K_BLOCK > begin)
