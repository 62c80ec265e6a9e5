"""The override: what it computes, what it passes on untouched, and what it counts."""

import functools
import threading

import pytest
import torch

HEADS, DIM = 2, 64


def heads_first(tensors):
    return [t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in tensors]


def test_a_marked_call_runs_sparse_in_both_of_comfyuis_layouts(bench, qkv):
    b = bench(ratio_mode="estimated")
    b.model_call()
    flat = b.attend(*qkv, heads=HEADS)
    other = b.attend(*heads_first(qkv), HEADS, skip_reshape=True)
    unflattened = b.attend(*heads_first(qkv), HEADS, skip_reshape=True, skip_output_reshape=True)
    assert flat.shape == (1, 300, HEADS * DIM) and unflattened.shape == (1, HEADS, 300, DIM)
    torch.testing.assert_close(flat, other)
    torch.testing.assert_close(flat, unflattened.transpose(1, 2).flatten(2))
    assert b.run.layers[0].sparse == 3 and not b.run.layers[0].dense
    # floor(0.5 * 5) = 2 of 5 key blocks kept, 64 tokens each
    assert b.run.layers[0].sparsity == pytest.approx(1 - 128 / 300)


def test_the_skipped_share_is_of_tokens_and_not_of_blocks(bench):
    b = bench(grid=(1, 27, 19), sparsity=0.97)
    b.hook.begin_run()
    b.model_call()
    b.attend(*[torch.randn(1, 513, HEADS * DIM) for _ in range(3)], heads=HEADS)
    b.hook.end_run()
    (run,) = b.hook.runs.finished()
    # one of 9 key blocks is kept, and the ninth holds a single token
    assert run.layers[0].sparsity == pytest.approx(1 - 64 / 513)
    text = b.report_text(run)
    assert "skipped 87.5%" in text and "1 of 1 self-attention calls ran sparse (skips 87.5%, keeps 12.5%)" in text


def test_sparsity_0_equals_dense(bench, qkv):
    b = bench(sparsity=0.0)
    b.model_call()
    torch.testing.assert_close(b.attend(*qkv, heads=HEADS), b.attention(*qkv, heads=HEADS), rtol=1e-4, atol=1e-5)


def test_the_callers_softmax_scale_is_honoured(bench, qkv):
    b = bench(sparsity=0.0)
    b.model_call()
    expected = b.attention(*qkv, heads=HEADS, scale=0.3)
    torch.testing.assert_close(b.attend(*qkv, heads=HEADS, scale=0.3), expected, rtol=1e-4, atol=1e-5)
    assert b.run.layers[0].sparse == 1


def test_an_unmarked_call_is_passed_through_even_with_as_many_keys_as_tokens(bench, qkv):
    b = bench()
    b.model_call()
    assert torch.equal(b.attend(*qkv, heads=HEADS, layer=None), b.attention(*qkv, heads=HEADS))
    assert b.run.other_calls == 1 and not b.run.layers


MASK = torch.zeros(300, 300)
UNSUPPORTED = {
    "mask": ({"mask": MASK}, "the call has an attention mask"),
    "gqa": ({"enable_gqa": True}, "the call uses grouped-query attention"),
    "full precision": ({"low_precision_attention": False}, "the model asks for full-precision attention in this call"),
    "attn_precision": ({"attn_precision": torch.float16}, "the model asks for float16 attention in this call"),
    "unknown keyword": ({"windows": 3}, "the call has the unknown keyword windows"),
    "negative scale": ({"scale": -1.0}, "the call has a softmax scale that is not a finite number above 0"),
}


@pytest.mark.parametrize(("keywords", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_we_do_not_implement_goes_down_the_chain_untouched(bench, qkv, keywords, reason):
    b = bench()
    seen = []

    def previous(func, *args, **kwargs):
        seen.append((func, args, kwargs))
        return args[0]

    b.override = b.override_over(previous)
    b.model_call()
    assert b.attend(*qkv, HEADS, **keywords) is qkv[0]
    (func, args, kwargs), *more = seen
    assert not more and func is b.attention.__wrapped__
    assert all(ours is theirs for ours, theirs in zip(args, (*qkv, HEADS), strict=True))
    assert {name: kwargs[name] for name in keywords} == keywords and kwargs["_inside_attn_wrapper"]
    assert b.run.layers[0].dense == {reason: 1}


def shapes(q=None, k=None, v=None, **kwargs):
    def change(qkv):
        return [new(t) if new else t for new, t in zip((q, k, v), qkv, strict=True)], kwargs

    return change


CALLS = {
    "unlike dtypes": (shapes(v=lambda t: t.half()), "q, k and v have unlike dtypes"),
    "unlike devices": (shapes(k=lambda t: t.to("meta")), "q, k and v lie on unlike devices"),
    "float64": (shapes(*[lambda t: t.double()] * 3), "q, k and v are float64"),
    "cross": (
        shapes(k=lambda t: t[:, :200], v=lambda t: t[:, :200]),
        "the call has 300 query tokens and 200 key tokens",
    ),
    "values": (shapes(v=lambda t: t[:, :200]), "q, k and v have unlike shapes"),
    "heads": (shapes(*[lambda t: t[..., :127]] * 3), "q of shape (1, 300, 127) does not have 2 heads"),
    "dimensions": (shapes(skip_reshape=True), "q has the unexpected shape (1, 300, 128)"),
    "empty": (shapes(*[lambda t: t[:, :0]] * 3), "q has the unexpected shape (1, 0, 128)"),
    "no tensor": (shapes(q=lambda t: object()), "q is a object, not a tensor"),
}


@pytest.mark.parametrize("heads", [1, 4])
def test_another_attention_inside_a_marked_one_runs_dense(bench, qkv, pack_module, heads):
    """Its heads are not those that the router was made for."""
    weights = pack_module("sla2_kernels.weights")
    layer = weights.RouterLayer(proj_q=torch.eye(DIM), proj_k=torch.eye(DIM))
    for router in (None, weights.RouterWeights((layer,) * 4, "wan", HEADS, DIM)):
        b = bench(router=router)
        b.model_call()
        assert torch.equal(b.attend(*qkv, heads=heads), b.attention(*qkv, heads=heads))
        reason = (
            f"the call has {heads} heads of {HEADS * DIM // heads}, and this model's self-attention {HEADS} of {DIM}"
        )
        assert b.run.layers[0].dense == {reason: 1}


@pytest.mark.parametrize(("change", "reason"), CALLS.values(), ids=CALLS)
def test_calls_of_unlike_or_unexpected_tensors_have_a_reason(bench, qkv, change, reason):
    b = bench()
    b.override = b.override_over(lambda func, *args, **kwargs: "from below")
    b.model_call()
    tensors, keywords = change(qkv)
    assert b.attend(*tensors, heads=HEADS, **keywords) == "from below"
    (found,) = b.run.layers[0].dense
    assert found.startswith(reason)


def test_the_operators_own_reason_is_the_one_that_is_counted(bench, qkv, pack_module, monkeypatch):
    sentence = "the Triton kernels need compute capability 8.0 (RTX 30, A100) or newer, and this card has 7.5"
    monkeypatch.setattr(pack_module("nodes.attention.call"), "unsupported_reason", lambda *args: sentence)
    b = bench()
    b.model_call()
    assert torch.equal(b.attend(*qkv, heads=HEADS), b.attention(*qkv, heads=HEADS))
    assert b.run.layers[0].dense == {sentence: 1}


def test_stop_raises_one_sentence_but_not_for_what_a_setting_keeps_dense(bench, qkv):
    b = bench(stop_on_unsupported=True, dense_layers=frozenset({1}))
    b.model_call()
    b.attend(*qkv, HEADS, mask=MASK, layer=1)
    with pytest.raises(RuntimeError, match="SLA2 stopped in layer 2: the call has an attention mask"):
        b.attend(*qkv, HEADS, mask=MASK, layer=2)


def test_a_reason_is_logged_once_per_run_and_counted_every_time(bench, qkv, caplog):
    b = bench()
    b.hook.begin_run()
    b.model_call()
    for layer in (0, 0, 1):
        b.attend(*qkv, HEADS, mask=MASK, layer=layer)
    said = [record for record in caplog.records if "attention mask" in record.getMessage()]
    assert len(said) == 1
    assert sum(record.dense.total() for record in b.run.layers.values()) == 3


@pytest.mark.parametrize(("sigma", "sparse"), [(1.0, False), (0.8, True), (0.5, True), (0.2, True), (0.1, False)])
def test_the_window_is_in_sigmas_of_the_model(bench, qkv, sigma, sparse):
    b = bench(start_percent=0.2, end_percent=0.8)
    b.model_call(sigma)
    b.attend(*qkv, heads=HEADS)
    assert b.run.layers[0].sparse == sparse
    assert bool(b.run.layers[0].dense) != sparse


def test_the_window_reads_the_device_once_per_step(bench, monkeypatch):
    b = bench(start_percent=0.2)
    b.hook.begin_run()
    sigmas, reads = torch.tensor([0.5]), []
    monkeypatch.setattr(torch.Tensor, "max", lambda tensor: reads.append(1) or torch.tensor(0.5))
    assert all(b.run.in_window(sigmas) for _ in range(40))
    assert len(reads) == 1


def test_a_whole_window_never_reads_the_device(bench):
    b = bench()
    assert b.run.in_window(object()) is True


def test_minimum_tokens(bench, qkv, pack_module):
    b = bench(minimum_tokens=301)
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    assert b.run.layers[0].dense == {"the sequence has 300 tokens, minimum_tokens is 301": 1}
    automatic = bench(minimum_tokens=-1)
    automatic.model_call()
    automatic.attend(*qkv, heads=HEADS)
    assert automatic.run.layers[0].dense == {"the sequence has 300 tokens, minimum_tokens is 8192": 1}


def test_every_run_starts_from_zero(bench, qkv):
    b = bench()
    for calls in (1, 3):
        b.hook.begin_run()
        b.model_call()
        for _ in range(calls):
            b.attend(*qkv, heads=HEADS)
        b.hook.end_run()
    assert [run.layers[0].sparse for run in b.hook.runs.finished()] == [1, 3]
    assert [run.number for run in b.hook.runs.finished()] == [1, 2]


def test_a_sampler_inside_a_sampler_is_one_run(bench):
    b = bench()
    b.hook.begin_run()
    b.hook.begin_run()
    b.hook.end_run()
    assert b.hook.runs.finished() == []
    b.hook.end_run()
    assert len(b.hook.runs.finished()) == 1


def test_a_run_that_fails_keeps_its_counts_and_reads_no_device(bench, qkv):
    b = bench()
    b.hook.begin_run()
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    b.hook.end_run("stopped before its end")
    (run,) = b.hook.runs.finished()
    assert run.failure and run.layers[0].sparse == 1 and run.layers[0].ratio_range is None


def test_threads_count_every_call(bench, qkv):
    b = bench()
    b.hook.begin_run()
    b.model_call()
    threads = [
        threading.Thread(target=lambda: [b.attend(*qkv, heads=HEADS, layer=i % 4) for i in range(8)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b.run.layers[layer].sparse for layer in range(4)] == [8] * 4


def test_an_override_is_fronted_only_where_it_does_not_lead_to_us(bench, qkv):
    b = bench()

    def foreign(func, *args, **kwargs):
        return func(*args, **kwargs)

    def chained(func, *args, **kwargs):
        return functools.partial(b.override, func)(*args, **kwargs)

    b.model_call(override=chained)
    assert b.options["optimized_attention_override"] is chained and not b.run.notes
    b.model_call(override=foreign)
    assert b.options["optimized_attention_override"] is not foreign
    b.attend(*qkv, heads=HEADS)
    assert b.run.layers[0].sparse == 1 and len(b.run.notes) == 1


def test_an_override_that_leads_back_to_us_unseen_does_not_recurse_or_count_twice(bench, qkv):
    b = bench()
    hidden = {}

    class Registry:
        __slots__ = ()  # nothing to look into

        def __call__(self, func, *args, **kwargs):
            return hidden["ours"](func, *args, **kwargs)

    hidden["ours"] = b.override
    b.model_call(override=Registry())
    assert torch.equal(b.attend(*qkv, HEADS, mask=MASK), b.attention(*qkv, HEADS, mask=MASK))
    assert b.run.layers[0].dense.total() == 1


def test_an_exception_below_is_not_swallowed_and_leaves_nothing_behind(bench, qkv):
    b = bench()

    def failing(func, *args, **kwargs):
        raise KeyError("theirs")

    b.override = b.override_over(failing)
    b.model_call()
    with pytest.raises(KeyError, match="theirs"):
        b.attend(*qkv, HEADS, mask=MASK)
    assert not b.hook.handed_on.is_running


def test_training_reaches_q_k_and_v_in_a_run_made_under_inference_mode(bench, qkv):
    with torch.inference_mode():
        b = bench(ratio_mode="fixed", fixed_ratio=0.7)
        b.model_call()
        b.attend(*qkv, heads=HEADS)
    leaves = [t.clone().requires_grad_() for t in qkv]
    b.attend(*leaves, heads=HEADS).square().sum().backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)


@pytest.mark.parametrize(("trained_with", "query_block"), [(None, 64), (True, 128), (False, 128), (True, 64)])
def test_a_router_selects_as_it_was_trained_and_none_keeps_own_blocks_and_goes_by_the_card(
    bench, qkv, pack_module, monkeypatch, trained_with, query_block
):
    kernels, weights = pack_module("sla2_kernels"), pack_module("sla2_kernels.weights")
    layers = (weights.RouterLayer(),) * 4
    router = None
    if trained_with is not None:
        router = weights.RouterWeights(layers, "wan", HEADS, DIM, keep_diagonal=trained_with, q_block=query_block)
    placed = pack_module("nodes.attention.layer_weights")
    monkeypatch.setattr(placed, "default_query_block", lambda q, precision: 64)
    b = bench(router=router, ratio_mode="estimated")
    b.model_call()
    found = b.attend(*qkv, heads=HEADS)
    expected, other = (
        kernels.sla2_attention(*heads_first(qkv), sparsity=0.5, precision="16bit", keep_diagonal=kept, query_block=size)
        for kept, size in ((trained_with is not False, query_block), (trained_with is False, 192 - query_block))
    )
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2))
    assert not torch.allclose(expected, other, rtol=1e-3)


def test_an_unsupported_family_keeps_the_attention_that_its_checkpoint_brings(bench):
    """Any override in the options would drop it."""
    b = bench()
    b.hook.family_reason = "model family Unknown is not supported yet"
    model = torch.nn.Linear(1, 1)
    for function in (None, len):
        model.comfy_attention = torch.nn.Module()
        model.comfy_attention.function = function
        b.hook.begin_run()
        options = {"optimized_attention_override": b.override}
        b.hook.model_call(model, dict, options)
        assert ("optimized_attention_override" in options) == (function is None)
        b.hook.end_run()
    assert list(b.hook.runs.finished()[-1].notes)[-1].endswith(b.hook.family_reason)
