"""SLA (v1) against its formula in float64, and against the authors' own module where it is installed."""

import inspect

import pytest
import torch

from sla2_kernels import select_key_blocks
from sla2_kernels.sla_v1 import SLAWeights, linear_over_all_keys, sla_attention, take_sla_weights


def tensors(tokens=640, dim=64, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, tokens, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    proj = torch.randn(dim, dim, generator=generator) * 0.1, torch.randn(dim, generator=generator) * 0.1
    return [t.to(dtype) for t in (q, k + 0.5, v)], proj


def formula(q, k, v, weight, bias, topk):
    """O_s + proj_l(O_l) as their code writes it, one row of blocks after the other."""
    smooth = k - k.mean(dim=2, keepdim=True)
    means = [
        torch.stack([part.mean(dim=2) for part in t.split(size, dim=2)], 2) for t, size in ((q, 128), (smooth, 64))
    ]
    scores = means[0] @ means[1].transpose(-1, -2)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, scores.topk(int(topk * scores.shape[-1]), dim=-1).indices, True)
    mask = chosen.repeat_interleave(128, 2).repeat_interleave(64, 3)[:, :, : q.shape[2], : k.shape[2]]
    sparse = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    phi_q, phi_k = q.softmax(-1), k.softmax(-1)
    linear = phi_q @ (phi_k.transpose(-1, -2) @ v) / (1e-5 + (phi_q * phi_k.sum(2, keepdim=True)).sum(-1, keepdim=True))
    return sparse + linear @ weight.double().T + bias.double()


@pytest.mark.parametrize("tokens", [640, 601])
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_it_is_their_formula_to_1e_10(tokens, layout):
    (q, k, v), proj = tensors(tokens)
    expected = formula(q, k, v, *proj, topk=0.3)
    given = [t if layout == "BHND" else t.transpose(1, 2) for t in (q, k, v)]
    out = sla_attention(*given, [t.double() for t in proj], sparsity=0.7, precision="16bit", layout=layout)
    out = out if layout == "BHND" else out.transpose(1, 2)
    assert (out - expected).abs().max() < 1e-10


def test_top_k_only_is_softmax_over_the_selected_blocks():
    (q, k, v), (weight, bias) = tensors()
    out, share = sla_attention(q, k, v, None, sparsity=0.7, precision="16bit", return_alpha=True)
    assert (out - formula(q, k, v, 0 * weight, 0 * bias, topk=0.3)).abs().max() < 1e-10
    assert share.shape == (1, 2, 640) and (share == 1).all()
    blocks = select_key_blocks(q, k, sparsity=0.7)
    assert torch.equal(out, sla_attention(q, k, v, None, precision="16bit", key_blocks=blocks))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_inputs_stay_within_their_rounding(dtype):
    (q, k, v), proj = tensors(dtype=dtype)
    expected = formula(*(t.double() for t in (q, k, v)), *proj, topk=0.3)
    out = sla_attention(q, k, v, proj, sparsity=0.7, precision="16bit")
    assert out.dtype == dtype
    assert (out.double() - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps


def test_heads_are_taken_a_few_at_a_time(monkeypatch):
    (q, k, v), _ = tensors()
    whole = linear_over_all_keys(q, k, v)
    monkeypatch.setattr("sla2_kernels.sla_v1.CHUNK_BYTES", 1)
    torch.testing.assert_close(linear_over_all_keys(q, k, v), whole)


def test_gradients_reach_all_inputs():
    (q, k, v), proj = tensors(tokens=256)
    leaves = [t.requires_grad_() for t in (q, k, v, *(t.double() for t in proj))]
    sla_attention(*leaves[:3], leaves[3:], sparsity=0.5, precision="16bit").square().sum().backward()
    assert all(torch.isfinite(t.grad).all() and t.grad.abs().sum() > 0 for t in leaves)


def checkpoint(layers=3, prefix=""):
    state = {f"{prefix}blocks.{n}.self_attn.q.weight": torch.zeros(4, 4) for n in range(layers)}
    for n in range(layers):
        state[f"{prefix}blocks.{n}.self_attn.attn_op.local_attn.proj_l.weight"] = torch.full(
            (8, 8), float(n)
        ).bfloat16()
        state[f"{prefix}blocks.{n}.self_attn.attn_op.local_attn.proj_l.bias"] = torch.full((8,), float(n))
    return state


@pytest.mark.parametrize("prefix", ["", "net."])
def test_weights_are_taken_out_of_a_checkpoint(prefix):
    state = checkpoint(prefix=prefix)
    weights = take_sla_weights(state, "turbo.pth")
    assert isinstance(weights, SLAWeights) and weights.head_dim == 8 and len(weights.layers) == 3
    assert [weight[0, 0].item() for weight, _ in weights.layers] == [0, 1, 2]
    assert all(t.dtype == torch.float32 for pair in weights.layers for t in pair)
    assert list(state) == [f"{prefix}blocks.{n}.self_attn.q.weight" for n in range(3)]


def test_a_checkpoint_without_them_or_with_a_gap_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="wan.pth holds no SLA weights"):
        take_sla_weights({"blocks.0.self_attn.q.weight": torch.zeros(2)}, "wan.pth")
    state = checkpoint()
    del state["blocks.1.self_attn.attn_op.local_attn.proj_l.bias"]
    with pytest.raises(ValueError, match="those of layer 1 are not complete"):
        take_sla_weights(state)


def test_it_equals_the_authors_module_at_fp16():
    """Runs where thu-ml/SLA is installed and can run (a GPU, or Triton's interpreter): they compute in fp16 inside."""
    authors = pytest.importorskip("sparse_linear_attention")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (q, k, v), proj = tensors(tokens=512, dtype=torch.float16)
    theirs = authors.SparseLinearAttention(head_dim=64, topk=0.3, BLKQ=128, BLKK=64, use_bf16=False).to(device)
    if device == "cpu":
        theirs.proj_l.half()  # what their autocast does on a GPU
    # TurboDiffusion's copy of the module takes (B, N, H, D), the published package (B, H, N, D)
    swapped = "q.transpose(1, 2)" in inspect.getsource(type(theirs).forward)
    given = [(t.transpose(1, 2) if swapped else t).to(device) for t in (q, k, v)]
    with torch.no_grad():
        theirs.proj_l.weight.copy_(proj[0])
        theirs.proj_l.bias.copy_(proj[1])
        expected = theirs(*given).float().cpu()
    out = sla_attention(*given, proj, sparsity=0.7, precision="16bit", layout="BNHD" if swapped else "BHND")
    assert (out.float().cpu() - expected).norm() / expected.norm() < 2e-3
