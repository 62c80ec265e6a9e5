"""Recording a call's launches and replaying them: each kernel gets its own call's addresses, and memory for as long as it is used."""

import importlib.util
import weakref
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from sla2_kernels import support
from sla2_kernels.kernels import launch as module


class Kernel:
    """Stands for a compiled kernel and the function it comes from: notes what it is launched with."""

    arg_names = ("x", "y", "n", "desc", "SIZE")

    def __init__(self):
        self.launched, self.recorded, self.streams, self.watch = [], [], [], lambda: None
        self.compiled = SimpleNamespace(run=self.run, function="function", packed_metadata="metadata")

    def __getitem__(self, grid):
        def front_end(*args, num_warps, enable_fp_fusion=None, **constants):
            self.fused = enable_fp_fusion
            self.recorded.append((grid, args, constants))
            return self.compiled

        return front_end

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert (function, metadata) == ("function", "metadata")
        assert (launch_metadata, enter, leave) == (None, None, None)
        self.streams.append(stream)
        self.launched.append(((x, y, z), arguments, self.watch()))


class Descriptor:
    """As Triton's: a block of a base."""

    def __init__(self, base, block_shape):
        self.base, self.block_shape = base, block_shape


class OnGpu:
    """A tensor whose memory is nowhere, but which says that it is on a GPU."""

    is_cuda, dtype, shape, device = True, torch.bfloat16, torch.Size([2, 3]), "cpu"

    def __init__(self, address, strides=(3, 1)):
        self.address, self.strides = address, strides

    def data_ptr(self):
        return self.address

    def stride(self):
        return self.strides


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_recordings", {})
    monkeypatch.setattr(module, "DIRECT", True)
    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: f"stream {device}")
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return Kernel()


@pytest.fixture
def made(monkeypatch):
    """Weak references to what is allocated while launches are replayed."""
    made, empty = [], torch.empty

    def watched(*args, **options):
        tensor = empty(*args, **options)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(module, "torch", SimpleNamespace(**{**vars(torch), "empty": watched}))
    return made


def recorded(kernel, outside, call):
    recording = module.Recording(outside)
    with module._added_to(recording):
        call()
    recording.finish()
    return recording


def launch(kernel, x, y, n=7, desc=None, grid=(5, 2)):
    module.launch(kernel, grid, x, y, n, desc, SIZE=64, options={"num_warps": 4})


def test_products_and_sums_are_fused_whatever_the_release_does_unasked(kernel):
    launch(kernel, torch.zeros(3), None)
    assert kernel.fused is True


def test_outside_a_recording_the_front_end_launches(kernel):
    x = torch.zeros(3)
    launch(kernel, x, None)
    assert kernel.recorded == [((5, 2), (x, None, 7, None), {"SIZE": 64})] and not kernel.launched


def test_kernels_get_the_addresses_of_the_call_that_replays(kernel, made):
    q, out = torch.zeros(16), torch.zeros(16)

    def call():
        buffer = torch.empty(4, 100, dtype=torch.float32)
        launch(kernel, q, buffer)
        launch(kernel, buffer[2:], None, n=0.5, desc=Descriptor(buffer[1, 4:], [1, 8]), grid=(9,))
        launch(kernel, buffer, out, desc=Descriptor(q, [4]))

    recording = recorded(kernel, (q, out), call)
    kernel.launched.clear()
    kernel.watch = lambda: [tensor() for tensor in made]
    recording.replay([1000, 2000], "cpu")
    (buffer,) = kernel.launched[0][2]
    assert buffer.numel() * buffer.element_size() == 1600
    at = buffer.data_ptr()
    assert kernel.streams == ["stream 3"] * 3
    first, second, third = kernel.launched
    assert first[:2] == ((5, 2, 1), (1000, at, 7, None, 64))
    assert second[0] == (9, 1, 1) and second[1][:3] == (at + 800, None, 0.5)
    assert second[1][3].base.data_ptr() == at + 400 + 16 and second[1][3].block_shape == [1, 8]
    assert third[1][:2] == (at, 2000) and third[1][3].base.data_ptr() == 1000
    recording.replay([3000, 4000], "cpu")
    again = kernel.launched[3:]
    assert again[0][1][0] == 3000 and again[2][1][1] == 4000 and again[2][1][3].base.data_ptr() == 3000
    assert third[1][3].base.data_ptr() == 1000, "what an earlier replay launched stays its own"


def test_buffers_share_memory_where_their_lives_do_not_meet(kernel, made):
    q = torch.zeros(16)

    def call():
        first, second = torch.empty(1000), torch.empty(2000)
        launch(kernel, q, second)
        launch(kernel, q, first, desc=Descriptor(second[4:], [8]))
        del second
        third = torch.empty(2000)
        launch(kernel, first, third)
        launch(kernel, third, q)

    recording = recorded(kernel, (q,), call)
    kernel.launched.clear()
    kernel.watch = lambda: [tensor() for tensor in made]
    recording.replay([1000], "cpu")
    (memory,) = kernel.launched[0][2]
    second, first, third = kernel.launched[0][1][1], kernel.launched[1][1][1], kernel.launched[2][1][1]
    assert second == third, "the second buffer's last use comes before the third's first"
    assert {second, first} == {memory.data_ptr(), memory.data_ptr() + 8192} and memory.numel() == 8192 + 4000
    del memory
    kernel.launched.clear()
    assert all(tensor() is None for tensor in made)


@pytest.mark.parametrize("seed", range(20))
def test_buffers_alive_together_never_overlap(seed):
    random = torch.Generator().manual_seed(seed)
    spans = torch.randint(0, 20, (30, 2), generator=random).sort(dim=1).values.tolist()
    sizes = torch.randint(0, 5000, (30,), generator=random).tolist()
    lives = {slot: module._Life(size, *span) for slot, (size, span) in enumerate(zip(sizes, spans, strict=True))}
    offsets, total = module._placed(lives)
    for a, one in lives.items():
        assert offsets[a] % module.ALIGNMENT == 0 and offsets[a] + one.size <= total
        for b, other in lives.items():
            if a != b and one.size and other.size and one.first <= other.last and other.first <= one.last:
                assert offsets[a] + one.size <= offsets[b] or offsets[b] + other.size <= offsets[a]
    # what the busiest step needs, and not much more
    busiest = max(sum(one.size for one in lives.values() if one.first <= step <= one.last) for step in range(20))
    assert busiest <= total <= 1.5 * busiest + 30 * module.ALIGNMENT


class Stream:
    """Notes in ``log`` whom it waits for."""

    def __init__(self, name, log):
        self.cuda_stream, self._log = name, log

    def wait_stream(self, other):
        self._log.append(f"{self.cuda_stream} waits for {other.cuda_stream}")


def in_two_lanes(kernel, q, out):
    """A call that routes, works through three groups in two lanes, and ends."""
    routed, works = torch.empty(1000), [torch.empty(3000), torch.empty(3000)]
    launch(kernel, q, torch.empty(500))
    launch(kernel, q, routed)
    for number in range(3):
        with module.lane(number % 2):
            launch(kernel, routed, works[number % 2], n=number)
            scratch = torch.empty(200)
            launch(kernel, works[number % 2], scratch, n=number)
    launch(kernel, q, out)


def test_lanes_are_two_streams_and_share_no_scratch(kernel, made, monkeypatch):
    q, out, log = torch.zeros(16), torch.zeros(16), kernel.streams
    monkeypatch.setattr(module, "_current_and_beside", lambda: (Stream("own", log), Stream("beside", log)))
    recording = recorded(kernel, (q, out), lambda: in_two_lanes(kernel, q, out))
    kernel.launched.clear()
    recording.replay([1000, 2000], "cpu")
    assert log == ["own", "own", "beside waits for own", *["own"] * 2, *["beside"] * 2, *["own"] * 2,
                   "own waits for beside", "own"]  # fmt: skip
    (_, first), (_, routed), *in_lanes, _ = [launched[1][:2] for launched in kernel.launched]
    works, scratch = [y for _, y in in_lanes[::2]], [y for _, y in in_lanes[1::2]]
    assert all(x == routed for x, _ in in_lanes[::2]) and works[0] == works[2] and scratch[0] == scratch[2]
    spans = [(routed, 4000), (works[0], 12000), (works[1], 12000), (scratch[0], 800), (scratch[1], 800)]
    for number, (begin, size) in enumerate(spans):
        for other, bytes_of_other in spans[:number]:
            assert begin + size <= other or other + bytes_of_other <= begin, "in use at the same time"
    assert first in works, "what only routing needs lies where a group works later"


def test_a_launch_that_fails_in_a_lane_leaves_nothing_running_beside(kernel, monkeypatch):
    q, out, log = torch.zeros(16), torch.zeros(16), []
    monkeypatch.setattr(module, "_current_and_beside", lambda: (Stream("own", log), Stream("beside", log)))
    recording = recorded(kernel, (q, out), lambda: in_two_lanes(kernel, q, out))

    def fail():
        if len(kernel.launched) == 5:
            raise RuntimeError("an illegal launch")

    kernel.launched.clear()
    kernel.watch = fail
    with pytest.raises(RuntimeError, match="an illegal launch"):
        recording.replay([1000, 2000], "cpu")
    assert log == ["beside waits for own", "own waits for beside"]


def test_a_launch_between_those_in_lanes_is_refused(kernel):
    q = torch.zeros(16)

    def call():
        for number in range(2):
            with module.lane(number):
                launch(kernel, q, None)
            launch(kernel, q, None)

    with pytest.raises(ValueError, match="a launch between those in lanes is in none"):
        recorded(kernel, (q,), call)


def test_a_buffer_at_the_place_of_an_earlier_one_is_another_buffer(kernel):
    memory = torch.zeros(8)

    def call():
        for size in (10, 12):
            # the allocator may give out one address twice: here it surely does
            buffer = torch.frombuffer(memory.numpy(), dtype=torch.float32)[:8]
            launch(kernel, buffer, None, n=size)

    recording = recorded(kernel, (), call)
    assert len(recording._offsets) == 2


def test_a_view_that_begins_inside_a_caller_s_tensor_is_no_scratch(kernel):
    """Replayed as scratch, the kernel would read memory that nobody filled."""
    qkv = torch.zeros(3, 64)
    q, k, v = qkv
    for view in (k[16:], qkv[1:, 8:]):
        with pytest.raises(ValueError, match="a view that begins inside one of the call's tensors"):
            recorded(kernel, (q, None, k, v), lambda view=view: launch(kernel, q, view))
    recording = recorded(kernel, (q, None, k, v), lambda: launch(kernel, k, v[:8]))
    kernel.launched.clear()
    recording.replay([1000, None, 2000, 3000], "cpu")
    assert kernel.launched[0][1][:2] == (2000, 3000), "views that begin where a tensor does are that tensor"


@pytest.mark.parametrize(
    ("version", "direct"),
    [("3.5.1", False), ("3.6.0", True), ("3.9.0+git1", True), ("3.7.0rc1", True), ("3.10.0", False), ("4.0rc1", False)],
)
def test_the_private_launcher_is_used_with_the_releases_it_was_tested_with(monkeypatch, version, direct):
    assert module.DIRECT is support.is_tested_triton(module.DIRECT_RELEASES)
    monkeypatch.setattr("triton.__version__", version)
    assert support.is_tested_triton(module.DIRECT_RELEASES) is direct
    monkeypatch.setattr(module, "DIRECT", direct)
    reason = module.why_not_direct()
    assert reason is None if direct else reason.endswith("was tested with Triton 3.6 to 3.9")


def test_tritons_own_descriptor_is_moved_and_stays_as_it_is():
    hopper = pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    layout = pytest.importorskip("triton.experimental.gluon.language").NVMMASharedLayout(64, 8, rank=3)
    base = torch.zeros(4, 64, 64, dtype=torch.int8)
    descriptor = hopper.TensorDescriptor.from_tensor(base, [1, 64, 64], layout)
    moved = module._at(descriptor, 4096)
    assert type(moved) is hopper.TensorDescriptor and moved.base.data_ptr() == 4096
    others = {name: value for name, value in vars(descriptor).items() if name != "base"}
    assert others == {name: value for name, value in vars(moved).items() if name != "base"}
    assert descriptor.base is base


def calls(kernel, *tensors, settings=("int8",)):
    """How many launches were recorded and how many replayed for one call."""
    before = len(kernel.recorded), len(kernel.launched)

    def call():
        for tensor in filter(None, tensors):
            kernel[(1,)](tensor, num_warps=4)
            module._thread.recording.add(kernel.compiled, (1,), [tensor.data_ptr()])

    module.cached(tensors, settings, call)
    return len(kernel.recorded) - before[0], len(kernel.launched) - before[1]


def test_what_decides_the_launches_decides_whether_they_are_replayed(kernel, monkeypatch):
    a, b = OnGpu(4096), OnGpu(8192)
    assert calls(kernel, a, b, None) == (2, 0)
    assert calls(kernel, OnGpu(512), OnGpu(1024), None) == (0, 2)
    assert calls(kernel, a, b, None, settings=("fp8",)) == (2, 0)
    assert calls(kernel, a, None, b) == (2, 0)
    assert calls(kernel, a, OnGpu(8192, (6, 2)), None) == (2, 0)
    assert calls(kernel, a, OnGpu(8200), None) == (2, 0), "no longer aligned"
    assert calls(kernel, a, a, None) == (2, 0), "two arguments that are one tensor"
    assert calls(kernel, b, b, None) == (0, 2)
    assert calls(kernel, a, b, None) == (0, 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 4)
    assert calls(kernel, a, b, None) == (2, 0)


def test_a_call_that_fails_is_not_replayed(kernel):
    def call():
        raise MemoryError("while it is recorded")

    with pytest.raises(MemoryError):
        module.cached((OnGpu(4096),), (), call)
    assert module._thread.recording is None, "later launches are recorded no more"
    assert calls(kernel, OnGpu(4096), settings=()) == (1, 0)


def test_the_number_of_kinds_that_are_remembered_has_a_limit(kernel, monkeypatch):
    monkeypatch.setattr(module, "MAX_RECORDINGS", 3)
    for number in range(7):
        assert calls(kernel, OnGpu(4096), settings=(number,)) == (1, 0)
        assert 1 <= len(module._recordings) <= 3
    for number in (4, 5, 6):
        assert calls(kernel, OnGpu(4096), settings=(number,)) == (0, 1), "the oldest goes, not all"
    assert calls(kernel, OnGpu(4096), settings=(3,)) == (1, 0)


def test_on_the_cpu_nothing_is_recorded():
    recordings = []
    module.cached((torch.zeros(3),), (), lambda: recordings.append(getattr(module._thread, "recording", None)))
    assert recordings == [None]
