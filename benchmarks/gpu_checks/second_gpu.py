"""Models and tensors on a second GPU while the first one is current, as ComfyUI's nodes for several GPUs leave it.

Everything is compared bit by bit with the same on the first GPU, which must be of the same model.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from sla2_kernels import sla2_attention
from sla2_kernels.support import on_device
from sla2_training import RouterTrainer

from . import in_comfyui
from .checks import BOUNDS, no_second_gpu, relative_error, require

ROOT = Path(__file__).resolve().parents[2]
DEVICES = torch.device("cuda", 0), torch.device("cuda", 1)
TOKENS, HEADS = (2500, 1000, 5000), 4
ROUNDS = 4  # of the calls that take turns
TRAINING_STEPS = 6


def missing(comfyui):
    """None, or why the group cannot run."""
    return no_second_gpu()


def checks(comfyui):
    """Those in ComfyUI come last, and only where a checkout is given."""
    found = [
        forward_beside_the_current_device,
        backward_beside_the_current_device,
        calls_that_take_turns,
        a_thread_for_each_device,
        router_training,
        a_gpu_changed_between_runs,
        heads_copied_between_gpus,
    ]
    if comfyui is None:
        return found

    def miniature_in_comfyui():
        """Its latents, plain and with SLA2, of a model loaded for the second GPU."""
        return in_comfyui_on_both(in_comfyui.started(comfyui, DEVICES[0].type))

    def guidance_shared_by_both():
        """ComfyUI's MultiGPU: a thread of each GPU computes its half of guidance."""
        return multi_gpu(in_comfyui.started(comfyui, DEVICES[0].type))

    return [*found, miniature_in_comfyui, guidance_shared_by_both]


def on_both(compute):
    """compute(device): tensors. Called for the first device, the second, the first again: all three must give the same bits,
    and leave the first one current. Returns the first's tensors, on the CPU."""
    results = []
    for device in (*DEVICES, DEVICES[0]):
        results.append([tensor.detach().cpu() for tensor in compute(device)])
        require_first_is_current()
    first, second, again = results
    require(all(bool(torch.isfinite(tensor).all()) for tensor in first), "NaN or infinity on the first device")
    require(not differences(first, again), "the first device gives other bits the second time: nothing can be compared")
    require(not differences(first, second), f"the second device differs by {differences(first, second)}")
    return first


def differences(tensors, others):
    """Relative errors of those that are not equal."""
    pairs = zip(tensors, others, strict=True)
    return [relative_error(a, b.double()) for a, b in pairs if not torch.equal(a, b)]


def require_first_is_current():
    if DEVICES[0].type == "cuda":
        current = torch.cuda.current_device()
        require(current == DEVICES[0].index, f"device {current} is current afterwards, not {DEVICES[0].index}")


def drawn(*shape, device, dtype=torch.bfloat16, seed=0):
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def qkv(device, tokens, head_dim=128):
    return [drawn(1, tokens, HEADS, head_dim, device=device, seed=seed) for seed in range(3)]


def forward_beside_the_current_device():
    """All precisions and ratios, with and without the diagonal; then router weights that were left on the first device."""
    count = 0
    for precision in BOUNDS:
        for learned in (False, True):
            for kept in (False, True):

                def forward(device, precision=precision, learned=learned, kept=kept):
                    alpha = torch.full((HEADS,), 0.8, device=device) if learned else None
                    options = {"precision": precision, "keep_diagonal": kept, "return_alpha": True}
                    return sla2_attention(*qkv(device, TOKENS[0]), alpha=alpha, **options, sparsity=0.9, layout="BNHD")

                on_both(forward)
                count += 1

    weights = [drawn(HEADS, 128, 128, device=DEVICES[0], dtype=torch.float32, seed=9) / 11 for _ in range(2)]
    ratio = torch.full((HEADS,), 0.7, device=DEVICES[0])
    on_both(lambda device: [sla2_attention(*qkv(device, TOKENS[0]), *weights, ratio, sparsity=0.9, layout="BNHD")])
    return f"{count + 1} kinds of call, all bits equal"


def backward_beside_the_current_device():
    """Gradients of q, k, v and the ratio."""
    for precision in BOUNDS:
        for learned in (False, True):

            def gradients(device, precision=precision, learned=learned):
                leaves = [tensor.requires_grad_() for tensor in qkv(device, TOKENS[0])]
                alpha = torch.full((HEADS,), 0.8, device=device, requires_grad=True) if learned else None
                out = sla2_attention(*leaves, alpha=alpha, sparsity=0.9, layout="BNHD", precision=precision)
                leaves += [alpha] if learned else []
                return torch.autograd.grad(out, leaves, drawn(*out.shape, device=device, seed=5))

            on_both(gradients)
    return "all precisions, learned and estimated ratio, all bits equal"


def calls_that_take_turns():
    """Calls of several lengths on alternating devices, with either one current: plans and kernels belong to a device."""

    def call(device, tokens):
        return sla2_attention(*qkv(device, tokens), sparsity=0.9, layout="BNHD").cpu()

    expected, count = {tokens: call(DEVICES[0], tokens) for tokens in TOKENS}, 0
    for current in DEVICES:
        with on_device(current):
            for turn in range(ROUNDS * len(TOKENS)):
                device, tokens = DEVICES[turn % 2], TOKENS[turn % len(TOKENS)]
                same = torch.equal(call(device, tokens), expected[tokens])
                require(same, f"{tokens} tokens on {device} with {current} current: other bits than alone")
                count += 1
    require_first_is_current()
    return f"{count} calls, all bits equal"


def a_thread_for_each_device():
    """Both launch at once for head_dim 64, which nothing called before; neither makes its device the current one."""
    gate, outs, errors = threading.Barrier(2), {}, []
    inputs = {number: qkv(device, TOKENS[0], head_dim=64) for number, device in enumerate(DEVICES)}

    def work(number):
        try:
            gate.wait()
            calls = [sla2_attention(*inputs[number], sparsity=0.9, layout="BNHD") for _ in range(20)]
            outs[number] = [out.cpu() for out in calls]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    require(not errors, f"a thread failed: {errors[:1]}")
    alone = sla2_attention(*inputs[0], sparsity=0.9, layout="BNHD").cpu()
    require(all(torch.equal(out, alone) for calls in outs.values() for out in calls), "a thread got other bits")
    return f"{sum(map(len, outs.values()))} calls, all bits equal"


@contextlib.contextmanager
def deterministic():
    """Sums without atomics, where torch has them; what has none is only warned of, and on_both() sees it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def router_training():
    """A few steps of stage 1, and the errors measured after them."""
    seen = {}

    def trained(device):
        trainer = RouterTrainer("wan", 1, HEADS, 128, sparsities=(0.95, 0.9))
        for step in range(TRAINING_STEPS):
            q, k, v = (drawn(1, TOKENS[0], HEADS, 128, device=device, seed=10 * step + i) for i in range(3))
            trainer.observe(0, q, k, v, layout="BNHD")
        trainer.evaluate(0, q, k, v, layout="BNHD")
        seen["losses"], layer = trainer.losses[0], trainer.router().layers[0]
        errors = [torch.tensor(squared) for squared in trainer.errors[0].squared.values()]
        return [layer.proj_q, layer.proj_k, layer.alpha_logits, torch.tensor(trainer.losses[0]), *errors]

    with deterministic():
        on_both(trained)
    return f"loss {seen['losses'][0]:.4f} -> {seen['losses'][-1]:.4f}, projections, ratios and errors bit-equal"


def a_gpu_changed_between_runs():
    """Two processes, each with another GPU as its only one, and one cache of kernels; then the first GPU once more."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2]
    command, checksums = [sys.executable, "-m", "benchmarks.gpu_checks.one_call"], []
    with tempfile.TemporaryDirectory() as cache:
        for gpu in (*visible, visible[0]):
            variables = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "TRITON_CACHE_DIR": cache}
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)  # noqa: S603  itself
            require(done.returncode == 0, f"the process on GPU {gpu} failed: {done.stderr[-500:]}")
            checksums.append(done.stdout.strip())
    require(len(set(checksums)) == 1, f"the processes got other bits: {[checksum[:8] for checksum in checksums]}")
    return f"3 processes on GPUs {visible[0]}, {visible[1]}, {visible[0]}: all bits equal"


def heads_copied_between_gpus():
    """Two processes that share sequences, a GPU each: see shared_sequence.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "benchmarks.gpu_checks.shared_sequence"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)  # noqa: S603  itself
    require(done.returncode == 0, f"a process failed: {done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1]


def in_comfyui_on_both(miniature):
    """See checks(): miniature_in_comfyui."""
    calls = []

    def latents(device):
        model = miniature.load(device)
        # the first run of all differs from the second by itself
        in_comfyui.sampled(miniature, model)
        sparse_model = in_comfyui.patched(miniature, model)
        found = in_comfyui.sampled(miniature, model), in_comfyui.sampled(miniature, sparse_model)
        calls.append(in_comfyui.all_sparse(miniature, sparse_model))
        return found

    dense, sparse = on_both(latents)
    return f"{calls[1]} calls sparse, all bits equal; distance to dense {relative_error(sparse, dense):.3f}"


def multi_gpu(miniature):
    """See checks(): guidance_shared_by_both. SLA2 before and after the node that shares out the work."""
    from comfy.multigpu import create_multigpu_deepclones

    module = miniature.module("nodes.attention.sparse_call")
    operator, seen, said = module.sla2_attention, [], []

    def watched(q, *args, **kwargs):
        seen.append(q.device)
        return operator(q, *args, **kwargs)

    alone = in_comfyui.sampled(miniature, in_comfyui.patched(miniature, miniature.load(DEVICES[0])))
    module.sla2_attention = watched
    try:
        for order in ("before", "after"):
            model = miniature.load(DEVICES[0])
            if order == "before":
                model = create_multigpu_deepclones(in_comfyui.patched(miniature, model), 2)
            else:
                model = in_comfyui.patched(miniature, create_multigpu_deepclones(model, 2))
            seen.clear()
            error = relative_error(in_comfyui.sampled(miniature, model), alone)
            calls = in_comfyui.all_sparse(miniature, model)
            counts = [seen.count(device) for device in DEVICES]
            require(counts[0] == counts[1] > 0, f"SLA2 {order} MultiGPU: {counts} sparse calls on the two devices")
            require(error < 0.05, f"SLA2 {order} MultiGPU: differs from one GPU's latents by {error:.3f}")
            said.append(f"SLA2 {order} it: {calls} calls sparse, differs from one GPU by {error:.1e}")
    finally:
        module.sla2_attention = operator
    require_first_is_current()
    return "; ".join(said)
