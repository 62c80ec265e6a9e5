"""Stage 2 on a tiny diffusers Wan transformer: training, exports, resuming, bad input, and two processes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

pytest.importorskip("diffusers.models")  # tests/diffusers alone would pass for the package
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from process_scripts import run_script
from safetensors import SafetensorError
from tiny_stage2 import CONFIG, HEAD_DIM, HEADS, LAYERS, tiny_model, trainer, videos

from sla2_kernels import RouterLayer, RouterWeights, load_router
from sla2_training import TrainingError
from sla2_training.stage2 import Student, load_config, load_latents, samples
from sla2_training.stage2.checkpoint import checkpoints
from sla2_training.stage2.wan import check_fits, run, wan_student


def merged(model, lora):
    """The model with the exported LoRA in its weights, as a LoRA loader does it."""
    import diffusers.loaders.lora_conversion_utils as conversion

    state = dict(model.state_dict())
    # diffusers' reader of Wan LoRAs is the judge of the file's names
    found = conversion._convert_non_diffusers_wan_lora_to_diffusers({n: t.float() for n, t in lora.items()})
    found = {name.removeprefix("transformer."): tensor for name, tensor in found.items()}
    layers = {name.rsplit(".lora_", 1)[0] for name in found}
    for layer in layers:
        product = found[f"{layer}.lora_B.weight"] @ found[f"{layer}.lora_A.weight"]
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + product
    assert len(layers) == LAYERS * 10
    model.load_state_dict(state)
    return model


def test_distillation_comes_closer_to_the_dense_model_and_exports_what_it_trained(tmp_path):
    config = replace(CONFIG, steps=30, batch=4, validate_every=100)
    made = trainer(tmp_path, config, validation=videos(2, seed=2))
    report = made.train()
    first, last = report.validations[0], report.validations[-1]
    assert first.step == 0 and last.step == 30 and last.distance < 0.9 * first.distance
    assert "| dense |" in report.table() and json.loads((tmp_path / "log.json").read_text())["validations"]

    router = load_router(tmp_path / "router.safetensors")
    assert router.sparsities == (0.6,) and router.precision == "16bit"
    trained = torch.sigmoid(made.student.ratio_logits[1])
    torch.testing.assert_close(router.ratio(1, 0.6), trained.detach())

    # the files alone give the trained model: LoRA in the weights, router in the operator
    lora = safetensors.torch.load_file(tmp_path / "lora.safetensors")
    fresh = merged(tiny_model(), lora)
    untouched = wan_student(fresh, replace(config, router=str(tmp_path / "router.safetensors")))
    data = videos(2, seed=3)
    with torch.no_grad():
        arguments = data.latents, torch.tensor([0.3, 0.8]), data.context
        expected, found = made.student(*arguments), untouched(*arguments)
        assert (expected - found).norm() / expected.norm() < 1e-3  # the LoRA file has 16 bits
        assert (made.student(*arguments, dense=True) - expected).norm() / expected.norm() > 1e-2


def test_dense_runs_are_the_model_as_it_was(tmp_path):
    made = trainer(tmp_path)
    data = videos(1)
    arguments = data.latents, torch.tensor([0.5]), data.context
    with torch.no_grad():
        expected = run(tiny_model(), *arguments, None)
        for name, parameter in made.student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        torch.testing.assert_close(made.student(*arguments, dense=True), expected)
        assert not torch.allclose(made.student(*arguments), expected)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, optimiser):
    config = replace(CONFIG, optimiser=optimiser)
    whole = trainer(tmp_path / "whole", config)
    whole.train()
    assert [path.name for path in checkpoints(tmp_path / "whole")] == ["step-000002", "step-000004"]
    resumed = trainer(tmp_path / "resumed", config)
    report = resumed.train(tmp_path / "whole" / "step-000002")
    assert sorted(report.losses) == [2, 3]
    for a, b in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = trainer(tmp_path / "plain")
    plain.train()
    saving = trainer(tmp_path / "saving", replace(CONFIG, gradient_checkpointing=True))
    saving.train()
    for a, b in zip(plain.parameters, saving.parameters, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("model", "name", "told"),
    [
        (lambda: tiny_model(layers=3), "other", "was made for tiny and this run trains other"),
        (lambda: tiny_model(seed=5), "tiny", "its digest of the weights is"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, model, name, told):
    trainer(tmp_path, replace(CONFIG, steps=1)).train()
    with pytest.raises(TrainingError, match=told):
        trainer(tmp_path, model=model(), name=name).train(resume=True)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("trained.safetensors", b"\0" * 20),
        ("optimiser.pt", b""),
        ("optimiser.pt", b"no pickle at all"),
        ("checkpoint.json", b"[]"),
        ("checkpoint.json", b"\xff\xfe"),
        ("checkpoint.json", b'{"model": {"name": "tiny"}, "step": "two"}'),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, file, content):
    trainer(tmp_path, replace(CONFIG, steps=1)).train()
    path = checkpoints(tmp_path)[-1]
    (path / file).write_bytes(content)
    with pytest.raises(TrainingError, match=f"Checkpoint {path} is damaged"):
        trainer(tmp_path).train(resume=True)


def test_a_checkpoint_of_another_optimiser_or_without_some_weights_is_told(tmp_path):
    trainer(tmp_path, replace(CONFIG, steps=1)).train()
    with pytest.raises(TrainingError, match=r"its lora_alpha is 8.0, this run's is 2.0"):
        trainer(tmp_path, replace(CONFIG, lora_alpha=2.0)).train(resume=True)
    with pytest.raises(TrainingError, match='no state of the optimiser "muon": set the one'):
        trainer(tmp_path, replace(CONFIG, optimiser="muon")).train(resume=True)
    path = checkpoints(tmp_path)[-1] / "trained.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(dict(list(tensors.items())[:-1]), path)
    with pytest.raises(TrainingError, match="is damaged: it holds other weights"):
        trainer(tmp_path).train(resume=True)


def test_ratios_that_were_learned_are_where_they_start(tmp_path):
    """A router whose training was cancelled before it met every layer: the others' ratios are what a run estimates."""
    learned = torch.tensor([[[2.0], [-1.0]]])
    layers = (RouterLayer(alpha_logits=learned), RouterLayer())
    path = tmp_path / "partial.safetensors"
    RouterWeights(layers, "wan", HEADS, HEAD_DIM, sparsities=(0.6,)).save(path)
    made = trainer(tmp_path, replace(CONFIG, router=str(path)))
    made._start_ratios()
    torch.testing.assert_close(made.student.ratio_logits[0].detach().cpu(), learned[0])
    assert made.student.ratio_logits[1].abs().min() > 0
    trained = made.trained_router()
    assert all(layer.alpha_logits is not None for layer in trained.layers) and trained.sparsities == (0.6,)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    made = trainer(tmp_path, replace(CONFIG, steps=8, checkpoint_every=1))
    forward = made._loss
    made._loss = lambda *batch: forward(*batch) * (torch.nan if made.step == 3 else 1.0)
    with pytest.raises(TrainingError, match=r"stopped at step 3 \(distill\): the loss is not finite") as caught:
        made.train()
    last = checkpoints(tmp_path)[-1]
    assert last.name == "step-000002" and str(last) in str(caught.value)
    tensors = safetensors.torch.load_file(last / "trained.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    assert not (tmp_path / "lora.safetensors").exists()
    assert all(p.isfinite().all() for p in made.parameters)


def test_running_out_of_memory_says_what_to_lower(tmp_path):
    made = trainer(tmp_path, replace(CONFIG, micro_batch=2))

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    made._loss = exhausted
    with pytest.raises(TrainingError, match="at step 0: lower micro_batch, or set gradient_checkpointing to true"):
        made.train()


def test_micro_batches_add_up_to_the_same_step(tmp_path):
    losses = {}
    for micro_batch in (1, 4):
        made = trainer(tmp_path / str(micro_batch), replace(CONFIG, batch=4, micro_batch=micro_batch))
        losses[micro_batch] = made.train().losses
    assert losses[1] == pytest.approx(losses[4], rel=1e-4)


def test_mixed_follows_the_video_below_half_the_noise_and_the_dense_model_above(tmp_path):
    made = trainer(tmp_path, replace(CONFIG, loss="mixed"))
    generator = torch.Generator().manual_seed(3)
    noisy, velocity = (torch.randn(3, 16, 3, 12, 16, generator=generator) for _ in range(2))
    context = torch.randn(3, 6, 32, generator=generator)
    wanted = made._wanted(noisy, torch.tensor([0.7, 0.49, 0.5]), context, velocity)
    dense = made._velocity(noisy, torch.tensor([0.7, 0.49, 0.5]), context, dense=True).detach()
    assert torch.equal(wanted[1], velocity[1])
    torch.testing.assert_close(wanted[[0, 2]], dense[[0, 2]], rtol=1e-4, atol=1e-5)
    # no call of the dense model where none is needed
    made._velocity = None
    assert torch.equal(made._wanted(noisy, torch.tensor([0.1, 0.2, 0.3]), context, velocity), velocity)


def test_the_ratio_of_other_sparsities_stays(tmp_path):
    logits = torch.randn(2, HEADS, 3)
    layer = RouterLayer(torch.eye(HEAD_DIM), torch.eye(HEAD_DIM), logits)
    RouterWeights((layer,) * LAYERS, "wan", HEADS, HEAD_DIM, sparsities=(0.9, 0.6)).save(
        tmp_path / "router.safetensors"
    )
    config = replace(CONFIG, router=str(tmp_path / "router.safetensors"), steps=2, loss="flow")
    made = trainer(tmp_path / "out", config)
    made.train()
    router = load_router(tmp_path / "out" / "router.safetensors")
    assert router.sparsities == (0.6, 0.9)
    torch.testing.assert_close(router.ratio(0, 0.9), torch.sigmoid(logits[0]))
    assert not torch.equal(router.ratio(0, 0.6), torch.sigmoid(logits[1]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sparsty": 0.9}, "unknown setting 'sparsty'"),
        ({"data": ""}, "must set 'data'"),
        ({"steps": "many"}, "steps must be like 500"),
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1"),
        ({"loss": "l1"}, "loss must be one of distill, flow, mixed"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, got 'cuda'"),
        ({"validation_levels": 0}, "validation_levels must be at least 1, got 0"),
        ({"optimiser": "muon", "fsdp": True}, 'optimiser is "muon": Muon needs whole matrices'),
        ({"lora_targets": ["head"]}, "lora_targets must be some of"),
        ({"guidance": 0.5}, "guidance must be 1, which is none, to 100, got 0.5"),
        ({"guidance": float("nan")}, "guidance must be 1, which is none, to 100"),
        ({"guidance": 10**40}, "guidance must be 1, which is none, to 100"),
        ({"sampling_steps": 10**30}, "sampling_steps must be 1 to 1000"),
        ({"sampling_steps": 0}, "sampling_steps must be at least 1, got 0"),
        ({"sampling_shift": 0}, "sampling_shift must be 0.01 to 1000, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be 0 to 1000000, got -1"),
        ({"ratio_learning_rate": float("nan")}, "ratio_learning_rate must be 0 to 1000000, got nan"),
        ({"warmup": -5}, "warmup must be 0 to 1000000, got -5"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0 and at most 1000000, got 0"),
        ({"clip": -1.0}, "clip must be above 0 and at most 1000000, got -1"),
        ({"shift": 0.0}, "shift must be 0.01 to 1000, got 0"),
        ({"seed": 2**70}, "seed must be an integer of 64 bits"),
        ({"few_step_loras": ["a"]}, 'few_step_loras must be like {"8": "lora.safetensors"}'),
        ({"few_step_loras": {"eight": "a"}}, 'few_step_loras must name a file .*got {"eight": "a"}'),
        ({"few_step_loras": {"8": None}}, 'few_step_loras must name a file .*got {"8": null}'),
        ({"few_step_loras": {"8": "a"}, "fsdp": True}, "few_step_loras cannot be merged into weights that fsdp splits"),
    ],
)
def test_a_bad_configuration_is_told_in_one_sentence(tmp_path, change, told):
    path = tmp_path / "stage2.json"
    path.write_text(json.dumps({"model": "m", "output": "o", "data": "d"} | change))
    with pytest.raises(ValueError, match=told):
        load_config(path)


def test_a_configuration_that_is_no_text_is_named(tmp_path):
    (tmp_path / "stage2.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"stage2.json is not JSON: 'utf-8' codec"):
        load_config(tmp_path / "stage2.json")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"latents": torch.zeros(4, 16, 3, 12, 16).to(torch.float8_e4m3fn)},
            "'latents' must be float32.*got float8_e4m3fn",
        ),
        ({"latents": torch.zeros(4, 16, 0, 12, 16)}, "'latents' with 5 dimensions, got .4, 16, 0, 12, 16."),
        ({"context": torch.zeros(4, 6, 32, dtype=torch.int32)}, "'context' must be float32.*got int32"),
        ({"caption": torch.zeros(4)}, "'caption' must hold integers, got float32"),
        ({"empty_context": torch.zeros(1, 7, 32)}, "'empty_context' must be one row as long .*got .1, 7, 32."),
        ({"empty_context": torch.zeros(2, 6, 32)}, "'empty_context' must be one row"),
        ({"empty_context": torch.full((1, 6, 32), torch.nan)}, "'empty_context' holds NaN"),
    ],
)
def test_training_data_that_would_stop_inside_or_train_something_else_is_told(tmp_path, change, told):
    data = videos()
    tensors = {"latents": data.latents, "context": data.context, "empty_context": data.empty}
    tensors["caption"] = torch.arange(4).to(torch.uint16)
    path = tmp_path / "data.safetensors"
    safetensors.torch.save_file(tensors, path)
    assert load_latents(path).caption.tolist() == [0, 1, 2, 3]
    safetensors.torch.save_file(tensors | change, path)
    with pytest.raises(ValueError, match=f"Training data .*data.safetensors.* {told}"):
        load_latents(path)


@pytest.mark.parametrize(
    ("sizes", "latents", "told"),
    [
        ({}, (8, 3, 12, 16), "latents of 8 channels and context of 32 features, and this model takes 16 and 32"),
        ({"text_dim": 48}, (16, 3, 12, 16), "this model takes 16 and 48"),
        ({}, (16, 3, 11, 16), "latents of .3, 11, 16., which patches of .1, 2, 2. do not fill"),
        ({"in_channels": 36}, (36, 3, 12, 16), "takes 36 channels and gives 16, as those from images do"),
    ],
)
def test_videos_that_the_model_does_not_take_are_told_before_training(sizes, latents, told):
    sizes = {"text_dim": 32, "in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2)} | sizes
    with pytest.raises(ValueError, match=told):
        check_fits(SimpleNamespace(config=SimpleNamespace(**sizes)), "Training data x", latents, (6, 32))


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_output_folder_with_a_former_runs_checkpoints_is_not_started_in_anew(tmp_path):
    trainer(tmp_path, replace(CONFIG, steps=1)).train()
    with pytest.raises(
        TrainingError, match=r"holds checkpoints of a former run, step-000001 the newest: go on .*--resume"
    ):
        trainer(tmp_path).train()
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="Output folder .*file cannot be made: File exists"):
        trainer(tmp_path / "file").train()


def test_only_older_checkpoints_of_the_same_way_of_naming_are_removed(tmp_path):
    trainer(tmp_path).train()
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000000-mine")
    shutil.copytree(tmp_path / "step-000004", tmp_path / "step-000900")
    config = replace(CONFIG, keep=1, steps=5, checkpoint_every=1)
    trainer(tmp_path, config).train(tmp_path / "step-000002")
    steps = ["step-000000-mine", "step-000005", "step-000900"]
    assert [name for name in written(tmp_path) if name.startswith("step")] == steps
    with pytest.raises(TrainingError, match=r"step-000900 has .* steps, and steps is 3: set it higher"):
        facts = tmp_path / "step-000900" / "checkpoint.json"
        facts.write_text(facts.read_text().replace('"step": 4', '"step": 900'))
        trainer(tmp_path, replace(CONFIG, steps=3)).train(resume=True)
    with pytest.raises(TrainingError, match=r"absent is no checkpoint: name a folder such as step-000050"):
        trainer(tmp_path).train(tmp_path / "absent")


@pytest.mark.parametrize("fails", ["safetensors.torch.save_file", "torch.save"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path, monkeypatch, fails):
    def full(*args, **kwargs):
        raise {"torch.save": RuntimeError, "safetensors.torch.save_file": SafetensorError}[fails]("No space left\nat x")

    made = trainer(tmp_path)
    made.train()
    before = written(tmp_path)
    monkeypatch.setattr(fails, full)
    with pytest.raises(
        TrainingError, match=r"000005 cannot be written \(No space left\): make room, .*step-000004 with"
    ):
        trainer(tmp_path, replace(CONFIG, steps=5)).train(resume=True)
    assert written(tmp_path) == before
    if fails == "safetensors.torch.save_file":
        with pytest.raises(TrainingError, match="lora.safetensors cannot be written: No space left"):
            made.export()
        assert written(tmp_path) == before


def test_bad_training_data_is_told(tmp_path):
    path = tmp_path / "data.safetensors"
    tensors = {"latents": torch.zeros(2, 16, 3, 12, 16), "context": torch.zeros(1, 6, 32)}
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="2 videos need one row"):
        load_latents(path)
    safetensors.torch.save_file({"context": tensors["context"]}, path)
    with pytest.raises(ValueError, match="must hold 'latents' with 5 dimensions, got nothing"):
        load_latents(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_latents(tmp_path / "absent.safetensors")


def test_a_batch_that_processes_cannot_share_is_told():
    with pytest.raises(ValueError, match="make it a multiple of 6"):
        replace(CONFIG, batch=8, micro_batch=2).rounds(3)


def test_the_models_own_samples_are_training_data(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model" / "transformer")
    settings = {"model": str(tmp_path / "model"), "output": "o", "data": str(tmp_path / "data.safetensors")}
    settings |= {"mixed_precision": "no", "lora_rank": 4}
    (tmp_path / "stage2.json").write_text(json.dumps(settings))
    texts = {"context": torch.randn(2, 6, 32), "empty_context": torch.zeros(1, 6, 32)}
    safetensors.torch.save_file(texts, tmp_path / "texts.safetensors")
    command = ["--config", str(tmp_path / "stage2.json"), "--texts", str(tmp_path / "texts.safetensors")]
    assert samples.main([*command, "--size", "9x96x128", "--steps", "2", "--device", "cpu"]) == 0
    data = load_latents(tmp_path / "data.safetensors")
    assert data.latents.shape == (2, 16, 3, 12, 16) and torch.equal(data.context, texts["context"])
    # one Euler step from noise is the velocity that the dense model gives there
    student = wan_student(tiny_model(), CONFIG)
    one = samples.own_samples(
        student, data.context[:1], texts["empty_context"], (16, 3, 12, 16), steps=1, guidance=1.0, say=lambda text: None
    )
    noise = torch.randn(16, 3, 12, 16, generator=torch.Generator().manual_seed(0))[None]
    with torch.no_grad():
        expected = noise - run(tiny_model(), noise, torch.ones(1), data.context[:1], None)
    torch.testing.assert_close(one.latents, expected)
    assert samples.main([*command, "--size", "8x96x128"]) == 1 and "4n + 1 frames" in capsys.readouterr().err

    def told(*more):
        assert samples.main([*command, "--size", "9x96x128", "--device", "cpu", *more]) == 1
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1
        return output.err

    assert "--steps must be at least 1" in told("--steps", "0") and "--guidance must" in told("--guidance", "nan")
    assert "--device quantum is not there" in told("--device", "quantum")
    safetensors.torch.save_file(texts | {"empty_context": torch.zeros(1, 7, 32)}, tmp_path / "texts.safetensors")
    assert "texts.safetensors: 'empty_context' must be one row" in told()
    (tmp_path / "stage2.json").write_text(
        json.dumps(settings | {"data": str(tmp_path / "absent" / "data.safetensors")})
    )
    assert "which cannot be written: make its folder" in told()


def own_samples(outcomes, say):
    """samples.own_samples() of a text for each outcome: the velocity of its video, or what is raised instead."""
    outcomes = iter(outcomes)

    def student(x, t, context, dense):
        if not context.any():
            return x
        outcome = next(outcomes)
        if isinstance(outcome, float):
            return torch.full_like(x, outcome)
        raise outcome

    student.parameters = lambda: iter([torch.zeros(1)])
    texts, empty = torch.ones(3, 6, 32), torch.zeros(1, 6, 32)
    return samples.own_samples(student, texts, empty, (16, 1, 4, 4), steps=1, guidance=1.0, say=say)


def test_a_sample_that_is_not_finite_is_left_out_and_ctrl_c_keeps_the_others():
    said = []
    data = own_samples([0.0, torch.nan, 1.0], said.append)
    assert data.caption.tolist() == [0, 2] and len(data.context) == 3
    noise = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(data.latents[1], noise - 1.0)
    assert said == [
        "1 of 3 videos",
        "video 2 is left out: NaN or infinity; a lower guidance may help",
        "3 of 3 videos",
    ]
    data = own_samples([0.0, 1.0, KeyboardInterrupt()], said.append)
    assert data.caption.tolist() == [0, 1] and said[-1] == "stopped: 2 of 3 videos are kept"
    with pytest.raises(KeyboardInterrupt):
        own_samples([KeyboardInterrupt()], said.append)
    with pytest.raises(TrainingError, match="Every video came out as NaN or infinity"):
        own_samples([torch.nan] * 3, said.append)


def test_data_without_an_empty_caption_says_that_none_is_dropped(tmp_path):
    said = []
    trainer(tmp_path, data=replace(videos(), empty=None), say=said.append)
    assert said == ['the data has no "empty_context": no captions are dropped']
    trainer(tmp_path, replace(CONFIG, drop_caption=0.0), data=replace(videos(), empty=None), say=said.append)
    trainer(tmp_path, say=said.append)
    assert len(said) == 1


def test_weights_that_are_split_are_not_moved_whole_before(tmp_path, monkeypatch):
    """A model larger than one GPU: shard() moves it block by block."""
    from sla2_training.stage2 import trainer as module

    seen, accelerator = [], module.make_accelerator(CONFIG)
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    monkeypatch.setattr(Student, "to", lambda student, device: seen.append("moved"))
    monkeypatch.setattr(module, "shard", lambda student, device: seen.append("split") or student)
    made = trainer(tmp_path, replace(CONFIG, fsdp=True), accelerator=accelerator)
    assert seen == ["split"] and made.sharded
    assert not made.student.needs_start  # the ratios were found afterwards


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Folder of runs by name: one process, then two and four with whole weights on each and with weights split between them."""
    folder = tmp_path_factory.mktemp("together")
    tiny_model().save_pretrained(folder / "model" / "transformer")
    data, file = videos(), str(folder / "data.safetensors")
    tensors = {"latents": data.latents, "context": data.context, "empty_context": data.empty}
    safetensors.torch.save_file(tensors, file)
    kept = "sparsity", "precision", "lora_rank", "mixed_precision", "validation_levels"
    values = {name: getattr(CONFIG, name) for name in kept}
    values |= {"gradient_checkpointing": False, "steps": 3, "batch": 4, "checkpoint_every": 2, "warmup": 1}
    values |= {"learning_rate": 1e-3, "model": str(folder / "model"), "data": file, "validation_data": file}

    lora, query = str(folder / "few.safetensors"), "diffusion_model.blocks.0.self_attn.q"
    factors = {"lora_down": torch.randn(2, 64), "lora_up": torch.randn(64, 2)}
    safetensors.torch.save_file({f"{query}.{name}.weight": factor for name, factor in factors.items()}, lora)

    def arguments(name, fsdp, *resume, **more):
        config = folder / f"{name}.json"
        config.write_text(json.dumps({**values, "output": str(folder / name), "fsdp": fsdp, **more}))
        return ["--config", str(config), *resume]

    turns = {"guidance": 4.0, "few_step_loras": {"8": lora}}

    resume = ("--resume", str(folder / "alone" / "step-000002"))
    runs = [
        (1, [arguments("alone", False), arguments("alone in turns", False, **turns)]),
        (2, [arguments("two", False), arguments("two split", True), arguments("two in turns", False, **turns)]),
        (4, [arguments("four split", True), arguments("gone on in four", True, *resume)]),
    ]
    script = Path(__file__).with_name("stage2_processes.py")
    printed = run_script(script, json.dumps(runs), ACCELERATE_USE_CPU="true")
    assert printed.count("| dense |") == 7
    weights = [("1", "whole")] * 2 + [("2", "whole"), ("2", "sharded"), ("2", "whole")] + [("4", "sharded")] * 2
    assert re.findall(r"(\d+) process\(es\), (\w+) weights", printed) == weights
    return folder


def losses(folder, name):
    found = json.loads((folder / name / "log.json").read_text())
    return found["losses"], found["validations"][-1]


def assert_same_weights(folder, a, b):
    one, two = (safetensors.torch.load_file(folder / name / "step-000003" / "trained.safetensors") for name in (a, b))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "alone"),
    [("two", "alone"), ("two split", "alone"), ("four split", "alone"), ("two in turns", "alone in turns")],
)
def test_several_processes_have_the_losses_of_one(together, name, alone):
    expected, end = losses(together, alone)
    shared, shared_end = losses(together, name)
    assert shared == pytest.approx(expected, rel=1e-4) and shared_end == pytest.approx(end, rel=1e-4)
    assert_same_weights(together, alone, name)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_goes_on_in_four_that_split_the_weights(together):
    expected, _ = losses(together, "alone")
    assert losses(together, "gone on in four")[0] == pytest.approx({"2": expected["2"]}, rel=1e-4)
    assert_same_weights(together, "alone", "gone on in four")
