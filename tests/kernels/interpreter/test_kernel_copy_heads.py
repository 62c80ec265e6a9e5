"""The kernel that copies groups of heads between GPUs' buffers does what torch's copies do, bit by bit."""

import pytest
import torch
from operator_inputs import normal

from sla2_kernels.kernels.copy_heads import copy_heads

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# (processes, batch, heads of a process, the group's, head_dim)
CASES = (
    (2, 1, 5, slice(0, 2), 128),
    (2, 2, 3, slice(2, 3), 64),
    (3, 1, 4, slice(1, 4), 32),
    (3, 2, 7, slice(0, 7), 16),
    (2, 1, 3, slice(1, 3), 5),
    (3, 3, 1, slice(0, 1), 1),
)
# what of a tensor (B, N, H, D) is in memory, of one that is larger: as it is, heads first, every second channel, one of q, k
# and v that lie together, at an odd address
VIEWS = {
    "contiguous": lambda make, b, n, h, d: make(b, n, h, d),
    "heads first": lambda make, b, n, h, d: make(b, h, n, d).transpose(1, 2),
    "channels apart": lambda make, b, n, h, d: make(b, n, h, 2 * d)[..., ::2],
    "together": lambda make, b, n, h, d: make(b, n, 3, h, d)[:, :, 1],
    "odd address": lambda make, b, n, h, d: make(b * n * h * d + 1)[1:].view(b, n, h, d),
    "one token for all": lambda make, b, n, h, d: make(b, 1, h, d).expand(b, n, h, d),
}


def both(shape, dtype, view, sources):
    """(by the kernel, by torch): tensors of NaN whose part view(tensor) got the sources."""
    found, expected = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    copy_heads(view(found), sources)
    for place, x in enumerate(sources):
        view(expected)[:, :, :, place] = x
    return found, expected


def assert_same_bits(found, expected):
    assert expected.isnan().any() and not expected.isnan().all()
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    "views", [("contiguous",) * 3, ("heads first",) * 3, tuple(VIEWS)[:3], tuple(VIEWS)[3:]], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_q_k_and_v_are_packed_as_by_torch(generator, case, dtype, views):
    processes, batch, share, part, head_dim = case
    tokens = int(torch.randint(1, 90, (), generator=generator))

    def make(*shape):
        return normal(generator, *shape, dtype=dtype)

    qkv = [VIEWS[name](make, batch, tokens, processes * share, head_dim) for name in views]
    sources = [x.unflatten(2, (processes, share)).permute(2, 1, 0, 3, 4)[1:, :, :, part] for x in qkv]
    width = part.stop - part.start
    # slots are farther apart than they are long
    size, gap = tokens * batch * 3 * width * head_dim, 16

    def slots(x):
        return x[:, :size].unflatten(1, (tokens, batch, 3, width, head_dim))

    assert_same_bits(*both((processes - 1, size + gap), dtype, slots, sources))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_split_and_put_together_as_by_torch(generator, case, dtype):
    processes, batch, share, part, head_dim = case
    tokens, width = int(torch.randint(1, 90, (), generator=generator)), part.stop - part.start
    out = normal(generator, batch, processes * tokens, width, head_dim, dtype=dtype)
    out = out.unflatten(1, (processes, tokens)).permute(1, 2, 0, 3, 4)
    shape = processes, tokens, batch, 1, width, head_dim
    found, expected = both(shape, dtype, lambda slots: slots[1:], [out[1:]])
    assert_same_bits(found, expected)
    returned = found[1:, :, :, 0]

    def places(x):
        return x.permute(2, 1, 0, 3, 4).unsqueeze(3)[:-1, :, :, :, part]

    assert_same_bits(*both((batch, tokens, processes, share, head_dim), dtype, places, [returned]))


def test_every_bit_pattern_is_copied():
    x = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).view(1, 64, 1, 8, 128)
    into = torch.zeros(1, 64, 1, 1, 8, 128, dtype=torch.bfloat16)
    copy_heads(into, [x])
    assert torch.equal(into.view(torch.int16).flatten(), x.view(torch.int16).flatten())
