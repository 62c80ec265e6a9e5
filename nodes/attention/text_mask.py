"""Masks over text: a masked text token is left out of the keys, which is what the mask asks for.

Read on the host once per model call: the mask of a model's text is one and the same in all its layers.
"""

from dataclasses import dataclass, replace

import torch

from ...sla2_kernels.support import without_autocast
from .run_dense import RunDense

HAS_MASK = "the call has an attention mask"


def masks_keys_alone(mask, keys):
    """Whether ComfyUI's attention reads this mask as one row over ``keys`` keys for every query."""
    if not isinstance(mask, torch.Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return False
    if mask.dim() not in (2, 3, 4) or mask.shape[-1] != keys:
        return False
    rows = mask.shape[-2] if mask.dim() > 2 else mask.shape[0]
    return rows == 1 and (mask.dim() < 4 or mask.shape[1] == 1)


@dataclass(frozen=True)
class ValidKeys:
    """Which prefix and suffix keys are not masked: int64 indices into all keys."""

    prefix: torch.Tensor
    suffix: torch.Tensor
    all: bool

    def of(self, request, exact):
        """(request, exact) without the masked keys."""
        if self.all:
            return request, exact
        video = slice(exact.key_prefix, request.key_tokens - exact.key_suffix)
        # torch.cat fails where autocast has the other 16-bit type
        with without_autocast(request.k.device):
            k, v = (
                torch.cat([t[:, self.prefix], t[:, video], t[:, self.suffix]], dim=1) for t in (request.k, request.v)
            )
        return replace(request, k=k, v=v), replace(exact, key_prefix=len(self.prefix), key_suffix=len(self.suffix))


def valid_keys(mask, exact):
    """ValidKeys of a mask; raises RunDense where it is no plain mask over text."""
    rows = mask.detach().reshape(-1, mask.shape[-1]).cpu()
    if not (rows == rows[:1]).all():
        raise RunDense("the videos of this batch have unlike text masks")
    row = rows[0]
    valid = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
    if row.dtype != torch.bool and row[valid].any():
        raise RunDense(HAS_MASK)
    end = len(row) - exact.key_suffix
    if not valid[exact.key_prefix : end].all():
        raise RunDense(HAS_MASK)
    indices = [part.nonzero()[:, 0].to(mask.device) for part in (valid[: exact.key_prefix], valid[end:])]
    return ValidKeys(indices[0], indices[1] + end, bool(valid.all()))
