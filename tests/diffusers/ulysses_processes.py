"""What test_sequence_parallel.py compares with one process, found by 2 and by 4: saved to the folder argv[1] by their number.

A process of its own starts them by fork: to import torch and diffusers takes longer than all else.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel

import sla2_diffusers
from sla2_diffusers import apply_sla2
from sla2_kernels import RouterLayer, RouterWeights, sla2_attention
from sla2_kernels.pool_routing import PoolRouting
from sla2_kernels.sequence_parallel import sequence_parallel_attention

LAYERS, HEADS, HEAD_DIM = 2, 8, 32
SPARSITY = 0.6
# tokens: with 4 processes shares within a block; shares that blocks cross; whole blocks alone
LENGTHS = (300, 1160, 1024)
QUERY_BLOCKS = (128, 64)
WAYS = {
    "SLA2 first": {"exchange": "16bit"},
    "SLA2 last": {"exchange": "16bit"},
    "two groups": {"exchange": "16bit"},
    "8 bit": {"exchange": "8bit"},
    "8 bit, 64 query tokens": {"exchange": "8bit"},
    "untrained": {"exchange": "16bit"},
}


def transformer():
    torch.manual_seed(0)
    sizes = {"text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": LAYERS}
    return WanTransformer3DModel(num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, **sizes).eval()


def projections():
    """Two that differ from head to head."""
    generator = torch.Generator().manual_seed(2)
    each = torch.eye(HEAD_DIM) + 0.1 * torch.randn(HEADS, HEAD_DIM, HEAD_DIM, generator=generator)
    return each, each.flip(0)


def router(**facts):
    """Weights that differ from head to head, and projections that the heads of the second layer share."""
    proj_q, proj_k = projections()
    ratios = torch.linspace(-1, 1, HEADS)[None, :, None]
    layers = RouterLayer(proj_q, proj_k, ratios), RouterLayer(proj_q[0], proj_q[1], -ratios)
    return RouterWeights(layers, model_family="wan", num_heads=HEADS, head_dim=HEAD_DIM, sparsities=(0.75,), **facts)


def applied(model, way, **options):
    """The handle of SLA2 on the model in one of WAYS."""
    weights = None if way == "untrained" else router(q_block=64 if "64" in way else 128)
    return apply_sla2(model, weights, sparsity=0.75, minimum_tokens=396, **WAYS[way], **options)


@torch.no_grad()
def video(model):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 16, 3, 24, 22, generator=generator)  # 396 tokens: ragged last blocks
    context = torch.randn(1, 8, 32, generator=generator)
    return model(hidden, timestep=torch.tensor([500.0]), encoder_hidden_states=context, return_dict=False)[0]


def qkv(tokens, dtype, batch=2):
    """q, k, v, and a gradient. k has what a model's has: one large mean per channel."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, grad = (
        torch.randn(batch, tokens, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    k += 5 * torch.randn(HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, grad)]


def attend(q, k, v, heads, key_blocks=None, precision="16bit", query_block=128):
    proj_q, proj_k = (p[heads] for p in projections())
    alpha = torch.linspace(0.3, 0.8, HEADS)[heads]
    options = {"precision": precision, "key_blocks": key_blocks, "query_block": query_block}
    return sla2_attention(q, k, v, proj_q, proj_k, alpha, sparsity=SPARSITY, layout="BNHD", **options)


def attend_int8(q, k, v, heads, key_blocks=None, query_block=128):
    return attend(q, k, v, heads, key_blocks, "int8", query_block)


def routing(query_block=128):
    return PoolRouting(SPARSITY, *projections(), query_block=query_block)


def output_and_gradients(q, k, v, grad, attention):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def share_of(tensors):
    return [x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()] for x in tensors]


def gathered(part, dim):
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, dim)


def exchanged_in_8_bit(tokens, dtype, query_block):
    """(output, key blocks of all heads) of int8 attention behind an exchange in 8 bit."""
    selected = []

    def attend_and_keep(q, k, v, heads, key_blocks):
        selected.append(key_blocks.key_blocks)
        return attend_int8(q, k, v, heads, key_blocks, query_block)

    q, k, v, _ = share_of(qkv(tokens, dtype))
    out = sequence_parallel_attention(q, k, v, attend_and_keep, head_groups=2, routing=routing(query_block))
    return gathered(out, 1), gathered(torch.cat(selected, dim=1), 1)


def broken_rows():
    """Where the output of 8-bit exchanged tensors is not finite, one row of v of the last process being infinite."""
    q, k, v, _ = qkv(300, torch.float32)
    v[0, -1, 2] = torch.inf
    seen = []

    def opened(q, k, v, heads, key_blocks):
        seen.append(v.isfinite().all(dim=-1))
        return v

    sequence_parallel_attention(*share_of([q, k, v]), opened, routing=routing())
    return gathered(seen[0].int(), 2)


def work(rank, processes, folder):
    """One process of several; rank 0 saves what they found."""
    store = dist.FileStore(str(folder / f"store{processes}"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)

    def together(groups):
        return lambda q, k, v: sequence_parallel_attention(q, k, v, attend, head_groups=groups)

    found = {}
    for groups in (1, 2, 100):
        parts = output_and_gradients(*share_of(qkv(300, torch.float64)), together(groups))
        found["gradients", groups] = [gathered(part, 1) for part in parts]
    for tokens in LENGTHS:
        for dtype in (torch.float32, torch.bfloat16):
            found["16bit", tokens, dtype] = gathered(together(2)(*share_of(qkv(tokens, dtype)[:3])), 1)
            for query_block in QUERY_BLOCKS:
                found["8bit", tokens, dtype, query_block] = exchanged_in_8_bit(tokens, dtype, query_block)
    found["broken"] = broken_rows()
    # diffusers counts accelerators, and divides by their number
    torch.accelerator.device_count = lambda: 1
    for way in WAYS:
        model = transformer()
        sla2_diffusers.HEAD_GROUPS = 2 if way == "two groups" else 1
        handle = applied(model, way) if way != "SLA2 last" else None
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=processes))
        handle = handle or applied(model, way)
        found[way] = video(model), (handle.sparse_calls, handle.dense_calls, handle.sparsity), handle.attention_error
    if rank == 0:
        torch.save(found, folder / f"{processes}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    for number in (2, 4):
        torch.multiprocessing.start_processes(work, (number, Path(sys.argv[1])), number, start_method="fork")
