"""Calls that SLA2 hands on to a sageattention that is wrong for their number of keys: counted, and warned of."""

import pytest
import torch

HEADS, DIM = 2, 64


class OnCuda(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


def tensors(keys, queries=300, dim=DIM):
    return [torch.zeros(1, tokens, HEADS * dim).as_subclass(OnCuda) for tokens in (queries, keys, keys)]


def attention_sage(q, k, v, heads, **kwargs):
    return q


def attention3_sage(q, k, v, heads, **kwargs):
    return q


@pytest.fixture
def inexact(pack_module, monkeypatch):
    module = pack_module("nodes.runs.inexact_dense")
    monkeypatch.setattr(module, "installed_sageattention", lambda: "1.0.6")
    return module


@pytest.fixture
def run_with(bench, pack_module):
    """Function: (advice on a run whose attention is ``function``, the RunRecord); its calls: (arguments, layer or None)."""

    def run_with(function, *calls, base=None, **settings):
        b = bench(minimum_tokens=10**6, **settings)
        b.override = b.override_over(base)
        b.hook.begin_run()
        b.model_call()
        for qkv, layer in calls:
            options = b.options if layer is None else b.options | {b.hook_module.LAYER: layer}
            b.override(function, *qkv, HEADS, transformer_options=options)
        b.hook.end_run()
        (run,) = b.hook.runs.finished()
        return pack_module("nodes.runs.advice").advice(b.hook, run), run

    return run_with


CALLS = (tensors(77), None), (tensors(257), None), (tensors(257), None), (tensors(512), None), (tensors(300), 0)


def test_ragged_calls_to_the_wrong_version_are_counted_and_warned_of(inexact, run_with):
    advice, run = run_with(attention_sage, *CALLS)
    assert run.ragged_sage_calls == {77: 1, 257: 2, 300: 1}
    assert advice[0] == (
        "4 calls over 77 to 300 keys went to SageAttention, and sageattention 1.0.6 is wrong where the keys are no "
        "multiple of 64, the fewer the worse (21% off at 257): install version 2 or newer, or turn SageAttention off"
    )


@pytest.mark.parametrize("version", [None, "2.2.0", "2.2.0+cu129torch2.8.0"])
def test_other_versions_are_not_accused(inexact, run_with, monkeypatch, version):
    monkeypatch.setattr(inexact, "installed_sageattention", lambda: version)
    advice, _ = run_with(attention_sage, *CALLS)
    assert not any("SageAttention" in sentence for sentence in advice)


def test_only_calls_that_went_there_count(inexact, run_with):
    def elsewhere(func, *args, **kwargs):
        return func(*args, **kwargs)

    def attention_override_sage(func, *args, **kwargs):
        return args[0]

    for function, base, count in (
        (attention_sage, None, 1),
        (attention3_sage, None, 0),
        (attention_sage, elsewhere, 0),
        (attention3_sage, attention_override_sage, 1),
    ):
        _, run = run_with(function, (tensors(257), None), base=base)
        assert run.ragged_sage_calls.total() == count


def test_what_a_node_chose_in_comfyui_is_looked_up(inexact, run_with, pack_module):
    def set_model_optimized_attention(optimized_attention):
        def optimized_attention_override(_, *args, **kwargs):
            return optimized_attention(*args, **kwargs)

        module, _, name = pack_module("nodes.compat.override_chain").SET_BY_COMFY.partition(".ModelPatcher.")
        optimized_attention_override.__module__ = module
        optimized_attention_override.__qualname__ = f"ModelPatcher.{name}"
        return optimized_attention_override

    for chosen, count in ((attention_sage, 1), (attention3_sage, 0)):
        base = set_model_optimized_attention(chosen)
        _, run = run_with(attention3_sage, (tensors(257), None), base=base)
        assert run.ragged_sage_calls.total() == count


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, 77),
        ({"mask": torch.zeros(300, 77)}, None),
        ({"low_precision_attention": False}, None),
        ({"heads": 1}, 77),
        ({"heads": 4}, None),
        ({"k": torch.zeros(1, 77, 128)}, None),
        ({"k": torch.zeros(1, 2, 77, 64).as_subclass(OnCuda), "skip_reshape": True}, 77),
        ({"k": torch.zeros(1, 2, 128, 64).as_subclass(OnCuda), "skip_reshape": True}, None),
        ({"k": None}, None),
    ],
    ids=[
        "as it is",
        "masked",
        "full precision",
        "head_dim 128",
        "head_dim 32",
        "on a CPU",
        "heads first",
        "whole",
        "no k",
    ],
)
def test_what_comfyui_hands_to_sageattention(inexact, changes, keys):
    q, k, v = tensors(77)
    assert inexact.ragged_key_count((), {"q": q, "k": k, "v": v, "heads": HEADS} | changes) == keys
    if set(changes) <= {"mask", "heads"}:
        mask, heads = changes.get("mask"), changes.get("heads", HEADS)
        assert inexact.ragged_key_count((q, k, v, heads, mask), {}) == keys


def test_an_installed_version_is_read_or_none(pack_module):
    module = pack_module("nodes.runs.inexact_dense")
    version = module.installed_sageattention.__wrapped__()
    assert version is None or version[0].isdigit()
