"""A step's sums: the same by any plan, few launches, and within the memory that was allowed."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.router_training_size import Launches
from sla2_training import RouterTrainer, TrainerOptions, block_sums, step_sums
from sla2_training.block_sums import memory_of
from sla2_training.layer_tensors import LayerTensors
from sla2_training.step_sums import StepPlan, step_memory, step_plan

H3 = {"heads": 56, "drawn": 8, "keys": 42_700, "head_dim": 128, "query_block": 128, "sparsities": 3}


def random_layer(heads, tokens, head_dim, batch=1, prefix=0):
    shapes = [(batch, heads, n, head_dim) for n in (tokens, tokens + prefix, tokens + prefix)]
    return [torch.randn(shape) for shape in shapes]


@pytest.fixture
def exact_kernels(monkeypatch):
    """In place of the kernels, which have tests of their own: the same sums in float64, by no operation that is counted."""

    def largest_scores(q, k, scale):
        with _disable_current_modes():
            return (q.double() @ k.double().transpose(1, 2) * scale).amax(dim=2).float()

    def key_block_sums(q, k, v, largest, scale, mass):
        with _disable_current_modes():
            p = (q.double() @ k.double().transpose(1, 2) * scale - largest[..., None].double()).exp()
            blocks = list(zip(p.split(64, dim=2), v.double().split(64, dim=1), strict=True))
            mass.copy_(torch.stack([weights.sum(dim=2) for weights, _ in blocks], dim=2))
            return torch.stack([weights @ values for weights, values in blocks]).float()

    monkeypatch.setattr(step_sums, "largest_scores", largest_scores)
    monkeypatch.setattr(block_sums, "key_block_sums", key_block_sums)


def step(trainer, qkv, by_kernels=False, **shown):
    """One step, as a function without arguments, after a first one: ratios and the optimiser are there."""
    trainer.observe(0, *qkv, **shown)
    tensors = LayerTensors(0, *qkv, "BHND", None, **shown)
    tensors.by_kernels = by_kernels
    return lambda: trainer._step(trainer.layer_state(0), tensors)


@pytest.mark.parametrize("plan", [(1, 1, 1), (1, 1, 3), (1, 1, 4), (2, 1, 4), (3, 2, 4), (3, 3, 4)])
def test_any_plan_gives_the_same_sums(monkeypatch, plan):
    """Against all heads at once, with ragged queries and keys and rows that keep everything."""
    qkv = random_layer(5, 500, 32, batch=2, prefix=37)
    tensors = LayerTensors(0, *qkv, "BHND", None, prefix=37)
    blocks = tensors.draw(4, torch.Generator().manual_seed(0))
    soft, hard = torch.rand(10, 4, 3, 9), (torch.rand(10, 4, 3, 9) < 0.4).float()
    hard[..., 0], soft[:, 1, 2], hard[:, 1, 2] = 1, 1, 1
    sums = []
    for used in (StepPlan(5, 5, 4), StepPlan(*plan)):
        monkeypatch.setattr(step_sums, "step_plan", lambda *_, used=used: used)
        sums.append(step_sums.step_sums(tensors, blocks, hard, 2**30, soft, torch.full((10, 4, 3), 0.7)))
        first = step_sums.step_sums(tensors, blocks, hard, 2**30)
        torch.testing.assert_close((first.product, first.norm), (sums[-1].product, sums[-1].norm), rtol=1e-4, atol=1e-3)
    for name in ("product", "norm", "error", "energy", "gradient"):
        whole, piecewise = (getattr(x, name) for x in sums)
        assert (piecewise - whole).norm() < 1e-5 * whole.norm(), name


@pytest.mark.parametrize("by_kernels", [False, True])
def test_sums_are_those_of_the_formulas_written_out(exact_kernels, by_kernels):
    """Against float64 and autograd with N x N tensors: keys of other tokens and of a large mean, an outlier channel, bfloat16,
    rows without linear weight."""
    (q, k, v), sharp = random_layer(2, 200, 16, batch=2, prefix=70), torch.tensor([1.0, -1.0])
    q[:, 0, ::2, 5], q[:, 0, :, 3:5], k[:, 0, :, 5] = 300, 0, 0
    k[:, 0, :, 3:5] += 60 * (torch.arange(270)[:, None] % 2 * 2 - 1) * sharp
    k[:, 1, :, 7] = 6 * k[:, 1, :, 7] + 40
    q, k, v = (x.bfloat16() for x in (q, k + 4 * torch.randn(2, 2, 1, 16), v))
    tensors = LayerTensors(0, q, k, v, "BHND", None, prefix=70, query_block=64)
    tensors.by_kernels = by_kernels
    soft, hard, ratios = torch.rand(4, 4, 3, 5), (torch.rand(4, 4, 3, 5) < 0.4).float(), torch.rand(4, 4, 3)
    hard[..., 0], soft[:, 1, 2], hard[:, 1, 2] = 1, 1, 1
    sums = step_sums.step_sums(tensors, torch.arange(4).expand(2, 2, 4), hard, 2**30, soft, ratios)

    q, k, v = (x.double().flatten(0, 1)[:, None] for x in (q, k, v))
    k = k - k.mean(dim=2, keepdim=True)
    phi = q.softmax(dim=-1)
    similarity, weight = phi @ k.softmax(dim=-1).transpose(2, 3), (q @ k.transpose(2, 3) / 4).softmax(dim=-1)
    dense = weight @ v

    def by_row(x):
        return x.double().transpose(1, 2).repeat_interleave(64, dim=2)[:, :, :200]

    def branches(mask):
        mask = by_row(mask).repeat_interleave(64, dim=3)[..., :270]
        sparse, linear = mask * weight, (1 - mask) * similarity
        norm = linear.sum(dim=-1, keepdim=True)
        little, partial = norm <= 2**-64 * 320 * phi.amax(dim=-1, keepdim=True), (mask < 1).any(dim=-1, keepdim=True)
        return sparse @ v / sparse.sum(dim=-1, keepdim=True), linear @ v / norm.where(~little, 1), little, partial

    leaf = soft.double().requires_grad_()
    o_sparse, o_linear, little, partial = branches(leaf)
    assert 0.2 < little.double().mean() < 0.5
    ratio = by_row(ratios[..., None]).masked_fill(little, 1)
    error = (ratio * o_sparse + (1 - ratio) * o_linear - dense).square().sum()
    error.backward()
    o_sparse, o_linear, little, partial = branches(hard)
    difference = (o_sparse - o_linear).masked_fill(little & partial, 0)
    rows = difference * (dense - o_linear), difference.square()
    product, norm = (torch.stack([x.sum(dim=(2, 3)) for x in y.split(64, dim=2)], dim=1) for y in rows)
    expected = {
        "error": error,
        "energy": dense.square().sum(),
        "gradient": leaf.grad / 2,
        "product": product,
        "norm": norm,
    }
    for name, value in expected.items():
        assert (getattr(sums, name) - value).norm() < 1e-4 * value.norm(), name


def launches(heads, query_blocks, memory_bytes=2**30):
    trainer = RouterTrainer(
        "test", 1, heads, 16, options=TrainerOptions(query_blocks=query_blocks, memory_bytes=memory_bytes)
    )
    run = step(trainer, random_layer(heads, 1100, 16))
    with Launches() as seen:
        run()
    return seen.count


def test_launches_do_not_grow_with_the_query_blocks_and_little_with_the_heads():
    few = launches(2, 8)
    assert launches(2, 2) == few <= 300
    assert launches(8, 8) - few <= 6 * 10
    head_by_head = step_memory(StepPlan(1, 1, 8), 1100, 16, 128, 3) + 4 * 8 * 8 * 18 * 19
    assert launches(8, 8, memory_bytes=head_by_head) - few <= 7 * 80


def test_launches_at_the_size_of_minimax_h3(monkeypatch):
    """H3's heads, query blocks and plan, over fewer tokens."""
    masks = 4 * 56 * 8 * 668 * 19
    plan = step_plan(**H3, memory_bytes=TrainerOptions().memory_bytes - masks)
    monkeypatch.setattr(step_sums, "step_plan", lambda *_: plan)
    assert launches(56, 8) <= 1250


def test_kernels_leave_room_for_as_many_heads_at_a_time():
    bound = TrainerOptions().memory_bytes - 4 * 56 * 8 * 668 * 19
    plain, by_kernels = (step_plan(**H3, memory_bytes=bound, by_kernels=x) for x in (False, True))
    assert plain.group <= by_kernels.group and plain.part <= by_kernels.part


class PeakMemory(TorchDispatchMode):
    """Bytes, at most, in storages that operations made and that were alive at one time."""

    def __init__(self, known):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def hold(self, storage):
        key = storage._cdata
        if key not in self.known and key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.now -= self.alive.pop(key)


@pytest.mark.parametrize("by_kernels", [False, True])
@pytest.mark.parametrize(("tokens", "head_dim", "megabytes"), [(2000, 128, 0), (2000, 128, 30), (3000, 64, 12)])
def test_a_step_keeps_to_its_memory(exact_kernels, tokens, head_dim, megabytes, by_kernels):
    trainer = RouterTrainer("test", 1, 4, head_dim, options=TrainerOptions(memory_bytes=megabytes * 2**20))
    qkv = random_layer(4, tokens, head_dim)
    run = step(trainer, qkv, by_kernels)
    state = trainer.layer_state(0)
    with PeakMemory([*qkv, state.proj_q, state.proj_k]) as seen:
        run()
    assert seen.peak <= max(megabytes * 2**20, sum(memory_of(tokens, head_dim)))
    # and makes use of it: what four heads need at once is about 50
    assert seen.peak >= 0.5 * min(megabytes, 40) * 2**20


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("keys", [300, 4000, 42_700, 400_000])
def test_the_least_plan_takes_no_more_than_memory_of_says(keys, head_dim):
    assert step_plan(4, 8, keys, head_dim, 128, 3, 0) == StepPlan(1, 1, 1)
    assert step_memory(StepPlan(1, 1, 1), keys, head_dim, 128, 3) <= sum(memory_of(keys, head_dim))
