"""Whatever the shape, the sparsity and the options: the operator is the definition, and its output lies inside V."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_inputs import attention_inputs, embedded, relative_error

from sla2_kernels import select_key_blocks, sla2_attention

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)

shapes = {
    "seed": st.integers(0, 2**31),
    "batch": st.integers(1, 2),
    "heads": st.integers(1, 3),
    "tokens": st.integers(1, 300),
    "keys": st.integers(1, 400),
    "head_dim": st.integers(1, 40),
    "sparsity": st.floats(0, 0.999),
    "proj": st.sampled_from([None, "shared", "per head"]),
    "knots": st.sampled_from([None, 0, 1, 2, 5]),
}


def inputs_from(seed, sparsity, **shape):
    return attention_inputs(torch.Generator().manual_seed(seed), **shape), sparsity


@SETTINGS
@given(layout=st.sampled_from(["BHND", "BNHD"]), scale=st.sampled_from([None, 0.03, 0.7]), **shapes)
def test_16_bit_is_the_definition(layout, scale, **drawn):
    inputs, sparsity = inputs_from(**drawn)
    inputs.options["scale"] = scale
    tensors = [embedded(x.transpose(1, 2) if layout == "BNHD" else x) for x in inputs.tensors()[:3]]
    weights = inputs.tensors()[3:]
    out, ratio = sla2_attention(
        *tensors, *weights, sparsity=sparsity, scale=scale, layout=layout, precision="16bit", return_alpha=True
    )
    routed = select_key_blocks(*tensors[:2], *weights[:2], sparsity=sparsity, layout=layout)
    expected, expected_ratio = inputs.reference(routed)
    out = out.transpose(1, 2) if layout == "BNHD" else out
    # over V's size: an average of V may come near zero itself
    error = (out - expected).square().mean().sqrt() / inputs.v.double().square().mean().sqrt()
    assert error < 5e-6 and relative_error(ratio, expected_ratio) < 1e-5


@SETTINGS
@given(precision=st.sampled_from(["int8", "fp8"]), **shapes)
def test_low_bit_outputs_are_averages_of_values(precision, **drawn):
    inputs, sparsity = inputs_from(**drawn)
    out = sla2_attention(*inputs.tensors(), sparsity=sparsity, precision=precision)
    slack = 0.08 * inputs.v.abs().max()  # the rounding of V and P
    assert (out <= inputs.v.amax(dim=2, keepdim=True) + slack).all()
    assert (out >= inputs.v.amin(dim=2, keepdim=True) - slack).all()
