"""ComfyUI's own LoRA loader takes the file that stage 2 writes: every layer, and the very weights that were trained."""

import json

import pytest
import safetensors.torch
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from miniature.wan import WanConfig, WanModel
from sla2_kernels import identity_router
from sla2_training.stage2 import Stage2Config, Stage2Trainer, Student, VideoLatents, add_lora

LAYERS = 2
# loads model and LoRA as the nodes do, in a process of its own; prints the patched weights' distance to those expected
PROBE = """
import json, logging, sys
comfyui, folder = sys.argv[1:3]
sys.argv = sys.argv[:1]
sys.path.insert(0, comfyui)
from comfy.cli_args import args
args.cpu = True
import comfy.lora, comfy.sd, comfy.utils, torch
messages = []
logging.getLogger().addHandler(type("Keep", (logging.Handler,), {"emit": lambda self, r: messages.append(r.getMessage())})())
model = comfy.sd.load_diffusion_model(f"{folder}/model.safetensors", model_options={"dtype": torch.float32})
lora = comfy.utils.load_torch_file(f"{folder}/out/lora.safetensors")
patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
expected = comfy.utils.load_torch_file(f"{folder}/expected.safetensors")
patched.patch_model(device_to=torch.device("cpu"))
found = patched.model.diffusion_model.state_dict()
gaps = {n: ((found[n] - w).norm() / w.norm()).item() for n, w in expected.items()}
untouched = [m for m in messages if "not loaded" in m]
print("PROBE", json.dumps({"patches": len(patched.patches), "gap": max(gaps.values()), "untouched": untouched}))
"""


def run(model, noisy, t, context, attend):
    return model(noisy, t * 1000, context, attend)


@pytest.mark.slow
@pytest.mark.comfyui
def test_comfyui_loads_the_lora(tmp_path, comfyui_path, comfy_scripts):
    torch.manual_seed(0)
    model = WanModel(WanConfig(dim=128, ffn_dim=128, num_layers=LAYERS))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = Stage2Config(
        output=str(tmp_path / "out"), sparsity=0.6, precision="16bit", steps=2, batch=1, lora_rank=4, lora_alpha=8.0,
        warmup=1, learning_rate=1e-2, mixed_precision="no",
    )  # fmt: skip
    add_lora(model.requires_grad_(False), config.lora_rank, config.lora_alpha, config.lora_targets)
    student = Student(model, run, identity_router("wan", LAYERS, 1, 128), sparsity=0.6, precision="16bit")
    data = VideoLatents(torch.randn(1, 16, 3, 12, 16), torch.randn(1, 4, 4096), torch.zeros(1, dtype=torch.int64))
    Stage2Trainer(config, student, data, model_name="tiny", say=lambda text: None).train()
    expected = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default")
            assert delta.norm() > 1e-3 * module.base_layer.weight.norm()
            expected[f"{name}.weight"] = module.base_layer.weight + delta
    assert len(expected) == 10 * LAYERS
    safetensors.torch.save_file({n: t.detach() for n, t in expected.items()}, tmp_path / "expected.safetensors")

    (tmp_path / "probe.py").write_text(PROBE)
    done = comfy_scripts.run(tmp_path / "probe.py", comfyui_path, tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rsplit("PROBE ", 1)[1])
    assert found["patches"] == 10 * LAYERS and found["untouched"] == []
    assert found["gap"] < 1e-3  # the file has 16 bits
