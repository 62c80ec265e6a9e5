"""The same call gives the same bits: repeated, and in any number of head groups."""

import pytest
import torch
from operator_inputs import attention_inputs

from sla2_kernels import sla2_attention, triton_backend

pytestmark = pytest.mark.usefixtures("wide_tiles")

OPTIONS = {"sparsity": 0.5, "backend": "triton", "return_alpha": True}


@pytest.mark.parametrize("precision", ["16bit", "int8", "fp8"])
def test_a_repeated_call_repeats_every_bit(generator, precision):
    inputs = attention_inputs(generator, tokens=130, keys=200, knots=None)
    first, second = (sla2_attention(*inputs.tensors(), **OPTIONS, precision=precision) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("precision", ["16bit", "int8", "fp8"])
@pytest.mark.parametrize(("share", "groups", "knots"), [(1e-9, 6, None), (None, 2, 2)])
def test_head_groups_change_no_bit(generator, monkeypatch, precision, share, groups, knots):
    inputs = attention_inputs(generator, batch=2, heads=3, tokens=65, keys=130, knots=knots, proj="per head")
    counted = []
    original = triton_backend._head_groups

    def one_group(q, per_head):
        return [slice(0, q.shape[0] * q.shape[1])]

    def several_groups(q, per_head, lanes=1):
        slices = original(q, per_head, lanes) if share else [slice(0, 4), slice(4, 6)]
        counted.append(len(slices))
        return slices

    monkeypatch.setattr(triton_backend, "_head_groups", one_group)
    together = sla2_attention(*inputs.tensors(), **OPTIONS, precision=precision)
    monkeypatch.setattr(triton_backend, "WORKSPACE_SHARE", share)
    monkeypatch.setattr(triton_backend, "WORKSPACE_FLOOR", 0)
    monkeypatch.setattr(triton_backend, "_head_groups", several_groups)
    apart = sla2_attention(*inputs.tensors(), **OPTIONS, precision=precision)
    assert set(counted) == {groups}
    assert torch.equal(apart[0], together[0]) and torch.equal(apart[1], together[1])


@pytest.mark.parametrize(("heads_that_fit", "expected"), [(1, (6, 1)), (2, (6, 2)), (4, (4, 2)), (6, (1, 1))])
def test_groups_run_beside_each_other_where_more_than_one_head_fits_but_not_all(monkeypatch, heads_that_fit, expected):
    monkeypatch.setattr(triton_backend, "WORKSPACE_FLOOR", 0)
    monkeypatch.setattr(triton_backend, "_lanes", lambda device: 2)
    q = torch.zeros(1).expand(2, 3, 300, 64)
    per_head = triton_backend.WORKSPACE_SHARE * q.numel() * 4 / (heads_that_fit + 0.1)
    groups, lanes = triton_backend._in_lanes(q, per_head)
    assert (len(groups), lanes) == expected


@pytest.mark.parametrize("per_head", [0, 1, 10**4, 10**6, 10**9])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 12), (2, 7), (3, 40)])
@pytest.mark.parametrize("floor", [0, 10**7])
@pytest.mark.parametrize("lanes", [1, 2])
def test_groups_cover_every_head_once(monkeypatch, batch, heads, per_head, floor, lanes):
    monkeypatch.setattr(triton_backend, "WORKSPACE_FLOOR", floor)
    q = torch.zeros(1).expand(batch, heads, 300, 64)
    groups = triton_backend._head_groups(q, per_head, lanes)
    covered = [head for group in groups for head in range(group.start, group.stop)]
    assert covered == list(range(batch * heads))
    sizes = {group.stop - group.start for group in groups}
    assert max(sizes) == groups[0].stop and min(sizes) >= max(1, groups[0].stop - 1)
    assert len(groups) % lanes == 0 or groups[0].stop == 1
    fits = (lanes * groups[0].stop * per_head) <= max(triton_backend.WORKSPACE_SHARE * q.numel() * 4, floor)
    assert fits or groups[0].stop == 1
