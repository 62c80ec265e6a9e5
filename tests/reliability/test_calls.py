"""Whatever call, mask or text comes in: sparse, or down the chain untouched with a reason, or one sentence. Nothing else."""

import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

HEADS, DIM = 2, 64
FUZZ = {"deadline": None, "derandomize": True, "database": None}


def tensor(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


SHAPES = [
    (1, 300, HEADS * DIM), (1, HEADS, 300, DIM), (1, 200, HEADS * DIM), (2, 300, HEADS * DIM), (1, 300, 7), (300, 128), (),
    (1, 0, HEADS * DIM), (1, 3, 300, DIM), (1, HEADS, 300, 13), (1, 1, HEADS * DIM), (1, 300, 1, 1, 128),
]  # fmt: skip
DTYPES = [torch.float32] * 4 + [torch.float16, torch.float64, torch.int32, torch.complex64]
shapes = st.sampled_from(SHAPES[:3]) | st.sampled_from(SHAPES)
tensors = st.tuples(shapes, st.sampled_from(DTYPES)).map(lambda drawn: tensor(*drawn[0], dtype=drawn[1]))
odd = st.none() | st.booleans() | st.integers(-3, 4) | st.floats() | st.text(max_size=3) | st.just([])
heads = st.sampled_from([HEADS] * 6 + [1, 3, 0, -2, 2.0, None, "2", True])
keywords = st.fixed_dictionaries(
    {},
    optional={
        "mask": tensors | odd,
        "attn_precision": odd | st.sampled_from([torch.float32, torch.float16]),
        "skip_reshape": st.booleans() | odd,
        "skip_output_reshape": st.booleans() | odd,
        "low_precision_attention": st.booleans() | odd,
        "scale": odd,
        "enable_gqa": st.booleans() | odd,
        "windows": odd,
    },
)


def test_fuzzed_attention_calls(bench):
    """A call is answered sparse in the shape asked for, or handed down as it came, with a reason that is counted."""
    counts = Counter()

    @settings(max_examples=600, **FUZZ)
    @given(
        q=tensors,
        k=tensors,
        v=tensors,
        same=st.sampled_from([True, True, True, False]),
        heads=heads,
        keywords=st.just({}) | keywords,
        by_name=st.booleans(),
        sound=st.booleans(),
    )
    def fuzz(q, k, v, same, heads, keywords, by_name, sound):
        b, below = bench(), []
        if sound:
            # else how many run sparse hangs on the modules that are loaded: hypothesis draws from their constants
            q, heads = tensor(*SHAPES[0]), HEADS

        def chain(func, *args, **kwargs):
            below.append((args, kwargs))
            return "from below"

        b.override = b.override_over(chain)
        b.model_call()
        k, v = (q, q) if same else (k, v)
        args = () if by_name else (q, k, v, heads)
        named = {"q": q, "k": k, "v": v, "heads": heads} if by_name else {}
        out = b.attend(*args, **named, **keywords)
        if isinstance(out, str):
            ((seen_args, seen),) = below
            assert all(a is b for a, b in zip(seen_args, args, strict=True))
            assert all(seen[name] is value for name, value in {**named, **keywords}.items())
            assert b.run.layers[0].dense.total() == 1
            counts["handed down"] += 1
        else:
            assert torch.isfinite(out).all() and out.dtype == q.dtype and out.numel() == q.numel()
            assert b.run.layers[0].sparse == 1
            counts["sparse"] += 1

    fuzz()
    print(dict(counts))
    assert counts["sparse"] > 20 and counts["handed down"] > 100


def masked_bench(bench, front):
    b = bench(grid=(2, 10, 10), front=front, sparsity=0.0)
    b.model_call()
    return b


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.float64, torch.bool])
def test_a_mask_of_any_dtype_is_understood_or_handed_down(bench, dtype, qkv):
    b, below = masked_bench(bench, 100), []
    b.override = b.override_over(lambda func, *args, **kwargs: below.append(1) or args[0])
    b.model_call()
    out = b.attend(*qkv, heads=HEADS, mask=torch.ones(1, 1, 1, 300, dtype=dtype))
    assert out.shape == qkv[0].shape and (below or b.run.layers[0].sparse)


def test_two_masks_of_one_shape_in_one_model_call_are_told_apart(bench, qkv):
    """Blocks of one model may mask their text differently: the second is no copy of the first."""
    b = masked_bench(bench, 100)
    for hidden in (20, 70):
        mask = torch.ones(1, 1, 1, 300, dtype=torch.bool)
        mask[..., hidden:100] = False
        expected = b.attention(*qkv, heads=HEADS, mask=mask)
        found = b.attend(*qkv, heads=HEADS, mask=mask)
        del mask  # its memory may be the next one's
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert b.run.layers[0].sparse == 2


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("no x"), ValueError("5 dimensions"), ZeroDivisionError(), IndexError()]
)
def test_arguments_of_a_model_that_nobody_understands_run_dense(bench, qkv, error):
    """Another pack calls the model in a way of its own: its calls run dense, and the report says why."""
    b = bench()

    def inputs():
        raise error

    b.hook.begin_run()
    b.model_call()
    b.hook.model_call(object(), inputs, b.options)
    assert torch.equal(b.attend(*qkv, heads=HEADS), b.attention(*qkv, heads=HEADS))
    (reason,) = b.run.layers[0].dense
    assert "do not say where the video's tokens lie" in reason and any(
        type(error).__name__ in note for note in b.run.notes
    )


texts = st.text(max_size=30) | st.text("0123456789.%-> :;,layersdn\n", max_size=60)


def test_fuzzed_schedules_layer_lists_and_sparsities(pack_module):
    """Text of a workflow from anywhere: rules, or one sentence that says which input."""
    settings_module, schedule = pack_module("nodes.settings.values"), pack_module("nodes.settings.schedule")
    counts = Counter()

    def attempt(parse, names):
        try:
            counts[type(parse()).__name__] += 1
        except ValueError as error:
            said = str(error)
            assert said.startswith(names) and "\n" not in said and len(said) < 600, said
            counts["refused"] += 1

    @settings(max_examples=800, **FUZZ)
    @given(text=texts)
    def fuzz(text):
        attempt(lambda: settings_module.parse_layers(text, 30), "dense_layers")
        attempt(lambda: schedule.parse_schedule(text, 30, settings_module.parse_layers), ("schedule", "dense_layers"))

    fuzz()
    assert counts["refused"] > 500 and counts["frozenset"] > 5


@pytest.mark.parametrize(
    "text", ["1" * 100_000, "." * 100_000, "0%-" * 30_000, " " * 100_000 + "x", "layers " * 20_000, "1." * 50_000]
)
def test_megabytes_of_text_take_no_time(pack_module, text):
    settings_module, schedule = pack_module("nodes.settings.values"), pack_module("nodes.settings.schedule")
    begun = time.monotonic()
    for parse in (
        lambda: settings_module.parse_layers(text, 30),
        lambda: schedule.parse_schedule(text + ": 0.5", 30, settings_module.parse_layers),
    ):
        with pytest.raises(ValueError, match="dense_layers|schedule") as caught:
            parse()
        assert len(str(caught.value)) < 600
    assert time.monotonic() - begun < 2
