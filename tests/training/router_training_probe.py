"""Runs in a process of its own, with ComfyUI on the path: SLA2 Train Router's training on tiny models of ComfyUI's own classes,
then its file saved, loaded and used. Prints one line of JSON. Started by test_router_training_families.py:

    python router_training_probe.py COMFYUI REPOSITORY FOLDER FAMILY ...
"""

import gc
import json
import sys
import weakref
from pathlib import Path

comfyui, repository, folder, *wanted = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path[:0] = [comfyui, str(Path(repository) / "tests" / "comfyui")]

from comfy.cli_args import args

args.cpu = True

import comfy.model_patcher
import comfy.ops
import torch
from family_models import FAMILIES, build, class_of, inputs_for
from model_host import Host, pack_loader, sample

pack_module = pack_loader(Path(repository))
SPARSITY, STEPS = 0.5, 8


def trained(patcher, facts, inputs):
    """RouterTraining of two sampling passes and one that measures, each of two steps."""
    made = pack_module("nodes.training.router_training")
    options = pack_module("sla2_training").TrainerOptions(query_blocks=2)
    trainer = made.make_trainer(facts, (SPARSITY,), options, None)
    training = made.RouterTraining(patcher, facts, trainer, made.Schedule(STEPS, 2), lambda text: None)

    def sample_once(number, callback):
        for step, sigma in enumerate((1.0, 0.5)):
            sample(training.model, inputs, sigma)
            callback(step)

    training.run(sample_once, lambda: None)
    return training


def probe(name):
    path, arguments, inputs, *_ = FAMILIES[name]
    cls = class_of(path)
    if cls is None:
        return {"missing": True}
    model = build(cls, arguments, comfy.ops.disable_weight_init)
    patcher = comfy.model_patcher.ModelPatcher(Host(model), torch.device("cpu"), torch.device("cpu"))
    facts = pack_module("nodes.attention.model_families").model_facts(model)
    inputs = inputs_for(cls, inputs)
    plain = sample(patcher, inputs)
    training = trained(patcher, facts, inputs)
    file = Path(folder) / f"{name.replace(' ', '_')}.safetensors"
    training.trainer.router().save(file)
    router = pack_module("sla2_kernels.weights").load_router(file)
    settings = pack_module("nodes.settings.values").AttentionSettings(
        sparsity=SPARSITY, precision="16bit", minimum_tokens=0
    )
    patched = pack_module("nodes.attention.patching").install(patcher, settings, router)
    out = sample(patched, inputs)
    (run,) = patched.get_attachment("sla2").runs.finished()
    found = {
        "family": router.model_family,
        "layers": router.num_layers,
        "steps": training.trainer.steps,
        "untrained": training.untrained,
        "measured": sorted(training.trainer.report().errors),
        "moved": [float((layer.proj_q - torch.eye(facts.head_dim)).abs().max()) for layer in router.layers],
        "sparse": [record.sparse for record in run.layers.values()],
        "ratios": [layer.alpha_logits is not None for layer in router.layers],
        "difference": float((out - plain).norm() / plain.norm()),
    }
    gc.disable()
    model = weakref.ref(training.model)
    del training
    found["freed"] = model() is None
    gc.enable()
    return found


print(json.dumps({name: probe(name) for name in wanted}))
