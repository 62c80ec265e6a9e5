"""Stage 1 training: it lowers the hard-mask error on unseen inputs, resumes, survives trouble, and stays within memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.synthetic import SyntheticLayer
from sla2_kernels import sla2_attention
from sla2_kernels.router import own_key_blocks
from sla2_kernels.weights import RouterFileError, load_router
from sla2_training import RouterTrainer, TrainerOptions, TrainingError, layer_tensors, soft_top_k, step_sums
from sla2_training.report import AFTER, BEFORE

HEADS, DIM = 2, 32
HELD_OUT = range(4)


def make_trainer(layers=1, sparsities=(0.97, 0.95, 0.90), resume=None, **options):
    return RouterTrainer(
        "test", layers, HEADS, DIM, sparsities=sparsities, options=TrainerOptions(**options), resume=resume
    )


def small_qkv(seed=0, tokens=900, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(3)]


def assert_same_router(a, b, **tolerance):
    assert a.sparsities == b.sparsities
    for x, y in zip(a.layers, b.layers, strict=True):
        for kind in ("proj_q", "proj_k", "alpha_logits"):
            torch.testing.assert_close(getattr(x, kind), getattr(y, kind), **tolerance)


@pytest.mark.parametrize(("per_head", "keep_diagonal"), [(True, False), (False, False), (True, True)])
def test_training_beats_the_heuristic_router_on_unseen_inputs(per_head, keep_diagonal):
    synthetic = SyntheticLayer(0, grid=(8, 16, 32))  # 4,096 tokens: 64 key blocks, of which 1, 3 and 6 are kept
    trainer = make_trainer(per_head=per_head, keep_diagonal=keep_diagonal)
    for step in range(24):
        trainer.observe(0, *synthetic.sample(1000 + step))
    for seed in HELD_OUT:
        trainer.evaluate(0, *synthetic.sample(seed))
    report = trainer.report()
    for sparsity in (0.97, 0.95, 0.90):
        before = report.overall(BEFORE, sparsity)
        # these inputs are so local that next to own blocks little is left to choose; the one block kept at 0.97 is one
        assert report.overall(AFTER, sparsity) < (0.985 if keep_diagonal else 0.93) * before
        assert report.overall(("untrained", "learned"), sparsity) < before
        if not keep_diagonal:
            assert report.overall(("trained", "estimated"), sparsity) < before
    losses = trainer.losses[0]
    assert keep_diagonal or sum(losses[-5:]) < sum(losses[:5])
    assert "skips 97%" in report.text() and "trained router, learned ratio" in report.text()


@pytest.mark.parametrize("keep_diagonal", [True, False])
def test_step_gradient_is_that_of_the_loss_written_out(keep_diagonal):
    """One step on all query blocks against autograd through the paper's formulas with N x N tensors."""
    q, k, v = small_qkv(tokens=700)
    trainer = make_trainer(sparsities=(0.6,), query_blocks=6, keep_diagonal=keep_diagonal)
    trainer.observe(0, q, k, v)
    state = trainer.states[0]
    proj_q, proj_k, logits = (
        p.detach().clone().requires_grad_(True) for p in (state.proj_q, state.proj_k, state.alpha_logits)
    )
    gradients = []  # a step frees them
    state.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in (state.proj_q, state.proj_k))
    )
    trainer.observe(0, q, k, v)

    k_smooth = k - k.mean(dim=2, keepdim=True)
    q_pooled = torch.stack([part.mean(dim=2) for part in q.split(128, dim=2)], dim=2)
    k_pooled = torch.stack([part.mean(dim=2) for part in k_smooth.split(64, dim=2)], dim=2)
    scores = (q_pooled @ proj_q.transpose(1, 2)) @ (k_pooled @ proj_k.transpose(1, 2)).transpose(2, 3) * DIM**-0.5
    m = soft_top_k(scores, 4)
    if keep_diagonal:
        own = own_key_blocks(torch.arange(6), 11)
        rows = []
        for n in range(6):
            rest = soft_top_k(scores[:, :, n, ~own[n]], 4 - int(own[n].sum()))
            rows.append(torch.ones_like(scores[:, :, n]).masked_scatter(~own[n], rest))
        m = torch.stack(rows, dim=2)
    m = m.repeat_interleave(128, dim=2).repeat_interleave(64, dim=3)[:, :, :700, :700]
    s = torch.exp(q @ k_smooth.transpose(2, 3) * DIM**-0.5)
    target = s @ v / s.sum(dim=-1, keepdim=True)
    o_sparse = (m * s) @ v / (m * s).sum(dim=-1, keepdim=True)
    linear = (1 - m) * (q.softmax(dim=-1) @ k_smooth.softmax(dim=-1).transpose(2, 3))
    ratio = torch.sigmoid(logits.detach())[0, :, :1, None]
    out = ratio * o_sparse + (1 - ratio) * (linear @ v / linear.sum(dim=-1, keepdim=True))
    loss = (out - target).square().sum() / target.square().sum()
    loss.backward()
    assert trainer.losses[0][-1] == pytest.approx(loss.item(), rel=1e-4)
    for ours, autograd in zip(gradients, (proj_q.grad, proj_k.grad), strict=True):
        assert (ours - autograd).norm() < 1e-3 * autograd.norm()


def test_memory_bound_changes_no_result():
    q, k, v = small_qkv(batch=2)
    whole, piecewise = make_trainer(), make_trainer(memory_bytes=1)
    for trainer in (whole, piecewise):
        trainer.observe(0, q, k, v)
        trainer.observe(0, q, k, v)
    assert whole.losses[0] == pytest.approx(piecewise.losses[0], rel=1e-5)
    # Adam's first steps are the gradient's sign: entries with next to no gradient may differ
    assert_same_router(whole.router(), piecewise.router(), rtol=1e-3, atol=2e-3)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return out


def test_no_tensor_grows_with_tokens_squared():
    tokens = 8192
    q, k, v = small_qkv(tokens=tokens)
    trainer = make_trainer(query_blocks=2, memory_bytes=1)
    with LargestTensor() as seen:
        trainer.observe(0, q, k, v)
        trainer.evaluate(0, q, k, v)
    # the largest is one head's and query block's value sums, 128 x T_n x D, or Q itself
    assert seen.largest <= max(128 * tokens // 64 * DIM, 128 * tokens, q.numel())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_inference_tensors_in_any_dtype_and_layout(dtype):
    trainer = make_trainer()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = (x.to(dtype).transpose(1, 2).contiguous() for x in small_qkv(batch=2))
        loss = trainer.observe(0, q, k, v, layout="BNHD")
        trainer.observe(0, q, k, v, layout="BNHD")
        trainer.evaluate(0, q, k, v, layout="BNHD")
    assert 0 < loss < 2
    assert not trainer.router().layers[0].proj_q.is_inference()
    expected = make_trainer()
    assert expected.observe(0, *(x.transpose(1, 2) for x in (q, k, v))) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 64, 100, 129, 300])
def test_short_inputs(tokens):
    """With one key block, or as many as are kept, there is nothing to choose: dense, error 0."""
    trainer = make_trainer()
    trainer.observe(0, *small_qkv(tokens=tokens))
    errors = trainer.evaluate(0, *small_qkv(tokens=tokens))
    assert torch.isfinite(trainer.router().layers[0].proj_q).all()
    if tokens <= 64:
        assert trainer.router().layers[0].alpha_logits is None
        assert all(errors.relative(AFTER, s) < 1e-6 for s in trainer.sparsities)


def test_saved_and_resumed_training_goes_on_where_it_stopped(tmp_path):
    synthetic = SyntheticLayer(0)
    first = make_trainer(layers=2)
    for step in range(5):
        first.observe(0, *synthetic.sample(step))
    first.router().save(tmp_path / "r.safetensors")
    second = make_trainer(layers=2, resume=load_router(tmp_path / "r.safetensors"))
    # layer 1 was never seen: it is still the identity
    assert second.router().layers[1].proj_q is None
    assert_same_router(first_layer(first.router()), first_layer(second.router()), rtol=0, atol=0)
    held_out = synthetic.sample(100)
    first.generator.manual_seed(1), second.generator.manual_seed(1)
    assert second.evaluate(0, *held_out) == first.evaluate(0, *held_out)
    before = second.router().layers[0].proj_q
    second.observe(0, *held_out)
    assert not torch.equal(before, second.router().layers[0].proj_q)


def first_layer(router):
    return type(router)(router.layers[:1], router.model_family, HEADS, DIM, sparsities=router.sparsities)


def test_resuming_for_other_sparsities_and_knots():
    first = make_trainer(sparsities=(0.95, 0.85))
    first.observe(0, *small_qkv(tokens=2000))
    second = make_trainer(sparsities=(0.95, 0.90), resume=first.router(), knots=3)
    logits, old = second.router().layers[0].alpha_logits, first.router().layers[0].alpha_logits
    assert logits.shape == (2, HEADS, 3)
    torch.testing.assert_close(logits[0], old[0].expand(-1, 3))
    torch.testing.assert_close(logits[1], old.mean(dim=0).expand(-1, 3))


def test_resuming_another_models_router_is_refused():
    router = make_trainer(layers=2).router()
    with pytest.raises(RouterFileError, match="number of layers is 2, this model's is 3"):
        make_trainer(layers=3, resume=router)


def test_a_break_in_the_middle_of_a_step_keeps_what_was_trained(monkeypatch):
    trainer = make_trainer()
    trainer.observe(0, *small_qkv())
    before = trainer.router()

    def cancelled(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(step_sums, "sparse_sums", cancelled)
    with pytest.raises(KeyboardInterrupt):
        trainer.observe(0, *small_qkv(1))
    assert_same_router(before, trainer.router(), rtol=0, atol=0)


@pytest.mark.parametrize(("which", "value"), [("q", torch.nan), ("k", torch.inf), ("v", torch.nan)])
def test_nan_stops_and_names_the_layer(which, value):
    trainer = make_trainer(layers=4)
    tensors = dict(zip("qkv", small_qkv(), strict=True))
    tensors[which][0, 1, 5, 3] = value
    for call in (trainer.observe, trainer.evaluate):
        with pytest.raises(TrainingError, match=f"layer 3: its {which} holds NaN"):
            call(3, **tensors)
    assert trainer.router().layers[3].proj_q is None


def test_a_key_that_takes_all_attention_from_a_block_of_low_score_does_not_stop_it():
    """Rows have no softmax left, in float32, on the blocks that their masks select."""
    q, k, v = small_qkv()
    q[..., 0], k[:, :, :64, 0], k[:, :, 5, 0] = 30, -3, 30
    trainer = make_trainer()
    assert 0 < trainer.observe(0, q, k, v) < 2
    assert torch.isfinite(trainer.router().layers[0].proj_q).all()


def out_of_memory_above(limit, monkeypatch):
    real = step_sums.sparse_sums

    def limited(q, *rest):
        if q.shape[:2].numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(q, *rest)

    monkeypatch.setattr(step_sums, "sparse_sums", limited)


def test_out_of_memory_halves_the_subset_and_says_so(monkeypatch):
    out_of_memory_above(4, monkeypatch)
    trainer = make_trainer(query_blocks=8)
    loss = trainer.observe(0, *small_qkv(tokens=1500))
    assert loss > 0 and trainer.query_blocks == 2
    assert trainer.notes == [
        "Out of memory at layer 0: went on with 4 query blocks a step.",
        "Out of memory at layer 0: went on with 2 query blocks a step.",
    ]
    trainer.evaluate(0, *small_qkv(tokens=1500))
    assert trainer.notes[1] in trainer.report().text()


def failing_kernels(monkeypatch, error):
    def largest_scores(*arguments):
        raise error

    monkeypatch.setattr(layer_tensors, "why_no_kernels", lambda *tensors: None)
    monkeypatch.setattr(step_sums, "largest_scores", largest_scores)


def test_kernels_that_cannot_be_built_are_done_without_and_that_is_said(monkeypatch):
    failing_kernels(monkeypatch, RuntimeError("Failed to find C compiler. Please specify via CC"))
    trainer = make_trainer()
    trainer.observe(0, *small_qkv(), steps=2)
    assert len(trainer.losses[0]) == 2
    (note,) = trainer.notes
    assert note.startswith("Kernels cannot run here (RuntimeError: Failed to find C compiler. Please specify via CC): ")
    assert "install a C compiler" in note


def test_another_error_of_the_kernels_is_raised(monkeypatch):
    failing_kernels(monkeypatch, RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make_trainer().observe(0, *small_qkv())


@pytest.mark.parametrize("failing", [None, 2], ids=["enough memory", "none after the first ratio"])
def test_the_equations_of_a_step_count_once(monkeypatch, failing):
    real, calls, equations = step_sums.sparse_sums, [], []

    def limited(*args):
        calls.append(1)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(step_sums, "sparse_sums", limited)
    trainer = make_trainer(query_blocks=4)
    solve = trainer._ratio_equations
    monkeypatch.setattr(trainer, "_ratio_equations", lambda *args: equations.append(solve(*args)) or equations[-1])
    trainer.observe(0, *small_qkv(), steps=1)
    assert trainer.query_blocks == (4 if failing is None else 2)
    state = trainer.layer_state(0)
    torch.testing.assert_close(state.gram, equations[-1][0])
    torch.testing.assert_close(state.right, equations[-1][1])


def test_out_of_memory_to_the_last_is_one_sentence(monkeypatch):
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(TrainingError, match="layer 0: not enough memory for one query block"):
        make_trainer().observe(0, *small_qkv())


def test_bad_arguments():
    with pytest.raises(ValueError, match="sparsities must be one or more numbers above 0"):
        make_trainer(sparsities=())
    with pytest.raises(ValueError, match="above 0 and below 1"):
        make_trainer(sparsities=(0.9, 1.0))
    with pytest.raises(ValueError, match="sparsities must differ"):
        make_trainer(sparsities=(0.9, 0.9))
    with pytest.raises(ValueError, match="layer must be 0 to 0"):
        make_trainer().observe(1, *small_qkv())
    with pytest.raises(ValueError, match="layer 0 has 2 heads of 16"):
        make_trainer().observe(0, *(x[..., :16] for x in small_qkv()))
    with pytest.raises(ValueError, match="layout must be"):
        make_trainer().observe(0, *small_qkv(), layout="NHD")


def test_the_ratio_is_the_one_with_the_least_error():
    q, k, v = small_qkv(tokens=1500)
    trainer = make_trainer(sparsities=(0.8,), query_blocks=99, learning_rate=0.0)
    for _ in range(3):
        trainer.observe(0, q, k, v)
    state = trainer.states[0]
    best = state.alpha_logits
    errors = []
    for shift in (0.0, 0.2, -0.2):
        state.alpha_logits = best + shift
        errors.append(trainer.evaluate(0, q, k, v).relative(("untrained", "learned"), 0.8))
    assert errors[0] < min(errors[1:])


def test_a_resumed_ratio_moves_slowly():
    q, k, v = small_qkv(tokens=1500)
    first = make_trainer(sparsities=(0.8,), query_blocks=99, learning_rate=0.0)
    first.observe(0, q, k, v)
    other = small_qkv(tokens=1500)[0] * 3
    second = make_trainer(sparsities=(0.8,), query_blocks=99, learning_rate=0.0, resume=first.router())
    fresh = make_trainer(sparsities=(0.8,), query_blocks=99, learning_rate=0.0)
    for trainer in (second, fresh):
        trainer.observe(0, other, k, v)
    old, moved, new = (t.router().ratio(0, 0.8) for t in (first, second, fresh))
    assert (old - new).abs().max() > 1e-3
    assert ((moved - old).abs() < 0.1 * (new - old).abs() + 1e-6).all()


@pytest.mark.parametrize(("keep_diagonal", "query_block"), [(True, 128), (False, 128), (True, 64)])
def test_errors_are_those_of_the_operator_with_the_same_diagonal_and_query_block(keep_diagonal, query_block):
    q, k, v = small_qkv(tokens=1500)
    options = {"keep_diagonal": keep_diagonal, "query_block": query_block}
    # a router near the identity, so that the rule decides and not what was learned
    trainer = make_trainer(sparsities=(0.8,), query_blocks=99, learning_rate=7e-4, **options)
    trainer.observe(0, q, k, v)
    error = trainer.evaluate(0, q, k, v).relative(AFTER, 0.8)
    router = trainer.router()
    assert (router.keep_diagonal, router.q_block) == (keep_diagonal, query_block)
    out, other = (
        sla2_attention(
            q, k, v, router.layers[0].proj_q, router.layers[0].proj_k, router.ratio(0, 0.8),
            sparsity=0.8, precision="16bit", **used,
        )
        for used in (options, options | {"keep_diagonal": not keep_diagonal})
    )  # fmt: skip
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert error == pytest.approx(((out - dense).norm() / dense.norm()).item(), rel=1e-4)
    assert error != pytest.approx(((other - dense).norm() / dense.norm()).item(), rel=1e-3)


def test_a_resumed_training_keeps_the_diagonal_and_the_query_block_as_it_began():
    for keep_diagonal, query_block in ((True, 128), (False, 64)):
        first = make_trainer(keep_diagonal=keep_diagonal, query_block=query_block)
        first.observe(0, *small_qkv(tokens=2000))
        second = make_trainer(keep_diagonal=not keep_diagonal, query_block=192 - query_block, resume=first.router())
        second.observe(0, *small_qkv(tokens=2000))
        assert (second.router().keep_diagonal, second.router().q_block) == (keep_diagonal, query_block)
