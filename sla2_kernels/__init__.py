"""SLA2 attention: the operator. Usable alone: ``from sla2_kernels import sla2_attention``."""

from .attention import select_key_blocks, sla2_attention
from .router import K_BLOCK, Q_BLOCK
from .support import default_precision, unsupported_reason
from .weights import RouterFileError, RouterLayer, RouterWeights, identity_router, load_router

__all__ = [
    "K_BLOCK",
    "Q_BLOCK",
    "RouterFileError",
    "RouterLayer",
    "RouterWeights",
    "default_precision",
    "identity_router",
    "load_router",
    "select_key_blocks",
    "sla2_attention",
    "unsupported_reason",
]
