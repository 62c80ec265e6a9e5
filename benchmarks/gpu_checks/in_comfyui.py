"""ComfyUI's own Wan class with the miniature's weights: torch.compile of the whole model, memory that really runs out, dynamic VRAM."""

import functools

import torch

from ..miniature_in_comfyui import MiniatureInComfyUI
from .checks import no_second_gpu, relative_error, require

LATENT = (21, 40, 40)  # of the miniature: 8,400 tokens
CAPTION = "a red ball and a blue cube over a grey floor"
SIGMAS = 4


def missing(comfyui):
    """None, or why the group cannot run. comfyui: folder of a checkout, or None."""
    return "--comfyui PATH is not given" if comfyui is None else None


@functools.cache
def started(comfyui, device):
    """The MiniatureInComfyUI of this process, its default device "cuda" or "cpu"."""
    return MiniatureInComfyUI(comfyui, device)


def patched(miniature, model):
    """A clone with SLA2 and the miniature's router, skips 90%."""
    return miniature.patched(model, miniature.router(), sparsity=0.9)


def sampled(miniature, model):
    """Latents (1, 16, *LATENT), float64."""
    return miniature.sample(model, torch.linspace(1, 0.2, SIGMAS), "euler", CAPTION, 3.0, seed=0, latent=LATENT)


def all_sparse(miniature, model):
    """Number of self-attention calls of the patched model's last run, none of them dense."""
    sparse, dense, reasons = miniature.counts(model)
    require(sparse > 0 and dense == 0, f"{sparse} sparse and {dense} dense calls: {reasons}")
    return sparse


def checks(comfyui):
    """They share one load; dynamic VRAM comes last."""
    miniature, state = started(comfyui, "cuda"), {}
    patched_by_sla2, sample = functools.partial(patched, miniature), functools.partial(sampled, miniature)

    def sparse_beside_dense():
        """Sampling with SLA2: every self-attention call sparse, a plain run bit-equal before and after."""
        state["model"] = model = miniature.load()
        # the first run of all differs from the second by itself
        sample(model)
        before, sparse_model = sample(model), patched_by_sla2(model)
        state["sparse"] = sample(sparse_model)
        calls = all_sparse(miniature, sparse_model)
        require(torch.equal(before, sample(model)), "a plain run after it has other bits than before")
        require(torch.equal(state["sparse"], sample(sparse_model)), "the second sparse run has other bits")
        return f"{calls} calls sparse; distance to dense {relative_error(state['sparse'], before):.3f}"

    def whole_model_compiled():
        """TorchCompileModel's own helper around the patched model."""
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        model = patched_by_sla2(state["model"])
        set_torch_compile_wrapper(model, backend="inductor")
        out = sample(model)
        calls = all_sparse(miniature, model)
        error = relative_error(out, state["sparse"])
        require(error < 0.05, f"differs from the uncompiled model by {error:.3f}")
        return f"{calls} calls sparse, differs from the uncompiled model by {error:.1e}"

    def memory_runs_out():
        """A real torch.OutOfMemoryError inside the operator: the step goes on dense, and says so."""
        model = patched_by_sla2(state["model"])
        attention = miniature.module("nodes.attention.sparse_call")
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
        devices = [(index, 0) for index in range(torch.cuda.device_count())]
        require(comfy_aimdo.control.init_devices(devices), "comfy-aimdo does not start here")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
        model = miniature.load()
        require(model.is_dynamic(), "ComfyUI loaded it without dynamic VRAM")
        sample(model)
        before, sparse_model = sample(model), patched_by_sla2(model)
        state["dynamic"] = sample(sparse_model)
        calls = all_sparse(miniature, sparse_model)
        require(torch.equal(before, sample(model)), "a plain run after it has other bits than before")
        return f"{calls} calls sparse; distance to dense {relative_error(state['dynamic'], before):.3f}"

    def dynamic_vram_on_the_second_gpu():
        """A model loaded for it while the first one is current: the same bits."""
        model = miniature.load(torch.device("cuda", 1))
        require(model.is_dynamic(), "ComfyUI loaded it without dynamic VRAM")
        sample(model)
        sparse_model = patched_by_sla2(model)
        out = sample(sparse_model)
        calls = all_sparse(miniature, sparse_model)
        require(torch.equal(out, state["dynamic"]), f"differs by {relative_error(out, state['dynamic']):.1e}")
        return f"{calls} calls sparse, all bits equal"

    found = [sparse_beside_dense, whole_model_compiled, memory_runs_out, dynamic_vram]
    return found + [dynamic_vram_on_the_second_gpu] * (no_second_gpu() is None)
