"""The methods that SLA2 is timed against, each where it can be imported.

A peer gets Q, K, V in the memory layout it likes best, made before the clock starts; SLA2 takes the views ComfyUI hands
it. None of these packages is part of this repository; put them on the folder given with --peers or install them.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import sol_attn

PEER_FOLDERS = ("sla_main", "sla_1", "ck", "fvk", "sage")


@dataclass(frozen=True)
class Method:
    """prepare(q, k, v) -> a function without arguments that runs the whole operation; q, k, v are (B, N, H, D) views."""

    name: str
    prepare: object
    sparsity: float | None = None
    fields: dict = field(default_factory=dict)

    @property
    def is_dense(self):
        return self.sparsity is None


def add_peer_folders(folder):
    """Puts the peers' folders on the import path: ``folder`` itself and the sub-folders of PEER_FOLDERS that exist."""
    if folder is None:
        return
    for path in (Path(folder), *(Path(folder) / name for name in PEER_FOLDERS)):
        if path.is_dir():
            sys.path.insert(0, str(path.resolve()))


def _heads_first(q, k, v):
    return tuple(x.transpose(1, 2).contiguous() for x in (q, k, v))


def sdpa(backend):
    def prepare(q, k, v):
        q, k, v = _heads_first(q, k, v)

        def run():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    return prepare


def _sage():
    from sageattention import sageattn

    def prepare(q, k, v):
        q, k, v = _heads_first(q, k, v)
        return lambda: sageattn(q, k, v, tensor_layout="HND", is_causal=False)

    return prepare


def _sla(module):
    def of_sparsity(sparsity):
        def prepare(q, k, v):
            q, k, v = _heads_first(q, k, v)
            layer = module.SparseLinearAttention(q.shape[-1], 1 - sparsity, BLKQ=128, BLKK=64).to(q.device)

            def run():
                with torch.no_grad():
                    return layer(q, k, v)

            return run

        return prepare

    return of_sparsity


def _sla_main():
    import sparse_linear_attention

    return _sla(sparse_linear_attention)


def _sla_one():
    import sla_one

    return _sla(sla_one)


def _sol_attn():
    function = sol_attn.load_compiled()

    def of_sparsity(sparsity):
        def prepare(q, k, v):
            q, k, v = (x.contiguous() for x in (q, k, v))
            return lambda: function(q, k, v, topk_ratio=1 - sparsity)

        return prepare

    return of_sparsity


def _vsa():
    import fastvideo_kernel

    def of_sparsity(sparsity):
        def prepare(q, k, v):
            tokens = q.shape[1]
            blocks = -(-tokens // 64)
            q, k, v = (F.pad(x, (0, 0, 0, blocks * 64 - tokens)) for x in _heads_first(q, k, v))
            sizes = torch.full((blocks,), 64, dtype=torch.int32, device=q.device)
            sizes[-1] = tokens - (blocks - 1) * 64
            gate = torch.randn_like(q)
            count = max(1, int((1 - sparsity) * blocks + 1e-6))
            return lambda: fastvideo_kernel.video_sparse_attn(
                q, k, v, sizes, sizes, count, block_size=(4, 4, 4), compress_attn_weight=gate
            )

        return prepare

    return of_sparsity


DENSE_PEERS = {
    "FlashAttention-2 (PyTorch)": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    "cuDNN attention (PyTorch)": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    "SageAttention 1.0.6 (dense INT8)": _sage,
}
SPARSE_PEERS = {
    "SLA (thu-ml/SLA main)": _sla_main,
    "SLA (thu-ml/SLA branch SLA-1)": _sla_one,
    "sol_attn (comfy-kitchen)": _sol_attn,
    "VSA (fastvideo-kernel)": _vsa,
}
BASELINE = "FlashAttention-2 (PyTorch)"


def find_peers(sparsities):
    """(methods that can be imported, {absent peer: why})."""
    methods, absent = [], {}
    for name, load in (*DENSE_PEERS.items(), *SPARSE_PEERS.items()):
        try:
            made = load()
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            # a wheel built for another torch fails in any of these ways, and that is what the table then says
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if name in DENSE_PEERS:
            methods.append(Method(name, made))
        else:
            methods += [Method(name, made(sparsity), sparsity) for sparsity in sparsities]
    return methods, absent
