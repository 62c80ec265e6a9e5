"""sla2_diffusers on a tiny random Wan transformer of diffusers, on the CPU."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

pytest.importorskip("diffusers.models")  # this folder alone would pass for the package

from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

from sla2_diffusers import SLA2WanProcessor, apply_sla2
from sla2_kernels import sla2_attention, support
from sla2_kernels.fitted_attention import fitted_attention
from sla2_kernels.reference import sla2_reference
from sla2_kernels.weights import RouterLayer, RouterWeights, identity_router

LAYERS, HEADS, HEAD_DIM = 2, 2, 32
SHAPE = (1, 16, 3, 24, 22)  # 3 x 12 x 11 = 396 tokens: ragged last blocks


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=LAYERS
    )
    return model.eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(SHAPE, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
        "return_dict": False,
    }


@torch.no_grad()
def run(model, inputs):
    return model(**inputs)[0]


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def router(**changes):
    eye = torch.eye(HEAD_DIM)
    layer = RouterLayer(eye + 0.05, eye - 0.05, torch.full((1, HEADS, 1), 1.0))
    facts = {"model_family": "wan", "num_heads": HEADS, "head_dim": HEAD_DIM, "sparsities": (0.75,)} | changes
    return RouterWeights((layer,) * LAYERS, **facts)


def test_sparsity_0_at_16_bit_equals_dense_to_rounding(transformer, inputs):
    dense = run(transformer, inputs)
    handle = apply_sla2(transformer, sparsity=0.0, precision="16bit")
    assert relative_error(run(transformer, inputs), dense) < 1e-5
    assert (handle.sparse_calls, handle.dense_calls, handle.sparsity) == (LAYERS, 0, 0.0)


def test_fused_projections_are_strided_views_of_one_tensor(transformer, inputs):
    dense = run(transformer, inputs)
    for block in transformer.blocks:
        block.attn1.fuse_projections()
    apply_sla2(transformer, sparsity=0.0, precision="16bit")
    assert relative_error(run(transformer, inputs), dense) < 1e-5


def test_undo_restores_bitwise_and_twice(transformer, inputs):
    dense = run(transformer, inputs)
    before = [block.attn1.processor for block in transformer.blocks]
    handle = apply_sla2(transformer, sparsity=0.75)
    assert not torch.equal(run(transformer, inputs), dense)
    handle.undo()
    handle.undo()
    assert [block.attn1.processor for block in transformer.blocks] == before
    assert torch.equal(run(transformer, inputs), dense)


def test_undo_leaves_a_later_processor_alone(transformer):
    handle = apply_sla2(transformer)
    later = object.__new__(SLA2WanProcessor)
    transformer.blocks[0].attn1.set_processor(later)
    handle.undo()
    assert transformer.blocks[0].attn1.processor is later
    assert not isinstance(transformer.blocks[1].attn1.processor, SLA2WanProcessor)


def test_undo_reaches_a_processor_that_another_one_was_put_around(transformer, inputs):
    dense = run(transformer, inputs)
    handle = apply_sla2(transformer, sparsity=0.75)
    for block in transformer.blocks:
        block.attn1.set_processor(lambda *args, inner=block.attn1.processor, **kwargs: inner(*args, **kwargs))
    assert not torch.equal(run(transformer, inputs), dense)
    handle.undo()
    handle.reset()
    assert torch.equal(run(transformer, inputs), dense)
    assert (handle.sparse_calls, handle.dense_calls) == (0, LAYERS) and "undo() was called" in handle.summary()


@pytest.mark.parametrize("trained_with", [None, {"keep_diagonal": True, "q_block": 64}, {"keep_diagonal": False}])
def test_a_router_is_used_as_it_was_trained_and_none_keeps_own_blocks_and_goes_by_the_card(
    transformer, inputs, monkeypatch, trained_with
):
    used = []
    monkeypatch.setattr("sla2_diffusers.default_query_block", lambda q, precision: 64)
    for operator in (sla2_attention, fitted_attention):

        def spy(*tensors, operator=operator, **options):
            used.append({"keep_diagonal": options["keep_diagonal"], "q_block": options["query_block"]})
            return operator(*tensors, **options)

        monkeypatch.setattr(f"sla2_diffusers.{operator.__name__}", spy)
    weights = None if trained_with is None else router(**trained_with)
    apply_sla2(transformer, weights, sparsity=0.75, precision="16bit")
    run(transformer, inputs)
    expected = {"keep_diagonal": True, "q_block": 64} if trained_with is None else {"q_block": 128} | trained_with
    assert used == [expected] * LAYERS


def test_cross_attention_is_untouched(transformer, inputs):
    before = [block.attn2.processor for block in transformer.blocks]
    handle = apply_sla2(transformer, sparsity=0.75)
    run(transformer, inputs)
    assert [block.attn2.processor for block in transformer.blocks] == before
    assert handle.sparse_calls == LAYERS


def test_the_operator_gets_views_and_the_routers_weights(transformer, inputs, monkeypatch):
    seen = []

    def spy(q, k, v, proj_q, proj_k, alpha, **options):
        seen.append((q, k, v, proj_q, proj_k, alpha, options))
        return sla2_attention(q, k, v, proj_q, proj_k, alpha, **options)

    monkeypatch.setattr("sla2_diffusers.sla2_attention", spy)
    weights = router()
    handle = apply_sla2(transformer, weights, sparsity=0.75, precision="16bit")
    run(transformer, inputs)
    q, k, v, proj_q, proj_k, alpha, options = seen[1]
    assert q.shape == k.shape == v.shape == (1, 396, HEADS, HEAD_DIM)
    assert v._is_view() and options["layout"] == "BNHD"
    assert torch.equal(proj_q, weights.layers[1].proj_q) and torch.equal(proj_k, weights.layers[1].proj_k)
    assert torch.equal(alpha, weights.ratio(1, 0.75))
    # one key block of 64 kept of 396 tokens
    assert handle.sparsity == pytest.approx(1 - 64 / 396)


def test_output_is_that_of_the_reference_in_every_layer(transformer, inputs, monkeypatch):
    def in_float64(q, k, v, proj_q, proj_k, alpha, *, sparsity, layout, **_):
        wide = [t.transpose(1, 2).double() for t in (q, k, v)]
        weights = [None if t is None else t.double() for t in (proj_q, proj_k, alpha)]
        return sla2_reference(*wide, *weights, sparsity=sparsity)[0].transpose(1, 2).to(q.dtype)

    handle = apply_sla2(transformer, router(), sparsity=0.75, precision="16bit")
    found = run(transformer, inputs)
    monkeypatch.setattr("sla2_diffusers.sla2_attention", in_float64)
    assert relative_error(found, run(transformer, inputs)) < 1e-4
    assert handle.sparse_calls == 2 * LAYERS


def test_identity_router_is_no_router(transformer, inputs):
    handle = apply_sla2(transformer, sparsity=0.75)
    without = run(transformer, inputs)
    handle.undo()
    apply_sla2(transformer, identity_router("wan", LAYERS, HEADS, HEAD_DIM), sparsity=0.75)
    assert torch.equal(run(transformer, inputs), without)


def test_dense_calls_are_counted_with_their_reason(transformer, inputs):
    dense = run(transformer, inputs)
    handle = apply_sla2(transformer, sparsity=0.75, minimum_tokens=397, dense_layers=[-1])
    assert torch.equal(run(transformer, inputs), dense)
    assert handle.dense_reasons() == {
        "the sequence has 396 tokens, minimum_tokens is 397": 1,
        "dense_layers keeps this layer dense": 1,
    }
    assert "0 of 2 self-attention calls ran sparse" in handle.summary()
    handle.reset()
    assert (handle.sparse_calls, handle.dense_calls, handle.sparsity) == (0, 0, None)


def test_an_explicit_backend_that_cannot_run_is_dense_and_says_so(transformer, inputs, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dense = run(transformer, inputs)
    handle = apply_sla2(transformer, sparsity=0.75, backend="triton")
    assert torch.equal(run(transformer, inputs), dense)
    (reason,) = handle.dense_reasons()
    assert "NVIDIA GPU" in reason


def test_a_mask_is_honoured_by_running_dense(transformer, inputs):
    attention = transformer.blocks[0].attn1
    x = torch.randn(1, 130, HEADS * HEAD_DIM)
    mask = torch.zeros(1, 1, 130, 130).masked_fill(torch.ones(130, 130).triu(1).bool(), float("-inf"))
    with torch.no_grad():
        expected = attention(x, attention_mask=mask)
        handle = apply_sla2(transformer, sparsity=0.5)
        assert torch.equal(attention(x, attention_mask=mask), expected)
    assert handle.dense_reasons() == {"the call has an attention mask": 1}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((None, None, {"query": None, "key": None}), "the call's rotary embedding is not Wan's"),  # AnyFlow
        ((None, None, torch.ones(1, 130, 64)), "the call's rotary embedding is not Wan's"),
        ((None, None, None, 100), "the call has more arguments than Wan's attention takes"),  # Helios
    ],
)
def test_a_call_of_a_model_much_like_wan_runs_dense_with_its_arguments(transformer, arguments, reason):
    called, attention = [], transformer.blocks[0].attn1
    attention.set_processor(lambda attn, x, *rest: called.append(rest) or x)
    handle = apply_sla2(transformer, sparsity=0.5)
    attention.processor(attention, torch.randn(1, 130, HEADS * HEAD_DIM), *arguments)
    assert called[0][: len(arguments)] == arguments and reason in handle.summary()


def test_gradients_reach_the_projections(transformer, inputs):
    apply_sla2(transformer, sparsity=0.5, precision="16bit")
    transformer(**inputs)[0].square().mean().backward()
    for block in transformer.blocks:
        for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            assert linear.weight.grad.abs().sum() > 0 and torch.isfinite(linear.weight.grad).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_heads": 3}, "number of heads"),
        ({"model_family": "ltx"}, "model family"),
    ],
)
def test_a_router_of_another_model_is_refused(transformer, changes, sentence):
    layer = RouterLayer(torch.eye(HEAD_DIM), None, None)
    facts = {"model_family": "wan", "num_heads": HEADS, "head_dim": HEAD_DIM} | changes
    with pytest.raises(ValueError, match=sentence):
        apply_sla2(transformer, RouterWeights((layer,) * LAYERS, **facts))
    assert not any(isinstance(block.attn1.processor, SLA2WanProcessor) for block in transformer.blocks)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sparsity": 1.0}, "sparsity must be"),
        ({"sparsity": None}, "sparsity must be at least 0 and below 1, got None"),
        ({"sparsity": "0.9"}, "sparsity must be at least 0 and below 1, got '0.9'"),
        ({"minimum_tokens": "many"}, "minimum_tokens must be an integer, got 'many'"),
        ({"dense_layers": "0, 1"}, "dense_layers must be a list of layer numbers, got '0, 1'"),
        ({"dense_layers": [0.5]}, "dense_layers must be an integer, got 0.5"),
        ({"precision": "4bit"}, "precision must be"),
        ({"backend": "cuda"}, "backend must be"),
        ({"exchange": "4bit"}, "exchange must be"),
        ({"dense_layers": [2]}, "names layer 2"),
    ],
)
def test_bad_settings_are_one_sentence(transformer, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        apply_sla2(transformer, **options)


def test_applying_twice_and_to_another_model_is_refused(transformer):
    apply_sla2(transformer)
    with pytest.raises(ValueError, match="applied to this transformer already"):
        apply_sla2(transformer)
    with pytest.raises(TypeError, match="WanTransformer3DModel"):
        apply_sla2(torch.nn.Linear(2, 2))


def test_a_path_in_a_routers_place_is_refused(transformer):
    with pytest.raises(TypeError, match=r"router must be what load_router\(\) returns, or None, got str"):
        apply_sla2(transformer, "router.safetensors")


class Quantised(torch.nn.Linear):
    """As diffusers' GGUFLinear: the weight is bytes, and is computed with in ``values``' dtype."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.values, self.bias = linear.weight.data, linear.bias
        self.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.values, self.bias)


def gguf(model):
    for block in model.blocks:
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn1, name, Quantised(getattr(block.attn1, name)))


def layerwise_fp8(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The Triton path's answers as on a card that has it, and the operator in PyTorch for what takes that path."""
    monkeypatch.setattr(support, "_card_reason", lambda device: None)
    monkeypatch.setattr(support, "why_no_triton", lambda: None)
    monkeypatch.setattr(support, "_blackwell_reason", lambda device: None)

    for operator in (sla2_attention, fitted_attention):

        def in_torch(*tensors, operator=operator, **options):
            return operator(*tensors, **options | {"backend": "torch"})

        monkeypatch.setattr(f"sla2_diffusers.{operator.__name__}", in_torch)


@pytest.mark.parametrize("quantise", [layerwise_fp8, gguf])
def test_quantised_layers_are_judged_by_what_they_compute_in(transformer, inputs, as_on_a_gpu, quantise):
    transformer.to(torch.bfloat16)
    quantise(transformer)
    assert transformer.blocks[0].attn1.to_q.weight.dtype in (torch.float8_e4m3fn, torch.uint8)
    inputs = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    handle = apply_sla2(transformer, sparsity=0.75, precision="16bit", backend="triton")
    run(transformer, inputs)
    assert (handle.sparse_calls, handle.dense_reasons()) == (LAYERS, {})


def test_a_dtype_without_kernels_runs_dense_and_is_named(transformer, inputs, as_on_a_gpu):
    transformer.double()
    inputs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    dense = run(transformer, inputs)
    handle = apply_sla2(transformer, sparsity=0.75, precision="16bit", backend="triton")
    assert torch.equal(run(transformer, inputs), dense)
    assert handle.dense_reasons() == {
        "the Triton kernels take float16, bfloat16 and float32, not float64": LAYERS,
    }


def test_kernels_that_cannot_be_loaded_run_dense_from_then_on(transformer, inputs, monkeypatch, caplog):
    tried = []

    def fail(*_, **__):
        tried.append(1)
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

    dense = run(transformer, inputs)
    monkeypatch.setattr("sla2_diffusers.fitted_attention", fail)
    handle = apply_sla2(transformer, sparsity=0.75)
    assert torch.equal(run(transformer, inputs), dense) and torch.equal(run(transformer, inputs), dense)
    ((reason, count),) = handle.dense_reasons().items()
    assert count == 2 * LAYERS and len(tried) == len(caplog.records) == 1
    assert "device kernel image is invalid); update the NVIDIA driver" in reason and reason in handle.summary()


def test_another_error_is_raised_as_it_came(transformer, inputs, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr("sla2_diffusers.fitted_attention", fail)
    apply_sla2(transformer, sparsity=0.75)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(transformer, inputs)


@pytest.fixture
def backends(transformer, monkeypatch):
    """Function: the attention backends that processors name; "dense" are those from before apply_sla2.

    diffusers' choice for the whole process is put back afterwards.
    """
    from diffusers.models import attention_dispatch

    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    originals = [block.attn1.processor for block in transformer.blocks]

    def of(which="attn1"):
        if which == "dense":
            return {processor._attention_backend for processor in originals}
        return {getattr(block, which).processor._attention_backend for block in transformer.blocks}

    return of


@pytest.mark.parametrize("undo_first", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_an_attention_backend_is_for_the_dense_calls_and_can_be_reset(
    transformer, inputs, backends, monkeypatch, order, undo_first
):
    if order == "before":
        transformer.set_attention_backend("_native_math")
    handle = apply_sla2(transformer, sparsity=0.75, dense_layers=[0])
    if order == "after":
        transformer.set_attention_backend("_native_math")
    assert backends("dense") == backends("attn2") == {"_native_math"}
    asked, processor_class = [], type(transformer.blocks[0].attn1.processor.dense)
    call = processor_class.__call__

    def spy(self, attn, *args, **kwargs):
        asked.append(self._attention_backend)
        return call(self, attn, *args, **kwargs)

    monkeypatch.setattr(processor_class, "__call__", spy)
    run(transformer, inputs)
    assert len(asked) > LAYERS and set(asked) == {"_native_math"}
    if undo_first:
        handle.undo()
        assert backends() == {"_native_math"}, "as without us"
    transformer.reset_attention_backend()
    handle.undo()
    assert backends() == backends("attn2") == {None}


def test_a_processor_that_takes_no_attention_backend_is_passed_over_as_without_us(transformer, backends):
    class Plain:
        def __call__(self, *args, **kwargs):
            raise NotImplementedError

    transformer.blocks[0].attn1.set_processor(Plain())
    handle = apply_sla2(transformer)
    transformer.set_attention_backend("_native_math")
    handle.undo()
    assert not hasattr(transformer.blocks[0].attn1.processor, "_attention_backend")
    assert transformer.blocks[1].attn1.processor._attention_backend == "_native_math"


@pytest.fixture
def vace():
    torch.manual_seed(0)
    return WanVACETransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=LAYERS,
        vace_layers=[0],
        vace_in_channels=16,
    ).eval()


@pytest.fixture
def vace_inputs(inputs):
    return inputs | {"control_hidden_states": torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))}


def test_vace_blocks_are_accelerated_and_counted(vace, vace_inputs):
    dense = run(vace, vace_inputs)
    handle = apply_sla2(vace, sparsity=0.0, precision="16bit")
    assert relative_error(run(vace, vace_inputs), dense) < 1e-5
    assert (handle.sparse_calls, handle.dense_calls, len(handle.layers)) == (LAYERS + 1, 0, LAYERS + 1)
    handle.undo()
    assert torch.equal(run(vace, vace_inputs), dense)


def test_the_last_layer_of_a_vace_model_is_its_last_vace_block(vace, vace_inputs):
    handle = apply_sla2(vace, sparsity=0.5, dense_layers=[-1])
    run(vace, vace_inputs)
    assert [layer.sparse for layer in handle.layers] == [1] * LAYERS + [0]


def test_a_router_of_all_vace_layers_or_of_the_blocks_alone(vace, vace_inputs, monkeypatch):
    seen = []

    for operator in (sla2_attention, fitted_attention):

        def spy(q, k, v, proj_q, proj_k, *alpha, keep_diagonal, operator=operator, **options):
            seen.append((proj_q is not None, bool(alpha), keep_diagonal))
            return operator(q, k, v, proj_q, proj_k, *alpha, keep_diagonal=keep_diagonal, **options)

        monkeypatch.setattr(f"sla2_diffusers.{operator.__name__}", spy)
    blocks = router(keep_diagonal=False)
    whole = RouterWeights(
        (blocks.layers[0],) * (LAYERS + 1),
        model_family="wan-vace",
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        sparsities=(0.75,),
        keep_diagonal=False,
    )
    trained, untrained = (True, True, False), (False, False, True)
    for weights, expected in ((whole, [trained] * (LAYERS + 1)), (blocks, [untrained] + [trained] * LAYERS)):
        seen.clear()
        handle = apply_sla2(vace, weights, sparsity=0.75, precision="16bit")
        run(vace, vace_inputs)
        handle.undo()
        assert seen == expected, "vace_blocks run first"
    with pytest.raises(ValueError, match="number of layers"):
        apply_sla2(vace, dataclasses.replace(blocks, model_family="wan-vace"))


def untrained(kind):
    return {"no router": None, "a router without ratios": identity_router("wan", LAYERS, HEADS, HEAD_DIM)}[kind]


@pytest.mark.parametrize("kind", ["no router", "a router without ratios"])
def test_without_a_trained_ratio_every_call_fits_one_and_says_its_error(transformer, inputs, monkeypatch, kind):
    exact = []

    def spy(q, k, v, *args, **options):
        found = fitted_attention(q, k, v, *args, **options)
        heads_first = [t.transpose(1, 2).double() for t in (q, k, v)]
        dense = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        exact.append(((found.out - dense).norm() / dense.norm()).item())
        return found

    monkeypatch.setattr("sla2_diffusers.fitted_attention", spy)
    handle = apply_sla2(transformer, untrained(kind), sparsity=0.75, precision="16bit")
    first = run(transformer, inputs)
    found = handle.attention_error
    assert torch.equal(run(transformer, inputs), first) and handle.attention_error == pytest.approx(found)
    errors = [layer.attention_error for layer in handle.layers]
    assert len(exact) == 2 * LAYERS and errors == pytest.approx(exact[:LAYERS], rel=0.5)
    assert found == pytest.approx((sum(error**2 for error in errors) / LAYERS) ** 0.5)
    words = f"attention error {found:.2f} (layers {min(errors):.2f} to {max(errors):.2f})"
    assert words in handle.summary().splitlines()
    handle.reset()
    assert handle.attention_error is None and "error" not in handle.summary()


@pytest.mark.parametrize("how", ["autograd", "trained ratio"])
def test_what_is_not_fitted(transformer, inputs, monkeypatch, how):
    monkeypatch.setattr("sla2_diffusers.fitted_attention", lambda *args, **options: pytest.fail("fitted"))
    handle = apply_sla2(transformer, router() if how == "trained ratio" else None, sparsity=0.75, precision="16bit")
    with torch.set_grad_enabled(how == "autograd"):
        transformer(**inputs)
    assert handle.sparse_calls == LAYERS and handle.attention_error is None


def test_a_run_in_inference_mode_is_followed_by_one_outside_and_by_training(transformer, inputs):
    with torch.inference_mode():
        handle = apply_sla2(transformer, sparsity=0.75, precision="16bit")
        transformer(**inputs)
    run(transformer, inputs)
    assert handle.sparse_calls == 2 * LAYERS and handle.attention_error < 1
    handle.undo()
    with torch.inference_mode():
        apply_sla2(transformer, router(), sparsity=0.75, precision="16bit")
        transformer(**inputs)
    transformer(**inputs)[0].mean().backward()
    assert transformer.blocks[0].attn1.to_q.weight.grad.isfinite().all()


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_code_is_compiled_once_for_all_calls_and_layers(inputs, whole):
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 64,
    }
    model = WanTransformer3DModel(num_layers=4, **sizes).eval()
    handle = apply_sla2(model, sparsity=0.75, precision="16bit", dense_layers=[0])
    torch._dynamo.reset()
    counter = CompileCounter()
    for module in [model] if whole else model.blocks:
        module.compile(backend=counter, fullgraph=True)
    run(model, inputs)
    run(model, inputs)
    # the first call has no weights on its device yet
    first = counter.frame_count
    for _ in range(3):
        run(model, inputs)
    assert counter.frame_count == first <= (2 if whole else 3)
    assert handle.summary().splitlines()[1:] == [
        "  3 layers in compiled code, where calls are not counted, sparse",
        "  1 layers in compiled code, where calls are not counted, dense: dense_layers keeps this layer dense",
    ]
