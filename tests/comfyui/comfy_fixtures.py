"""One real ComfyUI server for all tests of a process: the pack and the helper nodes linked in, tiny random models."""

import json
import secrets
from pathlib import Path

import pytest
import safetensors.torch
from comfy_scripts import ComfyScripts
from comfy_server import PACK, PACK_FOLDER, ComfyServer, error_of
from safetensors import safe_open
from tiny_wan import break_metadata, save_router, save_wan


@pytest.fixture(scope="session")
def comfy(comfyui_path, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfy")
    for folder in ("models/diffusion_models", "models/sla2", "custom_nodes", "input", "output", "user/default"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / PACK_FOLDER).symlink_to(PACK, target_is_directory=True)
    (base / "custom_nodes" / "sla2_test_helpers").symlink_to(
        Path(__file__).parent / "helper_nodes", target_is_directory=True
    )
    # the minimap is drawn all the time, which is half of what a page at rest costs
    settings = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
    (base / "user/default/comfy.settings.json").write_text(json.dumps(settings))
    save_wan(base / "models/diffusion_models/tiny_wan.safetensors")
    save_wan(base / "models/diffusion_models/tiny_wan_i2v.safetensors", in_dim=36, image=True, seed=1)
    save_wan(base / "models/diffusion_models/tiny_vace.safetensors", vace=True, seed=2)
    write_routers(base / "models/sla2")
    server = ComfyServer(comfyui_path, base)
    yield Comfy(server, base)
    server.stop()


@pytest.fixture(scope="session")
def comfy_scripts(comfyui_path, tmp_path_factory):
    """comfy_scripts.run("script.py", ...): a script on ComfyUI's classes, without the seconds of importing them."""
    scripts = ComfyScripts(comfyui_path, tmp_path_factory.mktemp("scripts"))
    yield scripts
    scripts.stop()


def write_routers(folder):
    good = folder / "good.safetensors"
    save_router(good)
    save_router(folder / "other_layers.safetensors", layers=4)
    save_router(folder / "other_heads.safetensors", num_heads=3)
    save_router(folder / "other_head_dim.safetensors", head_dim=64)
    save_router(folder / "other_family.safetensors", model_family="ltx")
    save_router(folder / "other_order.safetensors")
    break_metadata(folder / "other_order.safetensors", token_order="hilbert")
    (folder / "truncated.safetensors").write_bytes(good.read_bytes()[:-1000])
    (folder / "no_safetensors.safetensors").write_bytes(b"this is no safetensors file at all, only words")
    tensors = safetensors.torch.load_file(good)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] = float("nan")
    with safe_open(good, "pt") as file:
        safetensors.torch.save_file(tensors, folder / "nan_inside.safetensors", file.metadata())


class Comfy:
    """Prompts in the API's format, built node by node."""

    def __init__(self, server, base):
        self.server, self.base = server, base

    def run(self, prompt):
        entry = self.server.run(prompt)
        error = error_of(entry)
        assert error is None, error
        return entry["outputs"]

    def error(self, prompt):
        """The message a failing prompt leaves on its node; the server answers afterwards."""
        error = error_of(self.server.run(prompt))
        assert error is not None, "the prompt was expected to fail"
        assert self.server.get("/system_stats")["system"]
        return error

    def latent(self, outputs, node):
        found = outputs[node]["latents"][0]
        path = self.base / "output" / found["subfolder"] / found["filename"]
        return safetensors.torch.load_file(path)["latent_tensor"]

    def skip_before(self, major, minor, why):
        """Skips the test on an older ComfyUI: what it needs is refused there, which test_older_comfyui.py holds."""
        version = self.server.get("/system_stats")["system"]["comfyui_version"]
        if tuple(map(int, version.split(".")[:2])) < (major, minor):
            pytest.skip(f"{why} needs ComfyUI {major}.{minor}, this is {version}")

    @staticmethod
    def report(outputs, node):
        return outputs[node]["sla2_report"][0]


APPLY = {
    "sparsity": 0.75,
    "bit_width": "16bit",
    "ratio_mode": "learned",
    "fixed_ratio": 0.9,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "dense_layers": "",
    "minimum_tokens": 0,
    "on_unsupported": "run dense and say so",
}


class Prompt(dict):
    """A growing API prompt: every method adds a node and returns the link to its first output."""

    def add(self, class_type, /, **inputs):
        number = str(len(self) + 1)
        self[number] = {"class_type": class_type, "inputs": inputs}
        return [number, 0]

    def model(self, name="tiny_wan.safetensors"):
        return self.add("UNETLoader", unet_name=name, weight_dtype="default")

    def apply(self, model, **changes):
        return self.add("SLA2ApplyAttention", model=model, **APPLY | changes)

    def sample(self, model, seed=5, steps=3, size=256, frames=9, image=False, label="", **changes):
        # 256 x 256 x 9 makes 3 x 16 x 16 = 768 tokens
        positive, negative = (self.add("SLA2TestConditioning", number=n, image=image, label=label) for n in (1, 2))
        latent = self.add("EmptyHunyuanLatentVideo", width=size, height=size, length=frames, batch_size=1)
        settings = {"seed": seed, "steps": steps, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple"}
        return self.add(
            "KSampler",
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            denoise=1.0,
            **settings | changes,
        )

    def save(self, latent):
        # a name of its own: an output node that ComfyUI serves from its cache is missing in the history of some versions
        return self.add("SaveLatent", samples=latent, filename_prefix=f"latent_{secrets.token_hex(8)}")[0]

    def report(self, model, samples):
        return self.add("SLA2Report", model=model, samples=samples)[0]


@pytest.fixture(scope="session")
def new_prompt():
    return Prompt


@pytest.fixture
def prompt(new_prompt):
    return new_prompt()
