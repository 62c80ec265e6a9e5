"""Shapes at the edges: ragged and single tokens, M != N, batch, heads, sparsity, alpha and projections."""

import pytest
from operator_inputs import attention_inputs, relative_error

from sla2_kernels import select_key_blocks, sla2_attention

pytestmark = pytest.mark.usefixtures("wide_tiles")

# batch, heads, tokens, keys, head_dim, sparsity, knots, proj
CASES = {
    "one token": (1, 1, 1, 1, 64, 0.97, None, None),
    "one query, two key blocks": (2, 4, 1, 65, 64, 0.5, None, None),  # one row alone errs by 0.01 to 0.07 in FP8
    "many queries, one key": (1, 1, 129, 1, 64, 0.0, 0, None),
    "one below a key block": (2, 1, 63, 63, 64, 0.5, 0, "shared"),
    "one above a key block": (1, 2, 65, 65, 64, 0.5, 3, "per head"),
    "one below a query block": (2, 1, 127, 127, 128, 0.5, None, "shared"),
    "a query block exactly": (1, 1, 128, 128, 128, 0.5, 2, None),
    "one above a query block": (2, 3, 129, 129, 64, 0.5, None, "per head"),
    "one above, fewer keys": (1, 2, 257, 129, 64, 0.6, 1, None),
    "97% of five blocks keeps one": (1, 1, 300, 300, 64, 0.97, None, "shared"),
    "97% of 40 blocks keeps one": (1, 1, 200, 2500, 64, 0.97, 5, "per head"),
    "all selected": (1, 1, 300, 300, 128, 0.0, 4, "shared"),
    "one unselected of eleven": (1, 2, 129, 700, 64, 0.05, None, None),
    "one unselected and ragged": (1, 1, 700, 650, 128, 0.08, None, None),
    "more knots than query blocks": (1, 2, 129, 300, 64, 0.5, 7, None),
    "long ragged": (1, 1, 700, 700, 128, 0.8, None, "per head"),
}
FINER = (
    "one below a query block",
    "one above, fewer keys",
    "all selected",
    "one unselected and ragged",
    "more knots than query blocks",
)


@pytest.mark.parametrize(("precision", "bar"), [("16bit", 1e-5), ("int8", 6e-2), ("fp8", 1e-1)])
@pytest.mark.parametrize(
    ("case", "query_block"),
    [pytest.param(case, 128, id=name) for name, case in CASES.items()]
    + [pytest.param(CASES[name], 64, id=f"{name}, 64 query tokens") for name in FINER],
)
def test_edge(generator, case, query_block, precision, bar):
    batch, heads, tokens, keys, head_dim, sparsity, knots, proj = case
    inputs = attention_inputs(
        generator, batch=batch, heads=heads, tokens=tokens, keys=keys, head_dim=head_dim, knots=knots, proj=proj,
        sparsity=sparsity, query_block=query_block,
    )  # fmt: skip
    options = inputs.options | {"backend": "triton"}
    routed = select_key_blocks(inputs.q, inputs.k, inputs.proj_q, inputs.proj_k, **options)
    out, ratio = sla2_attention(*inputs.tensors(), precision=precision, return_alpha=True, **options)
    expected, expected_ratio = inputs.reference(routed)
    assert out.is_contiguous() and relative_error(out, expected) < bar
    assert relative_error(ratio, expected_ratio) < bar
