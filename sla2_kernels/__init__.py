"""SLA2 attention: the operator. Usable alone: ``from sla2_kernels import sla2_attention``."""

from .attention import select_key_blocks, sla2_attention
from .router import K_BLOCK, Q_BLOCK
from .support import default_precision, unsupported_reason

__all__ = [
    "K_BLOCK",
    "Q_BLOCK",
    "default_precision",
    "select_key_blocks",
    "sla2_attention",
    "unsupported_reason",
]
