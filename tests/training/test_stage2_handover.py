"""LoRA by ComfyUI's own training node through SLA2, then the ratios once more on the model with that LoRA: the hand-over
that stage2/README.md describes, in a real ComfyUI."""

import pytest
import torch

from sla2_kernels import load_router


def defaults(node):
    return {
        name: options[1]["default"]
        for part in node["input"].values()
        for name, options in part.items()
        if len(options) > 1 and isinstance(options[1], dict) and "default" in options[1]
    }


@pytest.mark.comfyui
@pytest.mark.slow
def test_a_lora_then_the_ratios_that_go_with_it(comfy, prompt):
    node = comfy.server.get("/object_info/TrainLoraNode")["TrainLoraNode"]
    model = prompt.model()
    positive, negative = (prompt.add("SLA2TestConditioning", number=n, image=False, label="") for n in (1, 2))
    latent = prompt.add("EmptyHunyuanLatentVideo", width=256, height=256, length=9, batch_size=1)
    stage_1 = {
        "positive": positive, "negative": negative, "latent_image": latent, "seed": 5, "steps": 2, "cfg": 6.0,
        "sampler_name": "uni_pc", "scheduler": "simple", "sparsities": "0.75", "query_blocks": 4,
    }  # fmt: skip
    router = prompt.add("SLA2TrainRouter", model=model, training_steps=4, learning_rate=0.002, **stage_1)
    prompt.add("SLA2SaveRouter", router=router, filename_prefix="handover/before")
    changes = {"steps": 3, "rank": 2, "training_dtype": "fp32", "lora_dtype": "fp32", "existing_lora": "[None]"}
    changes |= {"learning_rate": 0.02}
    trained = prompt.add(
        "TrainLoraNode",
        model=prompt.apply(model, router=router, sparsity=0.75),
        latents=latent,
        positive=positive,
        **defaults(node) | changes,
    )
    lora = [trained[0], next(i for i, kind in enumerate(node["output"]) if kind == "LORA_MODEL")]
    with_lora = prompt.add("LoraModelLoader", model=model, lora=lora, strength_model=1.0, bypass=False)
    again = prompt.add(
        "SLA2TrainRouter", model=with_lora, training_steps=4, learning_rate=0.000001, resume=router, **stage_1
    )
    prompt.add("SLA2SaveRouter", router=again, filename_prefix="handover/after")
    comfy.run(prompt)
    folder = comfy.base / "models/sla2/handover"
    before, after = (load_router(folder / f"{name}_00001_.safetensors") for name in ("before", "after"))
    for old, new in zip(before.layers, after.layers, strict=True):
        # the smallest learning rate: the router stays what stage 1 made it, the ratios move
        torch.testing.assert_close(new.proj_q, old.proj_q, rtol=0, atol=1e-4)
        assert (new.alpha_logits - old.alpha_logits).abs().max() > 1e-3
