"""Copies between processes that read each other's memory give what one process does, in any order that may happen."""

import functools
import os
from contextlib import contextmanager
from types import SimpleNamespace

import peer_processes as case
import pytest
import torch
from process_scripts import run_script

from sla2_kernels import peer_copies
from sla2_kernels.peer_copies import Peers
from sla2_kernels.sequence_parallel import sequence_parallel_attention


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(packed by "torch", or in Triton's interpreter by "the kernel"): what 2 and 4 processes found."""

    @functools.cache
    def run(packed_by):
        folder = tmp_path_factory.mktemp("peers")
        interpret = str(int(packed_by == "the kernel"))
        run_script(case.__file__, folder, timeout=200, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET=interpret)
        return folder

    return run


@pytest.fixture(
    params=[
        ("torch", 2, "all"),
        ("torch", 4, "all"),
        ("torch", 4, "half"),
        ("the kernel", 2, "all"),
        ("the kernel", 4, "all"),
    ],
    ids=["2 processes", "4 processes", "2 of 4", "2 processes, kernel", "4 processes, kernel"],
)
def found(request, folders):
    """(processes of the group, what they found)."""
    packed_by, processes, group = request.param
    found = torch.load(folders(packed_by) / f"{processes}.pt")
    return 2 if group == "half" else processes, {
        name[0] if len(name) == 1 else tuple(name): value for (of, *name), value in found.items() if of == group
    }


def of_one(call, processes, seed, attend=case.attend):
    return attend(*case.qkv(call, processes, seed), slice(0, call[2]))


def test_copies_change_no_bit(found):
    """Calls of many shapes in a row, whose buffers grow, shrink and are divided otherwise, while pulls take their time."""
    processes, outputs = found
    for seed, call in enumerate(case.CALLS):
        assert torch.equal(outputs[seed], of_one(call, processes, seed)), call
    assert torch.equal(outputs["sparse"], of_one(case.CALLS[6], processes, 1, case.attend_sparsely))


def test_calls_beside_and_after_one_that_failed(found):
    """Process 1 fails with its second group of heads; 0 and 1 with their first; 0 with the first and 1 with the second."""
    processes, outputs = found
    tokens, share = case.CALLS[0][1], 8 // processes
    for at in (None, 0, 1):
        assert torch.equal(outputs["after a failed one", at], of_one(case.CALLS[0], processes, 4))
    right = of_one(case.CALLS[0], processes, 2)
    right[:, :, share + share // 2 : 2 * share] = torch.nan
    right[:, tokens : 2 * tokens] = 0
    torch.testing.assert_close(outputs["beside a failed one", None], right, rtol=0, atol=0, equal_nan=True)


def test_where_one_process_lacks_the_memory_all_exchange_by_collectives(found):
    processes, outputs = found
    assert "cannot exchange by copies:" in outputs["refused"] and "bytes are too many" in outputs["refused"]
    assert torch.equal(outputs["collective"], of_one(case.REFUSED, processes, 1))
    assert torch.equal(outputs["again"], of_one(case.CALLS[-1], processes, 5))


def test_a_process_keeps_memory_for_what_the_others_need(found):
    processes, outputs = found
    needed = 4 * case.bytes_of(case.CALLS[-1]) * (processes - 1) // processes
    capacity = outputs["capacity"].unique().item()
    assert needed <= capacity < 1.01 * needed


@pytest.fixture
def streams(monkeypatch):
    """A list of what is done to CUDA's streams and by whom, and the Peers of process 1 of 3 that do it."""
    done = []
    running = ["current"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            done.append((self.name, "waits for", other.name))

        def wait_event(self, event):
            done.append((self.name, "waits for", event))

        def record_event(self):
            done.append((self.name, "records"))
            return f"event {len(done)}"

    @contextmanager
    def on(stream):
        running.append(stream.name)
        yield
        running.pop()

    def barrier(channel, timeout_ms):
        done.append((running[-1], "barrier", channel))

    class Watched(torch.Tensor):
        def copy_(self, source):
            done.append((running[-1], "copies", source.tolist()))
            return torch.Tensor.copy_(self, source)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    peers = object.__new__(Peers)
    peers.memory = [torch.arange(8, dtype=torch.uint8) + 10 * process for process in range(3)]
    peers.device, peers._side, peers._handle = None, Stream("side"), SimpleNamespace(barrier=barrier)
    return done, peers, lambda: torch.zeros(2, 1, dtype=torch.int16).as_subclass(Watched)


def test_pulls_run_on_the_side_stream_between_a_barrier_and_the_event(streams):
    done, peers, zeros = streams
    into = zeros(), zeros()
    fetched = peers.fetch([(into[0], 2, 4), (into[1], 0, 0)])
    peers.wait(fetched)
    assert done == [
        ("side", "waits for", "current"),
        ("side", "barrier", 0),
        ("side", "copies", [24, 25, 26, 27]),
        ("side", "copies", [0, 1, 2, 3]),
        ("side", "records"),
        ("current", "waits for", fetched),
    ]
    assert into[0].flatten().view(torch.uint8).tolist() == [24, 25, 26, 27]


def test_packing_waits_for_the_side_stream(streams):
    done, peers, _ = streams
    peers.capacity, peers._refused = 8, None
    peers.reserve(8)
    assert done == [("current", "waits for", "side")]


def test_a_call_that_fails_before_it_waits_leaves_the_last_calls_outputs_to_the_others():
    class Interrupted:
        processes, rank = 2, 0

        def __init__(self):
            self.events, self.waited = 0, []

        def fetch(self, pulls):
            self.events += 1
            return self.events

        def wait(self, event):
            self.waited.append((event, self.memory[0].view(q.dtype).isnan().any().item()))
            if len(self.waited) == 1:
                raise KeyboardInterrupt

    q, parts, peers = torch.ones(1, 4, 4, 16), [slice(0, 1), slice(1, 2)], Interrupted()
    peers.capacity = peer_copies._Slots(q, 2, parts).capacity
    peers.memory = [torch.zeros(peers.capacity, dtype=torch.uint8) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        peer_copies.attention_by_copies(q, q, q, case.attend, parts, peers)
    # the first barrier of this call, behind which nobody reads them, comes before the first NaN; all four are reached
    assert peers.waited[:2] == [(1, False), (1, False)] and peers.waited[-1] == (4, True)


def test_a_group_that_is_gone_takes_its_memory_along(monkeypatch):
    class Group:
        group_name = "0"

    monkeypatch.setattr(peer_copies.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(peer_copies.dist, "get_rank", lambda group: 0)
    group = Group()
    peer_copies._known[group] = Peers(group, torch.device("cuda", 0))
    assert len(peer_copies._known) == 1
    del group
    assert len(peer_copies._known) == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({2: ("host", "c", False)}, "this torch has no symmetric memory"),
        ({2: ("other host", "c", True)}, "the processes are on several hosts"),
        ({2: ("host", "b", True)}, "processes share a GPU"),
        ({2: ("host", "e", True)}, "not every process sees the GPUs of the others (CUDA_VISIBLE_DEVICES)"),
        ({2: ("host", "d", True)}, "GPU 0 cannot read the memory of GPU 3"),
    ],
    ids=["none", "old torch", "hosts", "one GPU", "hidden", "no access"],
)
def test_why_gpus_cannot_copy(monkeypatch, changes, reason):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abcd"[index]))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: other != 3 and own != other)
    processes = {p: ("host", "abc"[p], True) for p in range(3)} | changes
    assert peer_copies._why_unreachable(torch.device("cuda", 0), processes.values()) == reason


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"transfer": "nccl"}, 'transfer must be "auto", "collective" or "copies", got \'nccl\'.'),
        ({"transfer": "copies"}, 'transfer "copies" has neither a routing nor gradients'),
        ({"transfer": "copies", "routing": object()}, 'transfer "copies" has neither a routing nor gradients'),
    ],
)
def test_what_cannot_be_copied_is_told_before_anything_is(options, told):
    q = torch.ones(1, 4, 2, 16)
    with pytest.raises(ValueError, match=told), torch.set_grad_enabled("routing" not in options):
        sequence_parallel_attention(q, q, q, case.attend, **options)


def test_torch_compile_traces_collectives_without_a_break(tmp_path):
    peer_copies.dist.init_process_group(
        "gloo", store=peer_copies.dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        qkv = case.qkv(case.CALLS[0], 1, 0)
        compiled = torch.compile(sequence_parallel_attention, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert torch.equal(compiled(*qkv, case.attend), of_one(case.CALLS[0], 1, 0))
    finally:
        peer_copies.dist.destroy_process_group()


def test_multicast_is_off_while_memory_is_mapped(monkeypatch):
    for before in (None, "0"):
        if before is not None:
            monkeypatch.setenv(peer_copies.WITHOUT_MULTICAST, before)
        with peer_copies._without_multicast():
            assert os.environ[peer_copies.WITHOUT_MULTICAST] == "1"
        assert os.environ.get(peer_copies.WITHOUT_MULTICAST) == before
