"""What only a GPU can show: each check says "ok" and what it saw, or "FAILED" and why; the exit code is 1 if one failed.

    python -m benchmarks.gpu_checks                      the operator
    python -m benchmarks.gpu_checks --comfyui PATH       also ComfyUI's own Wan class with the miniature's weights:
                                                         torch.compile of the whole model, memory that really runs out,
                                                         and dynamic VRAM
Needs no checkpoint but the miniature's. Checks of the operator that a CPU can make are in tests/.
"""

import argparse
import os
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch

from sla2_kernels import sla2_attention
from sla2_kernels.reference import sla2_reference
from tooling.comfyui import find_comfyui

from .measure import environment, median_ms
from .miniature_in_comfyui import MiniatureInComfyUI

# as in docs: relative error against float64 on data without structure
BOUNDS = {"16bit": 1e-2, "int8": 6e-2, "fp8": 1e-1}
LATENT = (21, 40, 40)  # of the miniature: 8,400 tokens
CAPTION = "a red ball and a blue cube over a grey floor"
SIGMAS = 4


class CheckFailed(AssertionError):
    """A check saw something else than it must."""


def require(condition, what):
    if not condition:
        raise CheckFailed(what)


def random_qkv(tokens, heads, head_dim=128, dtype=torch.bfloat16, seed=0, batch=1):
    """(B, N, H, D) views, as ComfyUI hands them over."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return tuple(
        torch.randn(batch, tokens, heads, head_dim, device="cuda", dtype=dtype, generator=generator) for _ in range(3)
    )


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


def threads_launch_for_the_first_time():
    """Six threads make the first call of the process at once, with an empty cache of kernels."""
    inputs = random_qkv(2500, 2, seed=1)
    gate, outs, errors = threading.Barrier(6), {}, []

    def work(number):
        try:
            gate.wait()
            outs[number] = sla2_attention(*inputs, sparsity=0.9, layout="BNHD", backend="triton")
            torch.cuda.synchronize()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    require(not errors, f"a thread failed: {errors[:1]}")
    alone = sla2_attention(*inputs, sparsity=0.9, layout="BNHD", backend="triton")
    require(all(torch.equal(out, alone) for out in outs.values()), "threads got other results than one call alone")
    return "6 threads, all bits equal"


def few_tokens():
    """Counts that are 1 (which Triton compiles apart), ragged ends, all dtypes and precisions, against float64."""
    worst = dict.fromkeys(BOUNDS, 0.0)
    for tokens in (1, 63, 64, 65, 128, 129, 1000):
        for dtype in (torch.bfloat16, torch.float16):
            inputs = random_qkv(tokens, 1, dtype=dtype, seed=tokens)
            expected, _ = sla2_reference(*(x.transpose(1, 2) for x in inputs), sparsity=0.5)
            for precision in BOUNDS:
                out = sla2_attention(*inputs, sparsity=0.5, layout="BNHD", precision=precision, backend="triton")
                error = relative_error(out.transpose(1, 2), expected)
                worst[precision] = max(worst[precision], error)
                require(error < BOUNDS[precision], f"{tokens} tokens, {dtype}, {precision}: error {error:.2e}")
    return "largest errors " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items())


def intermediates_beyond_32_bits():
    """Inputs and intermediates of more than 2^31 elements: the last heads equal a call of these heads alone."""
    tokens, heads = 430_000, 40
    inputs = random_qkv(tokens, heads, seed=2)
    require(inputs[0].numel() > 2**31, "the input is too small for this check")
    out = sla2_attention(*inputs, sparsity=0.97, layout="BNHD", backend="triton")
    alone = sla2_attention(*(x[:, :, -2:] for x in inputs), sparsity=0.97, layout="BNHD", backend="triton")
    require(torch.equal(out[:, :, -2:], alone), "the last heads differ from a call of these heads alone")
    require(bool(torch.isfinite(out[:, -1]).all()), "NaN or infinity in the last row")
    return f"{inputs[0].numel():,} elements, all bits equal"


def cuda_graph():
    """A captured call replays on new contents with the bits of an ordinary call, for every precision and ratio."""
    for precision in BOUNDS:
        for alpha in (None, torch.full((4,), 0.8, device="cuda")):
            static = random_qkv(5000, 4, seed=3)

            def call(inputs, precision=precision, alpha=alpha):
                return sla2_attention(
                    *inputs, alpha=alpha, sparsity=0.9, layout="BNHD", precision=precision, keep_diagonal=True
                )

            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                call(static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = call(static)
            for place, fresh in zip(static, random_qkv(5000, 4, seed=4), strict=True):
                place.copy_(fresh)
            graph.replay()
            torch.cuda.synchronize()
            require(torch.equal(captured, call(static)), f"{precision}: the replay differs from a call")
    return "all precisions, learned and estimated ratio, all bits equal"


def compiled_around_it():
    """torch.compile with fullgraph, and with CUDA graphs: one operator, its output equal to the uncompiled module's."""
    layer = torch.nn.Linear(512, 3 * 512, device="cuda", dtype=torch.bfloat16)

    def module(x):
        q, k, v = layer(x).unflatten(-1, (3, 4, 128)).unbind(2)
        return sla2_attention(q, k, v, sparsity=0.9, layout="BNHD", keep_diagonal=True).flatten(2)

    x = torch.randn(1, 3000, 512, device="cuda", dtype=torch.bfloat16)
    said = []
    with torch.no_grad():
        expected = module(x).double()
        for mode in ("default", "reduce-overhead"):
            compiled = torch.compile(module, fullgraph=True, mode=mode)
            for _ in range(3):
                out = compiled(x).clone()
            error = relative_error(out, expected)
            require(error < 1e-2, f"mode {mode}: differs by {error:.2e}")
            said.append(f"{mode} {error:.1e}")
    return "difference to eager: " + ", ".join(said)


def cost_of_the_diagonal():
    """Milliseconds with and without each query block's own key blocks, skips 97%, int8, learned ratio."""
    said = []
    for name, tokens, heads in (("1.3B-480p", 32760, 12), ("14B-720p", 75600, 40)):
        inputs, alpha = random_qkv(tokens, heads, seed=5), torch.full((heads,), 0.8, device="cuda")
        times = [
            median_ms(
                lambda kept=kept, inputs=inputs, alpha=alpha: sla2_attention(
                    *inputs, alpha=alpha, sparsity=0.97, layout="BNHD", precision="int8", keep_diagonal=kept
                ),
                "cuda",
            )
            for kept in (False, True)
        ]
        said.append(f"{name} {times[0]:.3f} -> {times[1]:.3f} ms")
    return ", ".join(said)


def in_comfyui(comfyui):
    """(name, function) of the checks on ComfyUI's own model class; they share one load, dynamic VRAM comes last."""
    miniature = MiniatureInComfyUI(comfyui, "cuda")
    state = {}

    def patched_by_sla2(model):
        return miniature.patched(model, miniature.router(), sparsity=0.9)

    def sample(model):
        return miniature.sample(model, torch.linspace(1, 0.2, SIGMAS), "euler", CAPTION, 3.0, seed=0, latent=LATENT)

    def sparse_beside_dense():
        """Sampling with SLA2: every self-attention call sparse, a plain run bit-equal before and after."""
        state["model"] = model = miniature.load()
        # the first run of all differs from the second by itself
        sample(model)
        before, patched = sample(model), patched_by_sla2(model)
        state["sparse"] = sample(patched)
        sparse, dense, reasons = miniature.counts(patched)
        require(sparse > 0 and dense == 0, f"{sparse} sparse and {dense} dense calls: {reasons}")
        require(torch.equal(before, sample(model)), "a plain run after it has other bits than before")
        require(torch.equal(state["sparse"], sample(patched)), "the second sparse run has other bits")
        return f"{sparse} calls sparse; distance to dense {relative_error(state['sparse'], before):.3f}"

    def whole_model_compiled():
        """TorchCompileModel's own helper around the patched model."""
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        model = patched_by_sla2(state["model"])
        set_torch_compile_wrapper(model, backend="inductor")
        out = sample(model)
        sparse, dense, reasons = miniature.counts(model)
        require(sparse > 0 and dense == 0, f"{sparse} sparse and {dense} dense calls: {reasons}")
        error = relative_error(out, state["sparse"])
        require(error < 0.05, f"differs from the uncompiled model by {error:.3f}")
        return f"{sparse} calls sparse, differs from the uncompiled model by {error:.1e}"

    def memory_runs_out():
        """A real torch.OutOfMemoryError inside the operator: the step goes on dense, and says so."""
        model = patched_by_sla2(state["model"])
        attention = miniature.module("nodes.sparse_call")
        operator, calls = attention.sla2_attention, []

        def greedy(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                torch.empty(2**42, dtype=torch.uint8, device="cuda")
            return operator(*args, **kwargs)

        attention.sla2_attention = greedy
        try:
            out = sample(model)
        finally:
            attention.sla2_attention = operator
        sparse, dense, reasons = miniature.counts(model)
        require(dense > 0 and any("memory ran out" in reason for reason in reasons), f"dense reasons: {reasons}")
        require(sparse > dense and bool(torch.isfinite(out).all()), f"{sparse} sparse, {dense} dense")
        return f"{dense} calls of that step dense, {sparse} sparse: {reasons[0]}"

    def dynamic_vram():
        """ModelPatcherDynamic, ComfyUI's default on NVIDIA cards: sparse calls, a plain run bit-equal before and after."""
        import comfy.memory_management
        import comfy.model_management
        import comfy.model_patcher
        import comfy_aimdo.control

        state.clear()
        require(comfy_aimdo.control.init_devices([(0, 0)]), "comfy-aimdo does not start here")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
        model = miniature.load()
        require(model.is_dynamic(), "ComfyUI loaded it without dynamic VRAM")
        sample(model)
        before, patched = sample(model), patched_by_sla2(model)
        out = sample(patched)
        sparse, dense, reasons = miniature.counts(patched)
        require(sparse > 0 and dense == 0, f"{sparse} sparse and {dense} dense calls: {reasons}")
        require(torch.equal(before, sample(model)), "a plain run after it has other bits than before")
        return f"{sparse} calls sparse; distance to dense {relative_error(out, before):.3f}"

    return [sparse_beside_dense, whole_model_compiled, memory_runs_out, dynamic_vram]


OPERATOR = [
    threads_launch_for_the_first_time,
    few_tokens,
    cuda_graph,
    compiled_around_it,
    intermediates_beyond_32_bits,
    cost_of_the_diagonal,
]


def run(checks):
    """Runs and says each; the names of those that failed."""
    failed = []
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            print(f"ok      {name}: {check()}", flush=True)
        except Exception as error:
            failed.append(name)
            if not isinstance(error, CheckFailed):
                traceback.print_exc()
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
        torch.cuda.empty_cache()
    return failed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", nargs="?", const=find_comfyui()[1], type=Path, help="folder of a ComfyUI checkout")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_checks needs an NVIDIA GPU: this machine has none that PyTorch can use.")
    print(", ".join(f"{name} {value}" for name, value in environment("cuda").items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # empty, so that the first call compiles; Triton reads the variable then
        os.environ["TRITON_CACHE_DIR"] = folder
        failed = run(OPERATOR + (in_comfyui(args.comfyui) if args.comfyui else []))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
