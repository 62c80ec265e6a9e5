"""Router files are untrusted, and no file of the user's is ever lost: fuzzed loading, saving under every fault of a disk."""

import json
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import router_bytes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_bytes import WAYS, good_router, joined, parts

from sla2_kernels import weights, whole_file
from sla2_kernels.router_format import MAX_FILE_BYTES, RouterFileError
from sla2_kernels.weights import load_router
from sla2_training.stage2.lora import save_lora

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = 300  # per way of breaking a file
tried = Counter()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    good_router().save(path)
    return path.read_bytes()


def attempt(path):
    """True where the file loads, sound; a RouterFileError of one line is the only other way out."""
    before = path.read_bytes()
    try:
        router = load_router(path)
    except RouterFileError as error:
        assert "\n" not in str(error) and len(str(error)) < 700 + len(str(path))
        return False
    finally:
        assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    tensors = [t for layer in router.layers for t in (layer.proj_q, layer.proj_k, layer.alpha_logits) if t is not None]
    assert all(torch.isfinite(t).all() and t.dtype == torch.float32 for t in tensors)
    assert all(
        0 < r < 1
        for t in range(router.num_layers)
        if router.ratio(t, 0.9) is not None
        for r in router.ratio(t, 0.9).flatten()
    )
    return True


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_fuzzed_router_files(way, good, tmp_path_factory):
    path = tmp_path_factory.mktemp(way.__name__) / "fuzzed.safetensors"
    counts = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(content=way(good))
    def fuzz(content):
        path.write_bytes(content)
        counts["loaded" if attempt(path) else "refused"] += 1

    fuzz()
    print(f"tried {counts.total()}: {dict(counts)}")
    # hypothesis leaves out what it has seen: some ways have fewer than EXAMPLES inputs
    assert counts.total() >= EXAMPLES / 3 and counts["refused"] > 0


def test_a_bit_flipped_anywhere(good, tmp_path):
    path = tmp_path / "flipped.safetensors"
    for position in range(len(good)):
        changed = bytearray(good)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        attempt(path)


def test_an_unspoilt_file_still_loads_after_all_that(good, tmp_path):
    path = tmp_path / "good.safetensors"
    path.write_bytes(good)
    assert attempt(path)


@pytest.mark.parametrize(
    "offsets", [[0, 64, 32, 96], [0, 64, 0, 64], [64, 0, 0, 128]], ids=["overlap", "twice", "reversed"]
)
def test_overlapping_offsets(good, tmp_path, offsets):
    header, data = parts(good)
    first, second = [name for name in header if name.startswith("layers.0.proj")]
    header[second]["shape"] = header[first]["shape"]
    header[first]["data_offsets"], header[second]["data_offsets"] = offsets[:2], offsets[2:]
    path = tmp_path / "r.safetensors"
    path.write_bytes(joined(header, data))
    assert not attempt(path)


def test_a_key_that_stands_twice_is_sound_or_refused(good, tmp_path):
    header, data = parts(good)
    for again in ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, header["layers.0.proj_q"]):
        text = json.dumps(header)[:-1] + f', "layers.0.proj_q": {json.dumps(again)}' + "}"
        path = tmp_path / "r.safetensors"
        path.write_bytes(joined(text.encode(), data))
        attempt(path)


def test_bytes_behind_the_last_tensor_are_refused_without_reading_them(good, tmp_path):
    path = tmp_path / "r.safetensors"
    with open(path, "wb") as file:
        file.write(good)
        file.truncate(2**36)  # a sparse file: it takes no room
    with pytest.raises(RouterFileError, match="must end with its last tensor at byte"):
        load_router(path)


def test_a_file_larger_than_any_router_is_refused_without_reading_it(good, tmp_path):
    header, data = parts(good)
    side = 4096
    header = {"__metadata__": header["__metadata__"], "layers.0.proj_q": header["layers.0.proj_q"]}
    metadata = header["__metadata__"]
    metadata |= {"tensors": '["layers.0.proj_q"]', "num_heads": str(side), "head_dim": str(side)}
    size = 4 * side**3
    header["layers.0.proj_q"] = {"dtype": "F32", "shape": [side] * 3, "data_offsets": [0, size]}
    content = joined(header, b"")
    path = tmp_path / "r.safetensors"
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(len(content) + size)
    assert size > MAX_FILE_BYTES
    with pytest.raises(RouterFileError, match="must have at most"):
        load_router(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + Evil.mark,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_is_refused_by_name_and_runs_nothing(tmp_path, protocol, zipped):
    Evil.mark = str(tmp_path / "ran")
    path = tmp_path / "evil.safetensors"
    if zipped:
        torch.save({"w": Evil()}, path, pickle_protocol=max(2, protocol))
    else:
        path.write_bytes(pickle.dumps(Evil(), protocol))
    # protocols 0 and 1 have no mark of their own: they are no safetensors
    named = "pickle" if zipped or protocol > 1 else "must be safetensors"
    with pytest.raises(RouterFileError, match=named):
        load_router(path)
    assert not os.path.exists(Evil.mark)


def unusual_files(folder, good):
    real = folder / "real.safetensors"
    real.write_bytes(good)
    (folder / "link.safetensors").symlink_to(real)
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "dangling.safetensors").symlink_to(folder / "nothing")
    (folder / "folder.safetensors").mkdir()
    (folder / "device.safetensors").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.safetensors")
    return real


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_links_folders_pipes_and_devices(good, tmp_path):
    unusual_files(tmp_path, good)
    assert load_router(tmp_path / "link.safetensors").num_layers == router_bytes.LAYERS
    for name, words in (
        ("loop", "cannot be read"),
        ("dangling", "No such file"),
        ("folder", "must be a file"),
        ("device", "must be a file"),
        ("pipe", "must be a file"),
    ):
        with pytest.raises(RouterFileError, match=words):
            load_router(tmp_path / f"{name}.safetensors")


FAULTS = {
    "no space left": (28, "write", "No space left on device"),
    "quota": (122, "flush", "Disk quota exceeded"),
    "input/output error": (5, "fsync", "Input/output error"),
    "read-only file system": (30, "open", "Read-only file system"),
    "no permission": (13, "name", "Permission denied"),
}


class FailingFile:
    """A real file whose writing stops half way, or whose buffers cannot be flushed."""

    def __init__(self, file, error, where):
        self.file, self.error, self.where = file, error, where

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def fileno(self):
        return self.file.fileno()

    def write(self, data):
        if self.where == "write":
            self.file.write(data[: len(data) // 2])
            raise self.error
        return self.file.write(data)

    def flush(self):
        if self.where == "flush":
            raise self.error
        self.file.flush()


@pytest.fixture(params=FAULTS.values(), ids=FAULTS)
def disk_fault(request, monkeypatch):
    """One system call of RouterWeights.save fails; the words that the user is told."""
    number, where, words = request.param
    error = OSError(number, words)

    def fail(*_):
        raise error

    def failing_open(path, mode):
        if where == "open":
            raise error
        return FailingFile(open(path, mode), error, where)

    if where == "name":  # of a new file, of one that is replaced
        for function in ("replace", "link", "rename"):
            monkeypatch.setattr(os, function, fail)
    elif where == "fsync":
        monkeypatch.setattr(os, where, fail)
    else:
        monkeypatch.setattr(weights, "open", failing_open, raising=False)
    return words


def test_a_fault_of_the_disk_while_saving_over_a_file_keeps_it_whole(good, tmp_path, disk_fault):
    path = tmp_path / "r.safetensors"
    path.write_bytes(good)
    with pytest.raises(RouterFileError, match=f"r.safetensors cannot be written: {disk_fault}"):
        good_router(precision="fp8").save(path)
    assert path.read_bytes() == good and os.listdir(tmp_path) == [path.name]


def test_a_fault_of_the_disk_in_the_save_node_leaves_no_empty_file(file_nodes, disk_fault):
    with pytest.raises(RouterFileError, match=disk_fault):
        file_nodes.module.save_router(good_router(), "wan/router")
    assert list(file_nodes.folder.rglob("*.*")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits are Linux's")
def test_a_real_limit_of_the_system_half_way_through_a_file(good, tmp_path):
    """The kernel itself ends the writing, in a process of its own."""
    path = tmp_path / "r.safetensors"
    path.write_bytes(good)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2,) * 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from router_bytes import good_router\n"
        "try: good_router(precision='fp8').save(sys.argv[1])\n"
        "except ValueError as error: print(error)"
    )
    # -B: the limit would cut compiled modules, too, which other processes read
    said = subprocess.run(
        [sys.executable, "-B", "-c", code, str(path), str(ROOT), str(Path(__file__).parent)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "cannot be written: File too large" in said.stdout, said
    assert path.read_bytes() == good and os.listdir(tmp_path) == [path.name]


FULL_DISK = """
import os, sys; sys.path[:0] = sys.argv[2:]
from router_bytes import good_router
path = os.path.join(sys.argv[1], "r.safetensors")
good_router().save(path)
before = open(path, "rb").read()
try: good_router(model_family="x" * 100, layers=good_router().layers * 100).save(path)
except ValueError as error: print(error)
print(open(path, "rb").read() == before, os.listdir(sys.argv[1]))
"""


def test_a_disk_that_is_really_full(tmp_path, in_a_small_disk):
    folders = [str(ROOT), str(Path(__file__).parent)]
    done = in_a_small_disk(tmp_path, "size=8k", [sys.executable, "-c", FULL_DISK, str(tmp_path), *folders])
    assert "cannot be written: No space left on device." in done.stdout, done
    assert done.stdout.endswith("True ['r.safetensors']\n")


def test_a_new_file_has_no_name_before_it_is_whole(file_nodes, monkeypatch):
    seen, sync = [], os.fsync

    def look(number):
        seen.append({path.name: path.stat().st_size for path in file_nodes.folder.rglob("*.safetensors")})
        sync(number)

    first = file_nodes.module.save_router(good_router(), "wan/router")
    size = (file_nodes.folder / first).stat().st_size
    monkeypatch.setattr(os, "fsync", look)
    file_nodes.module.save_router(good_router(), "wan/router")
    assert seen == [{"router_00001_.safetensors": size}]
    assert sorted(os.listdir(file_nodes.folder / "wan")) == ["router_00001_.safetensors", "router_00002_.safetensors"]


def test_a_new_lora_has_no_name_before_it_is_whole(file_nodes, pack_module, monkeypatch):
    lora_files, seen = pack_module("nodes.training.lora_files"), []
    write = lora_files.safetensors.torch.save_file

    def look(state, path):
        write(state, path)
        seen.append(os.listdir(file_nodes.folder))

    monkeypatch.setattr(lora_files.safetensors.torch, "save_file", look)
    sys.modules.pop(lora_files.__name__)  # it holds the stand-ins
    name = lora_files.save_lora({"a": torch.ones(2)}, "lora")
    assert name == "lora_00001_.safetensors" and os.listdir(file_nodes.folder) == [name]
    assert len(seen) == 1 and not any(other.endswith(".safetensors") for other in seen[0])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_others_may_read_what_they_may_read_of_any_new_file(file_nodes, pack_module, tmp_path, umask):
    """safetensors 0.8 makes files that only their owner may read: a ComfyUI that another user runs could not load a LoRA."""
    lora_files = pack_module("nodes.training.lora_files")
    sys.modules.pop(lora_files.__name__)  # it holds the stand-ins
    before = os.umask(umask)
    try:
        stage2, router = tmp_path / "stage2.safetensors", tmp_path / "router.safetensors"
        stage2.touch(0o600)
        adapters = {"blocks.0.ffn.0.lora_A.default.weight": torch.ones(2, 8)}
        save_lora(stage2, adapters, 2.0, "a test")
        good_router().save(router)
        node = file_nodes.folder / lora_files.save_lora({"a": torch.zeros(3)}, "wan")
    finally:
        os.umask(before)
    for path in (stage2, router, node):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_a_process_killed_while_saving_never_leaves_half_a_file(tmp_path):
    path = tmp_path / "r.safetensors"
    code = (
        "import itertools, sys; sys.path[:0] = sys.argv[2:]\n"
        "from router_bytes import good_router\n"
        "router = good_router()\n"
        "router.save(sys.argv[1]); print('saved', flush=True)\n"
        "for number in itertools.count():\n"
        "    router.save(sys.argv[1]); router.save(f'{sys.argv[1]}.{number}.safetensors', overwrite=False)"
    )
    command = [sys.executable, "-c", code, str(path), str(ROOT), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        for _ in range(50):
            assert load_router(path).num_layers == router_bytes.LAYERS
        process.kill()
    # what a killed process may leave is no router file to any list of files
    assert {left.suffix for left in tmp_path.iterdir()} <= {".safetensors", ".tmp"}
    assert all(load_router(left).num_layers == router_bytes.LAYERS for left in tmp_path.glob("*.safetensors"))


def test_a_read_only_folder(file_nodes, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(ValueError, match="cannot be written: Permission denied"):
        file_nodes.module.save_router(good_router(), "new/router")


REFUSED = [
    "", ".", "..", "../x", "a/../../x", "/etc/x", "//x", "\\\\server\\x", "C:\\x", "a//b", "a/./b", "a\x00b", "a\nb", "a|b",
    "a?", "a*", "\ud800", "con", "NUL.txt", "a/lpt1", "name.", "name ", "a /b", "outside/x",
]  # fmt: skip


@pytest.mark.parametrize("prefix", REFUSED, ids=ascii)
def test_prefixes_that_are_no_name_inside_models_sla2(file_nodes, tmp_path, prefix):
    (tmp_path / "elsewhere").mkdir()
    (file_nodes.folder / "outside").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="filename_prefix must be a name inside models/sla2"):
        file_nodes.module.save_router(good_router(), prefix)
    assert sorted(tmp_path.rglob("*")) == before


def test_fuzzed_prefixes_stay_inside_and_lose_nothing(file_nodes, tmp_path):
    """Whatever the prefix: a new file below models/sla2, or one sentence; files that were there stay as they were."""
    kept = tmp_path / "models" / "other.safetensors"
    kept.write_bytes(b"mine")
    saved, counts = {}, Counter()
    piece = st.text(max_size=6) | st.sampled_from(
        ["..", ".", "router", "a" * 300, "~", "$HOME", "%2e%2e", "a\\b", "é", "🎬"]
    )

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(prefix=st.lists(piece, max_size=4).map("/".join))
    def fuzz(prefix):
        try:
            name = file_nodes.module.save_router(router, prefix)
        except ValueError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
            return
        path = file_nodes.folder / name
        assert path not in saved and path.resolve().is_relative_to(file_nodes.folder)
        saved[path] = path.read_bytes()
        counts["saved"] += 1

    router = good_router()
    fuzz()
    assert counts["saved"] > 50 and counts["refused"] > 50
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {kept, *saved} and kept.read_bytes() == b"mine"
    assert all(path.read_bytes() == content for path, content in saved.items())


def no_hard_links(monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def as_on_windows(monkeypatch):
    """os.rename refuses a name that is taken there; here a link does."""

    def rename(draft, path):
        os.link(draft, path)
        os.remove(draft)

    monkeypatch.setattr(whole_file, "RENAMING_KEEPS", True)
    monkeypatch.setattr(os, "rename", rename)


def as_it_is(monkeypatch):
    pass


@pytest.mark.parametrize("system", [as_it_is, no_hard_links, as_on_windows])
def test_two_that_save_at_one_moment_get_a_file_each(file_nodes, monkeypatch, system):
    system(monkeypatch)
    names, router = [], good_router()
    threads = [
        threading.Thread(target=lambda: names.extend(file_nodes.module.save_router(router, "both") for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == len(set(names)) == 20 and sorted(names) == sorted(os.listdir(file_nodes.folder))
    assert all(load_router(file_nodes.folder / name).num_layers == router_bytes.LAYERS for name in names)


@pytest.mark.parametrize("system", [as_it_is, no_hard_links, as_on_windows])
def test_a_name_that_somebody_takes_meanwhile_stays_theirs(tmp_path, monkeypatch, system):
    system(monkeypatch)
    path = tmp_path / "r.safetensors"
    path.write_bytes(b"theirs")
    with pytest.raises(FileExistsError):
        good_router().save(path, overwrite=False)
    assert path.read_bytes() == b"theirs" and os.listdir(tmp_path) == [path.name]


def test_a_claim_that_a_killed_process_left_costs_one_number(file_nodes, monkeypatch):
    no_hard_links(monkeypatch)
    (file_nodes.folder / "router_00001_.safetensors.claim").touch()
    assert file_nodes.module.save_router(good_router(), "router") == "router_00002_.safetensors"


def test_a_saved_file_that_is_gone_is_noticed_once(pack_module, tmp_path):
    saved = pack_module("nodes.training.saved_files").SavedFiles()
    first, other = tmp_path / "first", tmp_path / "other"
    for path in (first, other):
        path.touch()
        saved.add(path.name, str(path))
    assert saved.losses("first") == saved.losses("other") == saved.losses("never saved") == 0
    first.unlink()
    assert [saved.losses("first"), saved.losses("first"), saved.losses("other"), saved.losses(None)] == [1, 1, 0, 1]
    other.unlink()
    assert saved.losses(None) == 2, "a name that comes over a wire is not known before the node runs"


def test_fuzzed_sla_checkpoints(comfyui_path, comfy_scripts, tmp_path):
    """SLA2 Load SLA Model with ComfyUI's own file reader: bent, cut, gapped and hostile checkpoints."""
    script = Path(__file__).with_name("fuzz_sla_loader.py")
    done = comfy_scripts.run(script, comfyui_path, ROOT, tmp_path, 1200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert counts["failures"] == [] and not counts["code ran"]
    assert counts["tried"] > 1200 and counts["refused"] > 800 and counts["loaded"] >= 2
