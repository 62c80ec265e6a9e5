"""Run by torch.distributed.run: what test_sequence_parallel.py compares with one process. Rank 0 saves it to argv[1]."""

import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel

from sla2_diffusers import apply_sla2
from sla2_kernels import RouterLayer, RouterWeights, sla2_attention
from sla2_kernels.sequence_parallel import sequence_parallel_attention

LAYERS, HEADS, HEAD_DIM = 2, 4, 32


def transformer():
    torch.manual_seed(0)
    sizes = {"text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": LAYERS}
    return WanTransformer3DModel(num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, **sizes).eval()


def router():
    """Weights that differ from head to head, and projections that the heads of the second layer share."""
    generator = torch.Generator().manual_seed(2)
    each = torch.eye(HEAD_DIM) + 0.1 * torch.randn(HEADS, HEAD_DIM, HEAD_DIM, generator=generator)
    ratios = torch.randn(1, HEADS, 1, generator=generator)
    layers = RouterLayer(each, each.flip(0), ratios), RouterLayer(each[0], each[1], -ratios)
    return RouterWeights(layers, model_family="wan", num_heads=HEADS, head_dim=HEAD_DIM, sparsities=(0.75,))


@torch.no_grad()
def video(model):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 16, 3, 24, 22, generator=generator)  # 396 tokens: ragged last blocks
    context = torch.randn(1, 8, 32, generator=generator)
    return model(hidden, timestep=torch.tensor([500.0]), encoder_hidden_states=context, return_dict=False)[0]


def qkv(batch=2, tokens=300):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, tokens, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(4)]


def attend(q, k, v, heads):
    alpha = torch.linspace(0.3, 0.8, HEADS, dtype=q.dtype)[heads]
    return sla2_attention(q, k, v, alpha=alpha, sparsity=0.6, precision="16bit", layout="BNHD")


def output_and_gradients(q, k, v, grad, attention):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def gathered(part, dim):
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, dim)


def main(path):
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    mine = [x.chunk(processes, dim=1)[rank] for x in qkv()]
    parts = output_and_gradients(*mine, lambda q, k, v: sequence_parallel_attention(q, k, v, attend))
    # diffusers counts accelerators, and divides by their number
    torch.accelerator.device_count = lambda: 1
    found = {"operator": [gathered(part, 1) for part in parts]}
    for order in ("SLA2 first", "SLA2 last"):
        model = transformer()
        handle = apply_sla2(model, router(), sparsity=0.75, minimum_tokens=396) if order == "SLA2 first" else None
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=processes))
        handle = handle or apply_sla2(model, router(), sparsity=0.75, minimum_tokens=396)
        found[order] = video(model), handle.sparse_calls, handle.dense_calls
    if rank == 0:
        torch.save(found, path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
