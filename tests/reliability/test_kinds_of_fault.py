"""Kinds of fault that bit other packs, each sought in the whole of what is shipped."""

import ast
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    path for folder in ("nodes", "sla2_kernels", "sla2_training") for path in (ROOT / folder).rglob("*.py")
) + [ROOT / "__init__.py", ROOT / "sla2_diffusers.py"]
HEADS = 2


def nodes_of(kind):
    return [
        (path.name, node)
        for path in SHIPPED
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kind)
    ]


def names_in(tree):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }


def test_no_handler_swallows_an_interrupt():
    """ComfyUI's interrupt is an exception: whoever catches everything has to raise it again."""
    handlers, wide = nodes_of(ast.ExceptHandler), {"Exception", "BaseException", "InterruptProcessingException"}
    assert len(handlers) > 20
    for where, handler in handlers:
        if handler.type is None or names_in(handler.type) & wide:
            raises = any(isinstance(node, ast.Raise) for node in ast.walk(handler))
            assert raises, f"{where}:{handler.lineno} catches everything and raises nothing"


def test_no_work_is_split_by_free_memory():
    """Free memory is another one in the forward pass than in its recomputation: what differs there are the gradients."""
    asked = {"mem_get_info", "get_free_memory", "virtual_memory", "memory_allocated", "memory_reserved", "memory_stats"}
    found = [(where, node.lineno) for where, node in nodes_of(ast.Attribute) if node.attr in asked]
    assert found == []


def test_nothing_is_evaluated_fetched_or_unpickled():
    names = {node.func.id for _, node in nodes_of(ast.Call) if isinstance(node.func, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__"}
    imported = {alias.name.split(".")[0] for _, node in nodes_of(ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for _, node in nodes_of(ast.ImportFrom) if not node.level}
    assert not imported & {
        "pickle",
        "urllib",
        "requests",
        "http",
        "socket",
        "ftplib",
        "huggingface_hub",
        "dill",
        "shelve",
    }
    loads = [
        (where, call)
        for where, call in nodes_of(ast.Call)
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "load"
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
    ]
    for where, call in loads:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        assert getattr(given.get("weights_only"), "value", None) is True, f"{where}:{call.lineno}"


def test_no_text_becomes_html_in_the_page():
    sinks = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(", "new Function")
    scripts = list((ROOT / "web" / "js").glob("*.js"))
    assert scripts
    for path in scripts:
        assert not [sink for sink in sinks if sink in path.read_text(encoding="utf-8")], path.name


def test_the_pack_adds_no_route_to_the_server():
    """What a page may ask is ComfyUI's own: no route of ours has to check a path."""
    used = {node.attr for _, node in nodes_of(ast.Attribute)}
    assert "routes" not in used and "add_routes" not in used and "app" not in used


EVIL = "<img src=x onerror=alert(1)>"


def strict(data):
    return json.loads(json.dumps(data, allow_nan=False))


def test_everything_a_page_is_sent_after_a_run_of_nan_is_json_and_no_markup(bench, qkv, pack_module, tmp_path):
    b = bench(grid=(3, 10, 10))
    b.hook.begin_run()
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    for name, value in (("q", float("nan")), ("v", float("inf"))):
        spoilt = [t.clone() for t in qkv]
        spoilt["qkv".index(name)][0, 5] = value
        b.attend(*spoilt, heads=HEADS)
        b.attend(*spoilt, heads=HEADS, layer=1)
    b.run.note(EVIL)
    b.run.count_dense(2, EVIL)
    b.hook.end_run(output=torch.full((1, 16, 3, 8, 8), float("nan")))
    run = b.hook.runs.finished()[-1]
    outcome = pack_module("nodes.runs.outcome").outcome(b.hook, run)
    assert "<" not in json.dumps(strict(outcome))
    assert strict(pack_module("nodes.runs.report_text").report_data(b.hook, run))["layers"]
    comparison = pack_module("nodes.comparison.runs")
    measured = [comparison.Measured(torch.full((2,), value), 1.0, 0.0, 1, 1, None) for value in (float("nan"), 0.0)]
    for pair in (measured, measured[::-1]):
        assert strict(comparison.comparison_data(*pair, "card", "skips 90%, keeps 10%", (None, 4096)))["rows"]
    assert strict(pack_module("nodes.training.loss_curves").loss_curves({0: [0.5], 1: []}))["mean"] == [0.5]


def test_nothing_is_shown_before_a_run_has_ended(bench, qkv, pack_module):
    """A node that executes before the sampler has no numbers yet, and says so."""
    report, shown = pack_module("nodes.runs.report_text"), []
    b = bench()
    b.hook.on_run_end = lambda hook, run: shown.append(run)
    assert b.hook.runs.finished() == []
    data = strict(report.report_data(b.hook, None))
    assert data["run"] is None and "layers" not in data
    assert "Nothing was sampled through this MODEL in this run" in report.report_text(b.hook, None)
    b.hook.begin_run()
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    assert b.hook.runs.finished() == [] and shown == []
    b.hook.end_run()
    assert len(b.hook.runs.finished()) == len(shown) == 1


@pytest.mark.parametrize("node_id", ["2", "12:7", "12:7:5", 3])
def test_an_event_names_the_node_as_the_page_knows_it(pack_module, monkeypatch, node_id):
    """In a subgraph a node's id is a path such as 12:7."""
    events, sent = pack_module("nodes.page.events"), []
    server = type("Server", (), {"client_id": "c", "send_sync": lambda self, *message: sent.append(message)})()
    monkeypatch.setattr(events, "server_of_page", lambda: server)
    events.send_event("outcome", node_id, {"headline": "x"})
    assert sent == [("sla2.outcome", {"node": str(node_id), "workflow": None, "headline": "x"}, "c")]


def test_a_patched_model_forgets_what_an_earlier_size_needed(bench, pack_module):
    """Sizes up, down and back again on one hook: each call is that of a fresh hook, bit by bit."""
    used = bench(grid=(3, 10, 10), ratio_mode="fixed")
    for tokens, grid in (
        (300, (3, 10, 10)),
        (70, (1, 7, 10)),
        (640, (4, 16, 10)),
        (70, (1, 7, 10)),
        (300, (3, 10, 10)),
    ):
        generator = torch.Generator().manual_seed(tokens)
        tensors = [torch.randn(1, tokens, HEADS * 64, generator=generator) for _ in range(3)]
        used.hook.facts.layout.grid = lambda inputs, patch, grid=grid: grid
        used.model_call()
        fresh = bench(grid=grid, ratio_mode="fixed")
        fresh.model_call()
        assert torch.equal(used.attend(*tensors, heads=HEADS), fresh.attend(*tensors, heads=HEADS))


def test_neighbouring_rows_take_equally_many_key_blocks(bench):
    """Forced blocks come on top of the routed ones: however ragged, no row has a count of its own."""
    from sla2_kernels.forced_blocks import select_with_forced_blocks, selected_with_forced

    generator = torch.Generator().manual_seed(0)
    for front, back, tokens in ((0, 1, 129), (1, 0, 700), (65, 130, 901), (200, 64, 333)):
        q = torch.randn(1, 2, tokens - front - back, 32, generator=generator)
        k = torch.randn(1, 2, tokens, 32, generator=generator)
        found = select_with_forced_blocks(q, k, sparsity=0.7, front=front, back=back)
        assert found.shape[-1] == selected_with_forced(tokens, 0.7, front, back)
        assert (found.diff(dim=-1) > 0).all() and found.min() >= 0 and found.max() < (tokens + 63) // 64


def test_a_patched_model_that_is_dropped_is_gone_at_once(bench, qkv, pack_module):
    """Models are large: nothing of ours may wait for Python's search for cycles."""
    b = bench()
    pack_module("nodes.runs.outcome").show_outcomes(b.hook, "1")
    b.hook.begin_run()
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    b.hook.end_run()
    gone = weakref.ref(b.hook)
    gc.collect()
    gc.disable()
    try:
        del b
        assert gone() is None
    finally:
        gc.enable()
