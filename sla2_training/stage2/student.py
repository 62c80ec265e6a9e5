"""A model whose self-attention is SLA2 with a trainable mixing ratio, and which can still be run dense as its own teacher."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from sla2_kernels import sla2_attention
from sla2_kernels.support import resolve_precision

from ..ratios import logits_of_estimates, start_logits
from .lora import set_lora_scale

LORA, RATIOS = "lora_", "ratio_logits"


class Student(nn.Module):
    """forward(noisy, t, context, dense=False) -> velocity.

    Args:
        model: the network, LoRA already in it (add_lora). run(model, noisy, t, context, attend) -> velocity: one call of it;
            noisy (B, C, T, h, w), t (B,) in 0 to 1; attend(layer, q, k, v) -> out on (B, N, H, D) is its self-attention.
        router: RouterWeights. sparsity, precision, backend: as in sla2_attention, precision also "auto".

    Dense runs attend to everything and leave the LoRA out: that is the model as it was.
    """

    def __init__(self, model, run, router, *, sparsity, precision="auto", backend="auto"):
        super().__init__()
        self.model, self.run, self.router = model, run, router
        self.sparsity, self.precision, self.backend = sparsity, precision, backend
        self.dense = False
        self.seen_ratios = None
        for index, layer in enumerate(router.layers):
            self.register_buffer(f"proj_q_{index}", layer.proj_q, persistent=False)
            self.register_buffer(f"proj_k_{index}", layer.proj_k, persistent=False)
        starts = start_logits(router, sparsity)
        self.ratio_logits = nn.ParameterList(
            # without a learned ratio start_ratios() sets one: what the run itself estimates
            nn.Parameter(torch.zeros(router.num_heads, 1) if logits is None else logits)
            for logits in starts
        )
        self.without_ratios = {layer for layer, logits in enumerate(starts) if logits is None}
        self.needs_start = bool(self.without_ratios)

    def forward(self, noisy, t, context, dense=False):
        self.dense = dense
        set_lora_scale(self.model, 0.0 if dense else 1.0)
        try:
            return self.run(self.model, noisy, t, context, self.attend)
        finally:
            # the backward pass of checkpointed blocks runs the sparse forward again
            self.dense = False
            set_lora_scale(self.model, 1.0)

    def attend(self, layer, q, k, v):
        """Self-attention of one layer, all (B, N, H, D)."""
        if self.dense:
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        estimates = self.seen_ratios is not None and layer in self.without_ratios
        ratio = None if estimates else torch.sigmoid(self.ratio_logits[layer].float())
        projections = getattr(self, f"proj_q_{layer}"), getattr(self, f"proj_k_{layer}")
        options = {
            "sparsity": self.sparsity,
            "precision": resolve_precision(self.precision, q.device),
            "layout": "BNHD",
            "backend": self.backend,
            "return_alpha": ratio is None,
            "keep_diagonal": self.router.keep_diagonal,
            "query_block": self.router.q_block,
        }
        with torch.autocast(q.device.type, enabled=False):
            out = sla2_attention(q, k, v, *projections, ratio, **options)
        if ratio is None:
            out, estimated = out
            self.seen_ratios.setdefault(layer, []).append(estimated)
        return out

    @torch.no_grad()
    def start_ratios(self, noisy, t, context):
        """Starts the ratios of layers that have learned none at what a run estimates; the others' stay."""
        if not self.needs_start:
            return
        self.seen_ratios = {}
        try:
            self(noisy, t, context)
            if isinstance(self, FSDPModule):
                self.reshard()  # the call left them whole
            for layer, seen in self.seen_ratios.items():
                _fill(self.ratio_logits[layer], logits_of_estimates(seen))
        finally:
            self.seen_ratios = None
        self.needs_start = False


def _fill(parameter, values):
    """Writes values into a parameter, which may be split over the processes, all of which have the same values."""
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def freeze_all_but(student):
    """LoRA weights and ratios train, nothing else; returns (LoRA parameters, ratio parameters)."""
    lora, ratios = [], []
    for name, parameter in student.named_parameters():
        kind = lora if LORA in name else ratios if name.startswith(RATIOS) else None
        parameter.requires_grad_(kind is not None)
        if kind is not None:
            kind.append(parameter)
    return lora, ratios
