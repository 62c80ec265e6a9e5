"""SLA2 Train LoRA in a real ComfyUI: what it makes, what it leaves alone, and how it ends where it cannot go on."""

import pytest

pytestmark = pytest.mark.comfyui

LAYERS = 3
TRAIN = {
    "seed": 5, "steps": 3, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple", "sparsity": 0.75,
    "bit_width": "16bit", "loss": "match the dense model", "videos": 1, "rank": 4, "training_steps": 6, "batch_size": 1,
    "learning_rate": 0.01,
}  # fmt: skip


def train(prompt, model, size=256, frames=9, image=False, **changes):
    positive, negative = (prompt.add("SLA2TestConditioning", number=n, image=image, label="") for n in (1, 2))
    latent = prompt.add("EmptyHunyuanLatentVideo", width=size, height=size, length=frames, batch_size=1)
    return prompt.add(
        "SLA2TrainLora", model=model, positive=positive, negative=negative, latent_image=latent, **TRAIN | changes
    )


def test_it_trains(comfy, prompt):
    node = train(prompt, prompt.model())
    prompt.add("SaveLoRA", lora=node, prefix="loras/tiny")
    outputs = comfy.run(prompt)
    print(outputs[node[0]])
