"""One call of the diffusion model: what its attention calls need to know, and which of their tokens are the video's."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compat.recording import lasting_tensors
from ..runs.record import RunRecord
from .call import check_sizes, read_call
from .layer_requests import LayerRequests
from .recomputation import Decisions
from .run_dense import RunDense
from .steps import Step
from .text_mask import HAS_MASK, valid_keys
from .video_tokens import VideoSpan

CALL = "sla2_call"  # in transformer_options: the ModelCall of this model call
LAYER = "sla2_layer"  # in transformer_options: the layer whose self-attention is running
OVERRIDE = "optimized_attention_override"
NO_SPAN = "the model's arguments do not say where the video's tokens lie"


@dataclass(frozen=True)
class ModelCall:
    """One call of the diffusion model. hook: the AttentionHook. halves: of guidance, in the order of its batch.

    override: what the marked calls of this model call run through. own_attention: the checkpoint brings attention of its own
    for some modules. steps: of the run, None where unknown.
    """

    hook: Any
    run: RunRecord
    diffusion_model: Any
    span: VideoSpan | None
    step: Step
    override: Any = None
    own_attention: bool = False
    requests: LayerRequests = LayerRequests()
    halves: tuple = ()
    steps: int | None = None
    counts: Counter = field(default_factory=Counter)  # self-attention "entered" and "attended" in this one call
    decisions: Decisions = field(default_factory=Decisions)  # (sparsity of its sparse output or None, is it used)
    has_autograd: bool = field(default_factory=torch.is_grad_enabled)
    _valid_keys: dict = field(default_factory=dict)  # by text mask, which is kept: its address stays its own

    def __deepcopy__(self, memo):
        return self

    @property
    def repeated(self):
        """Whether gradient checkpointing recomputes parts of this call now, which nothing counts."""
        return self.decisions.repeated

    @property
    def grid(self):
        """(t, h, w) of the video's tokens, or None."""
        return None if self.span is None else self.span.grid

    def read(self, args, kwargs):
        """(AttentionCall, ExactTokens) of one of its self-attention calls; raises RunDense."""
        return self.video_request(read_call(args, kwargs))

    def video_request(self, request):
        """(AttentionCall, ExactTokens) without the keys that a text mask hides; raises RunDense."""
        check_sizes(self.hook.facts, request)
        if self.span is None:
            raise RunDense(NO_SPAN)
        exact = self.span.exact_tokens(request.tokens, request.key_tokens)
        if request.mask is None:
            return request, exact
        if not self.hook.facts.layout.text_mask:
            raise RunDense(HAS_MASK)
        return self._valid_keys_of(request.mask, exact).of(request, exact)

    def _valid_keys_of(self, mask, exact):
        """ValidKeys of a mask, read on the host once for all layers; raises RunDense."""
        key = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, exact)
        if key not in self._valid_keys:
            with lasting_tensors():  # for the layers that follow
                try:
                    found = valid_keys(mask, exact)
                except RunDense as refused:
                    found = refused.reason
            self._valid_keys[key] = mask, found
        _, found = self._valid_keys[key]
        if isinstance(found, str):
            raise RunDense(found)
        return found
