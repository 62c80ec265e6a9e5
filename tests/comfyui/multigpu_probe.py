"""Runs in a process of its own, with ComfyUI on the path: SLA2 with ComfyUI's MultiGPU CFG Split on two devices that are both
the CPU. Scheduler, threads and copies of the model are ComfyUI's own. Prints one line of JSON. Started by test_multigpu.py:

    python multigpu_probe.py COMFYUI REPOSITORY WEIGHTS ROUTER
"""

import importlib.util
import json
import sys
from pathlib import Path

comfyui, repository, weights, router_file = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, comfyui)

from comfy.cli_args import args

args.cpu = True

import comfy.model_management
import comfy.sample
import comfy.sd
import torch
from model_host import pack_loader

pack_module = pack_loader(Path(repository))
patching, settings = pack_module("nodes.attention.patching"), pack_module("nodes.settings.values")
report_text, sparse_call = pack_module("nodes.runs.report_text"), pack_module("nodes.attention.sparse_call")
router_class = pack_module("sla2_kernels")
DEVICES = [torch.device("cpu"), torch.device("cpu", 1)]
STEPS = 10  # more than a run whose every call fits its ratio
TEXTS = [torch.randn(1, 16, 4096, generator=torch.Generator().manual_seed(seed)) * 0.1 for seed in (1, 4)]


def sla2(model, learned):
    chosen = settings.AttentionSettings(sparsity=0.75, precision="16bit", minimum_tokens=0)
    return patching.install(model, chosen, router_class.load_router(router_file) if learned else None)


def split(model):
    """What the node MultiGPU CFG Split does, with two devices."""
    from comfy.multigpu import create_multigpu_deepclones

    before = comfy.model_management.get_all_torch_devices
    comfy.model_management.get_all_torch_devices = lambda exclude_current=False: DEVICES
    try:
        return create_multigpu_deepclones(model, 2)
    finally:
        comfy.model_management.get_all_torch_devices = before


def run(model):
    """Latents of one sampling of 192 tokens with guidance, as the KSampler node does it."""
    latent = torch.zeros(1, 16, 3, 16, 16)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    conditions = [[[text, {}]] for text in TEXTS]
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, STEPS, 3.0, "euler", "simple", *conditions, latent, disable_pbar=True, seed=3
        )


class Watched:
    """Which threads call the operator, and the ratios that fitting calls found: by layer, those of one half of guidance each."""

    def __init__(self):
        import threading

        self.threads, self.ratios, self._thread = {}, [], threading.current_thread
        self._operators = sparse_call.sla2_attention, sparse_call.fitted_attention
        sparse_call.sla2_attention, sparse_call.fitted_attention = self._watch, self._watch_fitted

    def _watch(self, *arguments, **options):
        self._count()
        return self._operators[0](*arguments, **options)

    def _watch_fitted(self, *arguments, **options):
        self._count()
        found = self._operators[1](*arguments, **options)
        self.ratios += [row.tolist() for row in found.ratio]
        return found

    def _count(self):
        name = self._thread().name
        self.threads[name] = self.threads.get(name, 0) + 1

    def stop(self):
        sparse_call.sla2_attention, sparse_call.fitted_attention = self._operators


def found(model):
    """One run of a model: its latents, what the operator was called with, and what its record says."""
    watched = Watched()
    try:
        latents = run(model)
    finally:
        watched.stop()
    hook = model.get_attachment("sla2")
    (*_, record) = hook.runs.finished()
    layers = record.layers.values()
    return latents, {
        "calls by thread": sorted(watched.threads.values()),
        "ratios": sorted(watched.ratios),
        "sparse": sum(layer.sparse for layer in layers),
        "dense": sum(layer.dense.total() for layer in layers),
        "pairs": sum(layer.all_pairs for layer in layers),
        "skipped": record.sparsity,
        "model calls": record.model_calls,
        "ranges": [layer.ratio_range for layer in layers],
        "attention error": record.attention_error,
        "notes": list(record.notes),
        "text": report_text.report_text(hook, record),
        "runs": len(hook.runs.finished()),
    }


def compared(learned):
    model = comfy.sd.load_diffusion_model(weights)
    expected, alone = found(sla2(model, learned))
    results = {"alone": alone}
    orders = {"before": lambda: split(sla2(model, learned)), "after": lambda: sla2(split(model), learned)}
    for order, made in orders.items():
        latents, results[order] = found(made())
        results[order]["apart"] = ((latents - expected).norm() / expected.norm()).item()
    return results


if importlib.util.find_spec("comfy.multigpu") is None:
    print(json.dumps(None))
else:
    print(json.dumps({"learned": compared(True), "fitted": compared(False)}))
