"""The demo in a real ComfyUI: the workflow "First look", dense and SLA2, in a server of its own."""

import asyncio
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import events, graph
from .environment import SetupError, say
from .outcome import Outcome, Run
from .paths import DEFAULT_OUTPUT, PACK_FOLDER, ROOT
from .server import Server

WORKFLOW = ROOT / "workflows" / "First look, nothing to download.json"


def generate(comfyui, folder, plan, checkpoint):
    """Runs the workflow in ``comfyui``; videos land in ``folder``. Raises SetupError or PromptFailed."""
    base = folder / "comfyui_base"
    lay_out(base, checkpoint)
    say(f"Starting ComfyUI ({comfyui})")
    with Server(comfyui, base, plan.device) as server:
        workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
        try:
            prompt = graph.to_prompt(workflow, server.get("/object_info"))
        except graph.GraphError as error:
            raise SetupError(f"{error} The end of {server.log}:\n{server.log_tail()}") from error
        prompt = graph.fit(prompt, plan)
        say("Queued the workflow")
        outputs, seconds = asyncio.run(events.run(server, prompt, Progress(prompt)))
    return collect(folder, base, plan, checkpoint, prompt, outputs, seconds)


def lay_out(base, checkpoint):
    """ComfyUI's own folders under ``base``: models, this pack with the miniature's captions, and convolutions that do not keep a CPU
    waiting. Old outputs are removed."""
    for name in ("output", "custom_nodes"):
        shutil.rmtree(base / name, ignore_errors=True)
    models = {
        "diffusion_models": [checkpoint.dit],
        "vae": [checkpoint.vae],
        "loras": [checkpoint.lora],
        "sla2": [checkpoint.router, checkpoint.lora_router],
    }
    for name in (*(f"models/{kind}" for kind in models), "custom_nodes", "input", "output", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    for kind, files in models.items():
        for file in filter(None, files):
            shutil.copy2(file, base / "models" / kind)
    pack = base / "custom_nodes" / PACK_FOLDER
    pack.mkdir()
    for source in pack_files():
        _copy(source, pack / source.name)
    (pack / "miniature").mkdir()
    for name in ("__init__.py", "captions.py"):
        shutil.copy2(ROOT / "miniature" / name, pack / "miniature")
    quick = base / "custom_nodes" / "quick_convolutions"
    quick.mkdir()
    shutil.copy2(ROOT / "tooling" / "quick_convolutions.py", quick)
    (quick / "__init__.py").write_text(
        "from .quick_convolutions import take_onednn\n\ntake_onednn()\nNODE_CLASS_MAPPINGS = {}\n", encoding="utf-8"
    )


def pack_files():
    """What the Registry would ship: files and folders of the root that .comfyignore does not leave out."""
    listed = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = {line.rstrip("/") for line in listed} | {DEFAULT_OUTPUT.name}
    return [path for path in sorted(ROOT.iterdir()) if path.name not in left_out and not path.name.startswith(".")]


def _copy(source, target):
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)


class Progress:
    """Prints what the server works on: a line per sampler and decoder, and one per quarter of the steps."""

    NAMES = {"KSampler": "sampling", "VAEDecode": "decoding"}

    def __init__(self, prompt):
        self.prompt = prompt
        self.said = None
        self.start = time.monotonic()

    def __call__(self, node, step, steps):
        what = self.NAMES.get(self.prompt.get(node, {}).get("class_type"))
        quarter = 4 * step // steps if steps else 0
        if what is None or (node, quarter) == self.said:
            return
        self.said = (node, quarter)
        done = f", step {step} of {steps}" if quarter else ""
        say(f"  {time.monotonic() - self.start:5.1f} s  {what} {graph.branch_of(self.prompt, node)}{done}")


def collect(folder, base, plan, checkpoint, prompt, outputs, seconds):
    """The Outcome, with the videos moved to ``folder``."""
    runs = {}
    for name, sampler in graph.samplers(prompt).items():
        decoders = [n for n in graph.of_class(prompt, "VAEDecode") if graph.branch_of(prompt, n) == name]
        runs[name] = Run(
            name,
            _take_video(folder, base, prompt, outputs, name),
            seconds.get(sampler, 0.0),
            sum(seconds.get(node, 0.0) for node in decoders),
        )
    for node in graph.of_class(prompt, "SLA2Report"):
        report = outputs[node]["sla2_report"][0]
        if report["run"] is not None:
            _fill(runs["sla2"], report)
    dense, sla2 = (_latent(base, outputs[f"latent_{name}"]) for name in ("dense", "sla2"))
    difference = ((sla2 - dense).norm() / dense.norm()).item()
    asked = "ComfyUI", plan.device, plan.tokens, plan.steps, plan.seed, checkpoint.trained
    return Outcome(*asked, [runs["dense"], runs["sla2"]], difference)


def _fill(run, report):
    run.sparse_calls, run.dense_calls, run.notes = report["sparse_calls"], report["dense_calls"], report["notes"]
    shares = [layer["sparsity"] for layer in report["layers"] if layer["sparsity"] is not None]
    run.sparsity = sum(shares) / len(shares) if shares else None
    for layer in report["layers"]:
        for reason, count in layer["dense"].items():
            run.reasons[reason] = run.reasons.get(reason, 0) + count


def _files(entry):
    """Saved files that one node's history entry lists, whatever key the node lists them under."""
    for listed in entry.values():
        for item in listed if isinstance(listed, list) else ():
            if isinstance(item, dict) and "filename" in item and item.get("type", "output") == "output":
                yield Path(item.get("subfolder", "")) / item["filename"]


def _take_video(folder, base, prompt, outputs, name):
    """Moves the first video of one branch to ``folder`` under the branch's name; returns its file name."""
    for node, entry in outputs.items():
        if prompt[node]["class_type"] == "SaveLatent" or graph.branch_of(prompt, node) != name:
            continue
        for file in _files(entry):
            target = folder / f"{name}{file.suffix}"
            shutil.move(base / "output" / file, target)
            return target.name
    raise RuntimeError(f"The workflow saved no video of its {name} branch.")


def _latent(base, entry):
    path = base / "output" / next(_files(entry))
    return load_file(path)["latent_tensor"].to(torch.float64)
