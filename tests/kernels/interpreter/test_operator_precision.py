"""The whole operator against the float64 definition, per number format, dtype and head_dim."""

import pytest
import torch
from operator_inputs import attention_inputs, relative_error

from sla2_kernels import select_key_blocks, sla2_attention

pytestmark = pytest.mark.usefixtures("wide_tiles")

# (precision, compute capability, dtype): highest relative error
BARS = {
    ("16bit", "8.9", torch.float32): 1e-5,
    ("16bit", "8.9", torch.float16): 1e-3,
    ("int8", "8.0", torch.float32): 4e-2,  # P and V in INT8
    ("int8", "8.0", torch.float16): 4e-2,
    ("int8", "9.0", torch.float32): 6e-2,  # P and V in FP8
    ("int8", "9.0", torch.float16): 6e-2,
    ("fp8", "8.9", torch.float32): 1e-1,
    ("fp8", "8.9", torch.float16): 1e-1,
}


@pytest.mark.parametrize(("head_dim", "knots"), [(32, None), (64, 3), (128, None)])
@pytest.mark.parametrize(("precision", "capability", "dtype"), list(BARS))
def test_error_stays_below_the_bar(generator, monkeypatch, precision, capability, dtype, head_dim, knots):
    monkeypatch.setenv("SLA2_INTERPRET_CAPABILITY", capability)
    inputs = attention_inputs(
        generator,
        heads=1,
        tokens=140,
        keys=420,
        head_dim=head_dim,
        dtype=dtype,
        proj="shared",
        knots=knots,
        sparsity=0.6,
    )
    key_blocks = select_key_blocks(*inputs.tensors()[:2], *inputs.tensors()[3:5], sparsity=0.6, backend="triton")
    out, ratio = sla2_attention(
        *inputs.tensors(), sparsity=0.6, precision=precision, backend="triton", return_alpha=True
    )
    expected, expected_ratio = inputs.reference(key_blocks)
    bar = BARS[precision, capability, dtype]
    assert out.dtype == dtype and relative_error(out, expected) < bar
    assert ratio.dtype == torch.float32 and relative_error(ratio, expected_ratio) < bar


@pytest.mark.parametrize("knots", [None, 3])
def test_the_int8_loop_with_64_queries_per_selection(generator, monkeypatch, knots):
    """Its sums are in two halves then, as a tile has fewer rows than V has channels."""
    monkeypatch.setenv("SLA2_INTERPRET_CAPABILITY", "8.9")
    options = {"sparsity": 0.6, "query_block": 64}
    inputs = attention_inputs(
        generator,
        heads=1,
        tokens=140,
        keys=420,
        head_dim=128,
        dtype=torch.float16,
        proj="shared",
        knots=knots,
        **options,
    )
    key_blocks = select_key_blocks(*inputs.tensors()[:2], *inputs.tensors()[3:5], backend="triton", **options)
    out, ratio = sla2_attention(*inputs.tensors(), precision="int8", backend="triton", return_alpha=True, **options)
    expected, expected_ratio = inputs.reference(key_blocks)
    assert relative_error(out, expected) < 4e-2 and relative_error(ratio, expected_ratio) < 4e-2


def test_fp8_is_refused_below_8_9(generator, monkeypatch):
    monkeypatch.setenv("SLA2_INTERPRET_CAPABILITY", "8.6")
    inputs = attention_inputs(generator, heads=1, tokens=65)
    with pytest.raises(ValueError, match=r'precision "fp8" needs compute capability 8.9 .* this card has 8.6'):
        sla2_attention(*inputs.tensors(), precision="fp8", backend="triton")


@pytest.mark.parametrize("scale", [0.02, 0.5])
@pytest.mark.parametrize(("precision", "bar"), [("16bit", 1e-5), ("int8", 1e-1)])
def test_another_softmax_scale(generator, precision, bar, scale):
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=300, knots=None, sparsity=0.5, scale=scale)
    options = {"sparsity": 0.5, "scale": scale, "precision": precision, "backend": "triton"}
    out, ratio = sla2_attention(*inputs.tensors(), **options, return_alpha=True)
    expected, expected_ratio = inputs.reference()
    assert relative_error(out, expected) < bar and relative_error(ratio, expected_ratio) < bar
