"""Stage 2 in turns: by the loss, with guidance, with distilled few-step LoRAs merged; and which LoRA files can be merged."""

import itertools
import json
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch

pytest.importorskip("diffusers.models")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from tiny_stage2 import CONFIG, tiny_model, trainer, videos

from miniature.wan import WanConfig, WanModel
from sla2_training import TrainingError
from sla2_training.draws import drawn, noise_like
from sla2_training.stage2 import add_lora
from sla2_training.stage2.__main__ import main
from sla2_training.stage2.checkpoint import checkpoints
from sla2_training.stage2.config import STATES
from sla2_training.stage2.lora import Addition, plain_weights, read_lora, wan_name
from sla2_training.stage2.report import Report, Validation
from sla2_training.stage2.wan import run
from sla2_training.stage2.ways import schedule

CHANGED = "blocks.0.attn1.to_q.weight", "blocks.1.ffn.net.2.bias"


def few_step_lora(path, seed):
    """A file that changes two weights of tiny_model(), and those two as they should become."""
    generator = torch.Generator().manual_seed(seed)
    down, up, bias = (torch.randn(*shape, generator=generator) for shape in ((4, 64), (64, 4), (64,)))
    query, tensors = "diffusion_model.blocks.0.self_attn.q", {"diffusion_model.blocks.1.ffn.2.diff_b": bias}
    tensors |= {f"{query}.lora_down.weight": down, f"{query}.lora_up.weight": up, f"{query}.alpha": torch.tensor(0.5)}
    safetensors.torch.save_file(tensors, path)
    own = dict(tiny_model().named_parameters())
    return {CHANGED[0]: own[CHANGED[0]] + 0.5 / 4 * up @ down, CHANGED[1]: own[CHANGED[1]] + bias}


@pytest.fixture
def in_turns(tmp_path):
    """(configuration of four ways, the changed weights of its 8 and of its 4 steps)."""
    expected = {steps: few_step_lora(tmp_path / f"{steps}.safetensors", steps) for steps in (8, 4)}
    files = {str(steps): str(tmp_path / f"{steps}.safetensors") for steps in expected}
    config = replace(CONFIG, steps=5, guidance=4.0, few_step_loras=files, sampling_steps=10, sampling_shift=3.0)
    return config, expected


def changed_weights(made):
    own = plain_weights(made.student.model)
    return {name: own[name].detach().clone() for name in CHANGED}


def test_steps_take_turns_and_the_weights_are_put_back(tmp_path, in_turns):
    config, expected = in_turns
    made = trainer(tmp_path, replace(config, drop_caption=1.0, validate_every=3), validation=videos(1))
    before, seen, validated = changed_weights(made), [], []
    loss, validate = made._loss, made.validate

    def watched(noisy, t, context, velocity):
        seen.append((made.turns.now.name, changed_weights(made), t, context))
        return loss(noisy, t, context, velocity)

    def watched_validation():
        validate()
        validated.append(changed_weights(made))

    made._loss, made.validate = watched, watched_validation
    made.train()
    # a step has two micro batches, the last two are of the final loss
    names = [name for name, *_ in seen[::2]]
    assert names == ["distill", "guidance 4", "8 steps", "4 steps", "distill", "distill"]
    for name, weights, t, context in seen:
        wanted = {"8 steps": expected[8], "4 steps": expected[4]}.get(name, before)
        for changed in CHANGED:
            torch.testing.assert_close(weights[changed], wanted[changed])
        captioned = [bool(row.any()) for row in context]
        if name == "distill":
            assert captioned == [False]
            continue
        assert captioned == ([True, False] if name.startswith("guidance") else [True])
        levels = schedule({"8 steps": 8, "4 steps": 4}.get(name, 10), 3.0)[:-1]
        assert all(level in levels for level in t)
    assert len(validated) == 3
    for weights in [*validated, changed_weights(made)]:
        assert all(torch.equal(weights[name], before[name]) for name in CHANGED)
    assert made.report.ways == ["distill", "guidance 4", "8 steps", "4 steps"]


def test_weights_are_put_back_when_a_step_fails(tmp_path, in_turns):
    config, _ = in_turns
    made = trainer(tmp_path, config)
    before, loss = changed_weights(made), made._loss
    made._loss = lambda *batch: loss(*batch) * (torch.nan if made.step == 2 else 1.0)
    with pytest.raises(TrainingError, match="stopped at step 2"):
        made.train()
    assert all(torch.equal(weight, before[name]) for name, weight in changed_weights(made).items())


def test_levels_of_sampling():
    torch.testing.assert_close(schedule(4, 3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_what_a_way_draws(tmp_path, in_turns):
    config, _ = in_turns
    _, guided, _, four = trainer(tmp_path, replace(config, few_step_states="noised")).turns.ways
    seeds = torch.tensor([5, 11, 20])
    draw = torch.tensor([2, 0, 1]), torch.rand(3), torch.tensor([True, False, True]), seeds
    indices, levels, dropped, same = four.rows(*draw, 0)
    torch.testing.assert_close(levels, torch.tensor([0.9, 0.5, 1.0]))  # 5, 11 and 20 mod 4
    assert torch.equal(indices, draw[0]) and torch.equal(same, seeds) and not dropped.any()
    indices, levels, dropped, same = guided.rows(*draw, 0)
    assert indices.tolist() == [2, 2, 0, 0] and same.tolist() == [5, 5, 11, 11]
    assert dropped.tolist() == [False, True, False, True]
    torch.testing.assert_close(levels, schedule(10, 3.0)[[5, 5, 1, 1]])
    # one video at a time is a pair too
    assert guided.rows(*(x[:1] for x in draw), 0)[0].tolist() == [2, 2]


def test_sampled_states_are_where_the_models_own_steps_lead(tmp_path, in_turns):
    config, expected = in_turns
    made = trainer(tmp_path, replace(config, batch=2, micro_batch=2))
    with torch.no_grad():
        for name, parameter in made.student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    levels = schedule(4, 3.0)
    for turn in range(5):
        made.step = 3 + 4 * turn  # the fourth of four ways
        way = made.turns.of(made.step)
        made.turns.take(way)
        draw = drawn(config, made.step, 4)
        noisy, t, context, _ = made._batch(draw, slice(0, 2), made.data)
        assert (t == levels[turn % 4]).all() and context.any(dim=(1, 2)).all()
        x = noise_like(noisy, draw[3])
        for level, following in itertools.pairwise(levels[: turn % 4 + 1]):
            with torch.no_grad():
                x = x + (following - level) * made.student(x, level.expand(2), context)
        torch.testing.assert_close(noisy, x)
    for name, weight in changed_weights(made).items():
        torch.testing.assert_close(weight, expected[4][name])
    # the other ways have videos with noise
    made.step, draw = 1, drawn(config, 1, 4)
    made.turns.take(made.turns.of(1))
    noisy, t, *_ = made._batch(draw, slice(0, 2), made.data)
    clean, noise = made.data.latents[draw[0][:1]].float(), noise_like(noisy[:1], draw[3][:1])
    torch.testing.assert_close(noisy[:1], torch.lerp(clean, noise, t[:1].view(-1, 1, 1, 1, 1)))


def test_the_guided_loss_is_that_of_the_velocity_that_guidance_makes(tmp_path):
    scale = 4.0
    config = replace(CONFIG, guidance=scale, batch=4, micro_batch=4, sampling_steps=10, sampling_shift=3.0, loss="flow")
    made = trainer(tmp_path, config)
    with torch.no_grad():
        for name, parameter in made.student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    made.turns.take(made.turns.of(1))
    noisy, t, context, velocity = made._batch(drawn(config, 1, 4), slice(0, 4), made.data)
    assert len(noisy) == 4 and torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[1], noisy[2])

    def guided(dense):
        with_caption = made.student(noisy[::2], t[::2], context[::2], dense=dense)
        without = made.student(noisy[::2], t[::2], torch.zeros_like(context[::2]), dense=dense)
        return without + scale * (with_caption - without)

    with torch.no_grad():
        found = made._loss(noisy, t, context, velocity)
        expected = (guided(False) - guided(True)).square().mean() / (scale**2 + (scale - 1) ** 2)
    assert expected > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_a_few_step_loras_teacher_is_the_dense_model_with_it(tmp_path, in_turns):
    config, expected = in_turns
    made = trainer(tmp_path, replace(config, loss="flow"))
    made.turns.take(made.turns.of(2))
    noisy, t, context, velocity = made._batch(drawn(config, 2, 4), slice(0, 2), made.data)
    model = tiny_model()
    model.load_state_dict(model.state_dict() | expected[8])
    with torch.no_grad():
        teacher = run(model, noisy, t, context, None)
        assert not torch.allclose(teacher, run(tiny_model(), noisy, t, context, None), rtol=1e-2)
    torch.testing.assert_close(made._wanted(noisy, t, context, velocity), teacher, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("states", STATES)
def test_a_run_in_turns_that_was_cut_off_ends_where_a_whole_one_does(tmp_path, in_turns, states):
    config, _ = in_turns
    config = replace(config, steps=6, checkpoint_every=1, keep=9, few_step_states=states)
    whole = trainer(tmp_path / "whole", config)
    whole.train()
    saved = safetensors.torch.load_file(tmp_path / "whole" / "step-000003" / "trained.safetensors")
    assert all("lora_" in name or "ratio_logits" in name for name in saved)
    resumed = trainer(tmp_path / "resumed", config)
    report = resumed.train(tmp_path / "whole" / "step-000003")
    assert report.losses == {step: whole.report.losses[step] for step in (3, 4, 5)}
    for a, b in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(a, b)


def test_a_run_that_goes_on_in_other_ways_says_so(tmp_path, in_turns):
    config, _ = in_turns
    trainer(tmp_path, replace(config, steps=1)).train()
    said = []
    trainer(tmp_path, replace(config, steps=1), say=said.append).train(resume=True)
    assert not any("other" in line for line in said)
    others = replace(config, steps=1, loss="flow", few_step_loras={}, few_step_states="noised")
    trainer(tmp_path, others, say=said.append).train(resume=True)
    told = [line for line in said if "trained with other" in line]
    assert told == [
        "it was trained with other steps in turns: distill, guidance 4, 8 steps, 4 steps; from here on flow, guidance 4",
        "it was trained with other states: sampled; from here on noised",
    ]


def test_the_tables_training_loss_is_that_of_the_configured_loss():
    losses = {step: 1.0 if step % 3 == 0 else 9.0 for step in range(90)}
    report = Report(
        "distill",
        0.6,
        ["distill", "guidance 4", "8 steps"],
        validations=[Validation(90, 0.5, 0.1)],
        losses=losses | {0: 5.0, 33: 2.0},
    )
    # of steps 30, 33, ... 87
    assert "| 90 | 1.05000 | 0.50000 | 0.100000 |" in report.table()


def test_guidance_needs_an_empty_caption(tmp_path):
    data = replace(videos(), empty=None)
    with pytest.raises(ValueError, match='guidance is 4, and the training data has no "empty_context"'):
        trainer(tmp_path, replace(CONFIG, guidance=4.0), data=data)


def test_the_command_trains_in_turns(tmp_path, in_turns, capsys):
    config, _ = in_turns
    tiny_model().save_pretrained(tmp_path / "model" / "transformer")
    data = videos()
    tensors = {"latents": data.latents, "context": data.context, "empty_context": data.empty}
    safetensors.torch.save_file(tensors, tmp_path / "data.safetensors")
    kept = (
        "sparsity", "precision", "lora_rank", "mixed_precision", "guidance", "few_step_loras", "sampling_steps",
        "sampling_shift", "gradient_checkpointing",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in kept} | {"steps": 4, "batch": 2}
    values |= {
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "data.safetensors"),
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "stage2.json"
    path.write_text(json.dumps(values))
    assert main(["--config", str(path)]) == 0
    told = r"step 4 of 4: distill loss [\d.]+, guidance 4 loss [\d.]+, 8 steps loss [\d.]+, 4 steps loss [\d.]+\n"
    assert re.search(told, capsys.readouterr().out) and len(checkpoints(tmp_path / "out")) == 1
    safetensors.torch.save_file({"lora_unet_q.alpha.weight": torch.ones(1)}, tmp_path / "8.safetensors")
    values["output"] = str(tmp_path / "second")
    path.write_text(json.dumps(values))
    assert main(["--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert "8.safetensors" in error and "lora_unet_q.alpha.weight" in error and error.count("\n") == 1
    (tmp_path / "8.safetensors").unlink()
    path.write_text(json.dumps(values | {"model": "a model that is not looked for"}))
    assert main(["--config", str(path)]) == 1
    assert re.search("LoRA .*8.safetensors cannot be read", capsys.readouterr().err)


def image_model():
    """Of diffusers' class with all the layers that Wan 2.1 has for images too."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, text_dim=32, freq_dim=32, ffn_dim=96, num_layers=1, image_dim=16,
        added_kv_proj_dim=64,
    )  # fmt: skip


def test_names_of_layers_are_those_that_diffusers_converts():
    named = [name for name, _ in image_model().named_parameters()]
    in_wan = {wan_name(name): name for name in named}
    assert len(in_wan) == len(named) and "blocks.0.norm3.weight" in in_wan and "head.head.bias" in in_wan
    converted = convert_wan_transformer_to_diffusers({name: name for name in in_wan})
    assert converted == {name: wan for wan, name in in_wan.items()}


def wan_model():
    torch.manual_seed(0)
    return WanModel(WanConfig(dim=128, ffn_dim=128, num_layers=1))


MODELS = {"diffusers": image_model, "Wan": wan_model}
# (key's layer in Wan's names and in diffusers', its size)
LINEAR, NORM = ("blocks.0.ffn.0", "blocks.0.ffn.net.0.proj"), ("blocks.0.norm3", "blocks.0.norm2")
QUERY_NORM = "blocks.0.cross_attn.norm_q", "blocks.0.attn2.norm_q"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("prefix", "file", "factors"),
    [
        ("diffusion_model.", 0, ("lora_down", "lora_up")),
        ("", 0, ("lora_A", "lora_B")),
        ("transformer.", 1, ("lora_A", "lora_B")),
    ],
)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_files_of_either_naming_are_merged_into_models_of_either(tmp_path, model, prefix, file, factors, alpha):
    own, mine = MODELS[model](), int(model == "diffusers")
    state = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    add_lora(own, 2, 2.0, ("self_attn", "cross_attn", "ffn"))  # PEFT's names
    size = state[f"{NORM[mine]}.weight"].numel()
    width = state[f"{LINEAR[mine]}.weight"].shape[0]
    down, up = torch.randn(3, size), torch.randn(width, 3).half()
    diffs = [torch.randn(size) for _ in range(4)]
    tensors = {f"{LINEAR[file]}.{factors[0]}.weight": down, f"{LINEAR[file]}.{factors[1]}.weight": up}
    tensors |= {f"{NORM[file]}.diff": diffs[0], f"{NORM[file]}.diff_b": diffs[1], f"{QUERY_NORM[file]}.diff": diffs[2]}
    tensors[f"{LINEAR[file]}.diff_b"] = bias = torch.randn(width)
    if alpha:
        tensors[f"{LINEAR[file]}.alpha"] = torch.tensor(alpha)
    path = tmp_path / "few.safetensors"
    safetensors.torch.save_file({prefix + key: tensor for key, tensor in tensors.items()}, path)

    weights = plain_weights(own)
    found = {name: addition.added_to(weights[name].detach()) for name, addition in read_lora(path, weights).items()}
    scale = alpha / 3 if alpha else 1.0
    expected = {
        f"{LINEAR[mine]}.weight": scale * (up.float() @ down),
        f"{LINEAR[mine]}.bias": bias,
        f"{NORM[mine]}.weight": diffs[0],
        f"{NORM[mine]}.bias": diffs[1],
        f"{QUERY_NORM[mine]}.weight": diffs[2],
    }
    assert found.keys() == expected.keys()
    for name, added in expected.items():
        torch.testing.assert_close(found[name], state[name] + added)


def test_a_weight_may_have_factors_and_a_difference():
    weight, ones = torch.zeros(4, 4, dtype=torch.bfloat16), torch.ones(4, 4)
    merged = Addition(down=ones[:2], up=ones[:, :2], alpha=torch.tensor(1.0), diff=ones).added_to(weight)
    assert merged.dtype == torch.bfloat16 and torch.equal(merged.float(), 2 * ones) and not weight.any()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("block", "head"),
    [
        ("diffusion_model.blocks.0.diff_m", "diffusion_model.head.diff_m"),
        ("blocks.0.modulation.diff", "head.modulation.diff"),
    ],
)
def test_modulations_are_merged_as_lightx2v_and_comfyui_name_them(tmp_path, model, block, head):
    own = plain_weights(MODELS[model]())
    names = ["blocks.0.modulation", "head.modulation"]
    if model == "diffusers":
        names = ["blocks.0.scale_shift_table", "scale_shift_table"]
    tensors = {key: torch.randn(own[name].shape) for key, name in zip((block, head), names, strict=True)}
    safetensors.torch.save_file(tensors, tmp_path / "few.safetensors")
    found = read_lora(tmp_path / "few.safetensors", own)
    assert list(found) == names
    for name, added in zip(names, tensors.values(), strict=True):
        torch.testing.assert_close(found[name].added_to(own[name].detach()), own[name].detach() + added)


def test_image_layers_that_the_model_has_not_are_left_out_and_told(tmp_path, caplog):
    path = tmp_path / "few.safetensors"
    image = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(2, 128),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": torch.ones(128, 2),
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.ones(128),
        "diffusion_model.img_emb.proj.1.diff_b": torch.ones(16),
    }
    safetensors.torch.save_file({**PAIR, **image}, path)
    assert list(read_lora(path, plain_weights(wan_model()))) == ["blocks.0.self_attn.q.weight"]
    assert "4 tensors are for image layers" in caplog.text and str(path) in caplog.text
    caplog.clear()
    with pytest.raises(ValueError, match=r"k_img.lora_down.weight has shape \(2, 128\)"):
        read_lora(path, plain_weights(image_model()))
    assert not caplog.text


QUERY = "diffusion_model.blocks.0.self_attn.q"
PAIR = {f"{QUERY}.lora_down.weight": torch.ones(2, 128), f"{QUERY}.lora_up.weight": torch.ones(128, 2)}


@pytest.mark.parametrize(
    ("tensors", "key", "told"),
    [
        ({}, "", "holds no tensors"),
        ({**PAIR, f"{QUERY}.dora_scale": torch.ones(128)}, f"{QUERY}.dora_scale", "ends in none of lora_down.weight"),
        ({"diffusion_model.blocks.0.diff_m": torch.ones(1)}, "blocks.0.diff_m", r"has shape \(1,\), for a weight of"),
        ({"blocks.0.self_attn.q.diff_m": torch.ones(1)}, "self_attn.q.diff_m", "is for a layer that it has not"),
        ({f"{QUERY}.lora_B.bias": torch.ones(128)}, f"{QUERY}.lora_B.bias", "ends in none of"),
        ({"blocks.7.norm3.diff": torch.ones(128)}, "blocks.7.norm3.diff", "is for a layer that it has not"),
        ({"blocks.0.norm2.diff": torch.ones(128)}, "blocks.0.norm2.diff", "is for a layer that it has not"),
        ({"blocks.0.self_attn.norm_q.diff_b": torch.ones(128)}, "norm_q.diff_b", "is for a layer that it has not"),
        ({"blocks.7.modulation.diff": torch.ones(1, 6, 128)}, "blocks.7.modulation.diff", "a layer that it has not"),
        ({"lora_unet_blocks_0_q.alpha": torch.ones(1)}, "lora_unet_blocks_0_q.alpha", "a layer that it has not"),
        ({f"{QUERY}.diff": torch.ones(128)}, f"{QUERY}.diff", r"has shape \(128,\), for a weight of \(128, 128\)"),
        ({**PAIR, f"{QUERY}.lora_down.weight": torch.ones(2, 64)}, "lora_down.weight", r"has shape \(2, 64\)"),
        ({**PAIR, f"{QUERY}.lora_up.weight": torch.ones(64, 2)}, "lora_up.weight", r"has shape \(64, 2\)"),
        ({**PAIR, f"{QUERY}.alpha": torch.ones(2)}, f"{QUERY}.alpha", r"must be one number, got shape \(2,\)"),
        ({**PAIR, f"{QUERY}.alpha": torch.tensor(torch.nan)}, f"{QUERY}.alpha", "holds NaN or infinity"),
        ({**PAIR, f"{QUERY}.lora_up.weight": torch.ones(128, 2).to(torch.int8)}, QUERY, "floating-point numbers, got int8"),
        ({"img_emb.proj.1.diff_b": torch.ones(4)}, "", "changes nothing in this model"),
        ({f"{QUERY}.lora_down.weight": torch.ones(0, 128), f"{QUERY}.lora_up.weight": torch.ones(128, 0)}, QUERY, "rank, 1 or more"),
        ({"patch_embedding.lora_down.weight": torch.ones(2, 16)}, "patch_embedding.lora_down.weight", "has shape"),
        ({**PAIR, f"{QUERY}.lora_up.weight": torch.ones(128, 3)}, QUERY, "has no other factor of its rank"),
        ({f"{QUERY}.lora_up.weight": torch.ones(128, 3)}, f"{QUERY}.lora_up.weight", "has no other factor"),
        ({f"{QUERY}.alpha": torch.ones(1)}, f"{QUERY}.alpha", "has no other factor"),
        ({**PAIR, f"{QUERY}.lora_A.weight": torch.ones(2, 128)}, QUERY, "is there twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name(tmp_path, tensors, key, told):
    path = tmp_path / "few.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=told) as caught:
        read_lora(path, plain_weights(wan_model()))
    assert str(path) in str(caught.value) and key in str(caught.value) and "\n" not in str(caught.value)


def test_a_norm_that_diffusers_has_not_is_refused_too(tmp_path):
    path = tmp_path / "few.safetensors"
    tensors = {"blocks.0.norm3.diff": torch.ones(64), "blocks.0.attn1.to_q.diff_b": torch.ones(64)}
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="blocks.0.norm3.diff is for a layer that it has not"):
        read_lora(path, plain_weights(image_model()))


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="LoRA .*absent.safetensors cannot be read"):
        read_lora(tmp_path / "absent.safetensors", {})
