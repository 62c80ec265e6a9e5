"""Threads, processes and other packs around ours."""

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sla2_kernels import sla2_attention
from tooling.archive import packed_files
from tooling.server import clean_environment

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).parent


def printed(script, *arguments, cwd, timeout=120):
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=clean_environment(),
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_beside_packs_that_own_our_modules_names(comfyui_path, comfy_scripts, tmp_path):
    done = comfy_scripts.run(HERE / "neighbourhood.py", ROOT, tmp_path, "beside", comfyui_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"SLA2ApplyAttention", "SLA2LoadRouter", "SLA2TrainRouter"} <= set(found["nodes"])
    assert found["outside"] == [] and found["comfyui"]


def test_installed_twice_in_one_process(tmp_path):
    assert json.loads(printed("neighbourhood.py", ROOT, tmp_path, "twice", cwd=tmp_path)) == {"equal": True}


NODES = """
import asyncio, importlib.util, sys
pack = sys.argv[1]
spec = importlib.util.spec_from_file_location("pack", pack + "/__init__.py", submodule_search_locations=[pack])
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
asyncio.run(module.comfy_entrypoint())
ours = {name: module for name, module in sys.modules.items() if name.startswith("pack.")}
print(len(ours), [name for name, module in ours.items() if ".kernels." in name or "triton" in vars(module)])
"""


def test_importing_the_nodes_leaves_triton_alone(comfyui_path, comfy_scripts, tmp_path):
    """Nothing but a kernel call may pay for Triton's import, or need it; of the files that the Registry ships."""
    for name in packed_files():
        target = tmp_path / "pack" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ROOT / name)
    (tmp_path / "nodes.py").write_text(NODES)
    done = comfy_scripts.run(tmp_path / "nodes.py", tmp_path / "pack", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    count, using_triton = done.stdout.splitlines()[-1].split(maxsplit=1)
    assert int(count) > 20 and using_triton == "[]"


FIRST_CALLS = """
import sys, threading; sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
barrier, results = threading.Barrier(6), []
generator = torch.Generator().manual_seed(0)
tensors = [torch.randn(1, 2, 200, 32, generator=generator) for _ in range(3)]
def first():
    barrier.wait()
    from sla2_kernels import sla2_attention
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = sla2_attention(*leaves, sparsity=0.5, precision="int8")
    out.sum().backward()
    results.append([out.detach(), *(leaf.grad for leaf in leaves)])
threads = [threading.Thread(target=first) for _ in range(6)]
[t.start() for t in threads], [t.join() for t in threads]
print(len(results) == 6 and all(torch.equal(a, b) for other in results for a, b in zip(results[0], other)))
"""


def test_first_calls_of_several_threads_at_one_moment(tmp_path):
    """A fresh process, the import itself among what is raced for."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS, str(ROOT)], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.stdout.strip() == "True", done.stderr[-3000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_processes_that_compile_one_kernel_at_one_moment(tmp_path):
    """Several workers or a second server on a fresh machine: one cache folder, nothing in it yet."""
    command = [sys.executable, str(HERE / "compile_one_kernel.py"), str(tmp_path / "cache"), str(ROOT)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [worker.communicate(timeout=120)[0].split()[0] for worker in workers] == ["compiled"] * 3


def test_threads_with_calls_of_unlike_shapes_get_their_own_results():
    """As ComfyUI's MultiGPU: no state is shared between calls."""
    cases = [
        [torch.randn(1, 2, tokens, 32, generator=torch.Generator().manual_seed(tokens)) for _ in range(3)]
        for tokens in (65, 129, 200, 333)
    ]
    expected = [sla2_attention(*case, sparsity=0.5) for case in cases]
    wrong = []

    def work(number):
        for _ in range(6):
            if not torch.equal(sla2_attention(*cases[number], sparsity=0.5), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_without_any_gpu_a_call_runs_and_an_explicit_kernel_is_refused(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; from sla2_kernels import sla2_attention, default_precision\n"
        "x = torch.ones(1, 1, 130, 32)\n"
        "print(torch.isfinite(sla2_attention(x, x, x)).all().item(), default_precision('cpu'))\n"
        "try: sla2_attention(x, x, x, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    environment = clean_environment(CUDA_VISIBLE_DEVICES="")
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, env=environment, timeout=120
    )
    first, second = done.stdout.splitlines()
    assert first == "True 16bit" and "need an NVIDIA GPU" in second
