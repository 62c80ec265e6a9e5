"""Two processes that share the heads of a sequence compute what one does: the operator with its gradients, diffusers' Wan."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers.models")

import ulysses_processes as case
from diffusers import ContextParallelConfig

from sla2_diffusers import apply_sla2

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("ulysses") / "found.pt"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*start, case.__file__, str(file)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(file)


def test_operator_and_gradients_equal_one_process(found):
    expected = case.output_and_gradients(*case.qkv(), lambda q, k, v: case.attend(q, k, v, slice(None)))
    for mine, one in zip(found["operator"], expected, strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", ["SLA2 first", "SLA2 last"])
def test_diffusers_wan_equals_one_process(found, order):
    video, sparse, dense = found[order]
    model = case.transformer()
    without = case.video(model)
    apply_sla2(model, case.router(), sparsity=0.75)
    expected = case.video(model)
    torch.testing.assert_close(video, expected, rtol=1e-4, atol=1e-5)
    assert (sparse, dense) == (case.LAYERS, 0)
    assert (without - expected).norm() > 100 * (video - expected).norm()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ContextParallelConfig(ring_degree=2), "context parallelism is not plain Ulysses"),
        (ContextParallelConfig(ulysses_degree=3), "3 devices cannot share 4 heads equally"),
    ],
    ids=["ring", "odd"],
)
def test_other_ways_to_split_run_dense_and_say_why(config, reason):
    class Split:
        context_parallel_config = config

    model = case.transformer()
    handle = apply_sla2(model, case.router(), sparsity=0.75)
    for block in model.blocks:
        # the reason alone: dense attention without processes does not look at this
        block.attn1.processor.dense = Unsplit(block.attn1.processor.dense)
        block.attn1.processor._parallel_config = Split()
    case.video(model)
    assert handle.sparse_calls == 0
    assert all(sentence.startswith(reason) for sentence in handle.dense_reasons())


class Unsplit:
    """A dense processor that runs in one process whatever it is told."""

    def __init__(self, dense):
        self.dense, self._parallel_config = dense, None

    def __call__(self, *args, **kwargs):
        return self.dense(*args, **kwargs)
