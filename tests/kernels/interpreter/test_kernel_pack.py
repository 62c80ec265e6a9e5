"""The packing kernel: what it stores, decoded again, is K and V within the format's rounding, and h_j and z_j."""

import pytest
import torch
from operator_inputs import embedded, normal, relative_error

from sla2_kernels.kernels.int8_pack import int8_pack
from sla2_kernels.kernels.pack import pack
from sla2_kernels.kernels.product_order import channel_at
from sla2_kernels.reference import phi
from sla2_kernels.triton_backend import Workspace

BLOCK = 64


def blocks_of(x):
    """(G, M, D) -> (G, T, 64, D), rows past the end zero."""
    count = -(-x.shape[1] // BLOCK)
    padded = torch.nn.functional.pad(x, (0, 0, 0, count * BLOCK - x.shape[1]))
    return padded.unflatten(1, (count, BLOCK))


def packed(k, v, *, qk="16bit", pv="16bit", linear=False, heads=None, register_order=False, fp8_sums=False):
    """The workspace of the heads in ``heads`` and K's float64 mean."""
    heads = heads or slice(0, k.shape[0] * k.shape[1])
    group, blocks, head_dim = heads.stop - heads.start, -(-k.shape[2] // BLOCK), k.shape[3]
    mean = k.double().mean(dim=2).flatten(0, 1)
    low = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

    def empty(wanted, *shape, dtype):
        return torch.empty(group, blocks, *shape, dtype=dtype) if wanted else None

    square, rows = head_dim * head_dim, (head_dim + 1) * head_dim
    work = Workspace(
        packed_k=empty(qk != "16bit", BLOCK, head_dim, dtype=low.get(qk)),
        k_scale=empty(qk != "16bit", dtype=torch.float32),
        packed_v=empty(pv == "fp8", head_dim, BLOCK, dtype=torch.float8_e4m3fn),
        v_exponent=empty(pv == "fp8", dtype=torch.float32),
        sums=empty(linear, square if fp8_sums else rows, dtype=low["fp8"] if fp8_sums else k.dtype),
        sums_exponent=empty(fp8_sums, dtype=torch.float32),
    )
    if linear:
        work.norms = empty(True, head_dim, dtype=k.dtype) if fp8_sums else work.sums[..., square:]
    balance = torch.ones(mean.shape[0], 2, head_dim)
    pack(k, v, mean.float(), work, heads, qk, pv, balance=balance, register_order=register_order)
    return work, mean


def smoothed(k, mean):
    return k.double().flatten(0, 1) - mean.float().double()[:, None]


def decoded_keys(work):
    return work.packed_k.double() * work.k_scale.double()[..., None, None]


def e4m3_tolerance(x):
    """Half a step of E4M3 at x, a little widened: x is in units of the block's scale."""
    return torch.maximum(x.abs() * 2.0**-4, torch.full_like(x, 2.0**-10)) * 1.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("keys", "head_dim"), [(1, 64), (63, 128), (64, 64), (65, 32), (300, 128)])
def test_int8_keys_are_smoothed_and_rounded_to_nearest(generator, keys, head_dim, dtype):
    k = embedded(normal(generator, 2, 3, keys, head_dim, dtype=dtype) + 3)
    work, mean = packed(k, k, qk="int8")
    wide = blocks_of(smoothed(k, mean))
    assert torch.allclose(work.k_scale.double() * 127, wide.abs().amax(dim=(2, 3)).clamp_min(1e-20), rtol=1e-5)
    assert ((decoded_keys(work) - wide).abs() <= 0.501 * work.k_scale[..., None, None]).all()


@pytest.mark.parametrize(("keys", "head_dim"), [(1, 64), (65, 32), (300, 128)])
def test_fp8_keys_are_rounded_to_nearest(generator, keys, head_dim):
    k = embedded(normal(generator, 1, 2, keys, head_dim, dtype=torch.float16) + 3)
    work, mean = packed(k, k, qk="fp8")
    scale = work.k_scale.double()[..., None, None]
    wide = blocks_of(smoothed(k, mean)) / scale
    assert wide.abs().max() <= 448.1
    assert ((decoded_keys(work) / scale - wide).abs() <= e4m3_tolerance(wide)).all()


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("keys", [1, 65, 300])
def test_values_are_fp8_over_a_power_of_two_and_stored_transposed(generator, keys, size):
    v = embedded(normal(generator, 1, 2, keys, 64) * size)
    work, _ = packed(v, v, qk="fp8", pv="fp8")
    exponent = work.v_exponent.double()
    assert torch.equal(exponent, exponent.round())
    wide = blocks_of(v.double().flatten(0, 1)) * torch.exp2(-exponent)[..., None, None]
    largest = wide.abs().amax(dim=(2, 3))
    assert (largest <= 448).all() and (largest > 223).all(), "the block does not fill E4M3's range"
    assert ((work.packed_v.double().transpose(2, 3) - wide).abs() <= e4m3_tolerance(wide)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("keys", "head_dim"), [(1, 64), (63, 128), (130, 32), (300, 64)])
def test_linear_sums_of_valid_keys(generator, keys, head_dim, dtype):
    k, v = (embedded(normal(generator, 2, 3, keys, head_dim, dtype=dtype) + 1) for _ in range(2))
    work, mean = packed(k, v, linear=True)
    sums = work.sums.double().unflatten(2, (head_dim + 1, head_dim)) * BLOCK
    phi_k = blocks_of(phi(smoothed(k, mean)))
    h = phi_k.transpose(2, 3) @ blocks_of(v.double().flatten(0, 1))
    bar = 1e-6 if dtype == torch.float32 else 2e-3
    assert relative_error(sums[:, :, :head_dim], h) < bar
    assert relative_error(sums[:, :, head_dim], phi_k.sum(dim=2)) < bar


def test_a_group_of_heads_is_the_same_slice_of_all_heads(generator):
    k, v = (normal(generator, 2, 3, 130, 64) for _ in range(2))
    options = {"qk": "int8", "pv": "fp8", "linear": True}
    everything, _ = packed(k, v, **options)
    group, _ = packed(k, v, heads=slice(2, 5), **options)
    for name in ("packed_k", "k_scale", "packed_v", "v_exponent", "sums"):
        part, whole = getattr(group, name), getattr(everything, name)[2:5]
        assert torch.equal(part.view(torch.int8), whole.view(torch.int8)), name


@pytest.mark.parametrize("qk", ["int8", "fp8"])
def test_equal_keys_and_zero_values_stay_finite(generator, qk):
    k = normal(generator, 1, 1, 1, 64).expand(-1, -1, 130, -1)
    v = normal(generator, 1, 1, 130, 64)
    v[:, :, 64:128] = 0
    work, mean = packed(k, v, qk=qk, pv="fp8", linear=True)
    assert (decoded_keys(work) - blocks_of(smoothed(k, mean))).abs().max() < 1e-6
    assert (work.packed_v[:, 1].float() == 0).all() and torch.isfinite(work.v_exponent).all()
    assert torch.isfinite(work.sums).all()


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("keys", [1, 65, 300])
def test_fp8_sums_are_fp8_over_a_power_of_two(generator, keys, size):
    k = embedded(normal(generator, 1, 2, keys, 64))
    v = embedded(normal(generator, 1, 2, keys, 64) * size)
    (plain, _), (low, _) = (packed(k, v, linear=True, fp8_sums=fp8_sums) for fp8_sums in (False, True))
    unit = low.sums_exponent.double().exp2()[..., None]
    h = plain.sums[..., : 64 * 64].double() / unit
    # the power of two is the least for a bound on h_j, z_j max |V_j| and 1% more, instead of h_j itself
    v_largest = blocks_of(v.double().flatten(0, 1)).abs().amax((-2, -1))
    bound = 1.01 * plain.norms.double().amax(-1) * v_largest / unit[..., 0]
    assert (h.abs().amax(-1) <= bound).all() and (bound <= 448.1).all() and (bound > 223).all()
    assert ((low.sums.double() - h).abs() <= e4m3_tolerance(h)).all()
    assert torch.equal(low.norms, plain.norms)


def int8_packed(k, v, channel):
    """The workspace of all heads with K, V and h_j in INT8; channel: (B * H, D), V's channel powers."""
    heads, head_dim, blocks = k.shape[0] * k.shape[1], k.shape[3], -(-k.shape[2] // BLOCK)
    low = Workspace(
        packed_k=torch.empty(heads, blocks, BLOCK, head_dim, dtype=torch.int8), k_scale=torch.empty(heads, blocks),
        packed_v=torch.empty(heads, blocks, head_dim, BLOCK, dtype=torch.int8), v_exponent=torch.empty(heads, blocks),
        sums=torch.empty(heads, blocks, head_dim**2, dtype=torch.int8), sums_exponent=torch.empty(heads, blocks),
        norms=torch.empty(heads, blocks, head_dim, dtype=k.dtype),
    )  # fmt: skip
    mean = k.double().mean(dim=2).flatten(0, 1)
    balance = torch.ones(heads, 2, head_dim)
    int8_pack(k, v, mean.float(), low, slice(0, heads), balance=balance, v_channel=channel)
    return low


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize(("keys", "head_dim"), [(1, 64), (65, 64), (300, 64), (150, 128), (70, 32)])
def test_int8_sums_fill_their_range_and_their_columns_are_over_the_channels(generator, keys, head_dim, size):
    k = embedded(normal(generator, 1, 2, keys, head_dim))
    v = embedded(normal(generator, 1, 2, keys, head_dim) * size)
    channel = torch.randint(-2, 3, (2, head_dim), generator=generator).float().exp2()
    plain, _ = packed(k, v, linear=True)
    low = int8_packed(k, v, channel)
    unit = low.sums_exponent.double().exp2()[..., None]
    h = plain.sums[..., : head_dim**2].double().unflatten(-1, (head_dim, head_dim)) / channel[:, None, None]
    h = h[..., channel_at.fn(torch.arange(head_dim), head_dim)] / unit[..., None]
    # half a step, and float16's rounding before
    assert ((low.sums.double() - h.flatten(2)).abs() <= 0.501 + 2.0**-5).all()
    largest = low.sums.double().abs().amax(-1)
    assert (largest >= 63).all() and (largest <= 127).all()
    # the keys are summed in another order
    torch.testing.assert_close(low.norms, plain.norms)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_in_v_reaches_what_is_not_int8(generator, bad):
    k, v = (normal(generator, 1, 2, 130, 64) for _ in range(2))
    v[0, 1, 70, 5] = bad
    low = int8_packed(k, v, torch.ones(2, 64))
    finite = torch.tensor([[True] * 3, [True, False, True]])
    assert torch.equal(low.v_exponent.isfinite(), finite) and torch.equal(low.norms.isfinite().all(-1), finite)


def test_int8_sums_of_zero_values_weigh_nothing(generator):
    k, v = (normal(generator, 1, 1, 130, 64) for _ in range(2))
    v[:, :, 64:128] = 0
    low = int8_packed(k, v, torch.full((1, 64), 2.0**-67))
    assert (low.sums[:, 1] == 0).all() and (low.packed_v[:, 1] == 0).all() and low.sums_exponent.isfinite().all()
    before, zeros, after = low.sums_exponent[0]
    assert zeros < min(before, after) - 40


def test_nothing_is_packed_for_16_bit_without_a_linear_branch(generator):
    k = normal(generator, 1, 1, 65, 64)
    work, _ = packed(k, k)
    assert not any(torch.is_tensor(value) for value in vars(work).values())


def test_register_order_moves_values_and_nothing_else(generator):
    k, v = (normal(generator, 1, 2, 150, 128) for _ in range(2))
    options = {"qk": "int8", "pv": "fp8", "linear": True}
    (plain, _), (ordered, _) = packed(k, v, **options), packed(k, v, **options, register_order=True)
    for name in ("packed_k", "k_scale", "v_exponent"):
        assert torch.equal(getattr(plain, name), getattr(ordered, name)), name
    h, z = ordered.sums[..., : 128 * 128].unflatten(-1, (128, 128)), ordered.sums[..., 128 * 128 :]
    in_channel_order = h.unflatten(-1, (4, 4, 4, 2)).transpose(-3, -2).flatten(-4)
    assert relative_error(torch.cat([in_channel_order.flatten(-2), z], -1), plain.sums) < 1e-6
    # what hopper_loop.py's registers do to P's keys and to the output's channels
    p = torch.rand(2, 3, 5, 64, generator=generator, dtype=torch.float64)
    operand = p.reshape(2, 3, 5, 4, 2, 4, 2).transpose(-3, -2).reshape(p.shape)
    out = operand @ ordered.packed_v.double().transpose(2, 3)
    out = out.reshape(2, 3, 5, 4, 4, 4, 2).transpose(-3, -2).reshape(out.shape)
    torch.testing.assert_close(out, p @ plain.packed_v.double().transpose(2, 3))
