"""Training in sittings: what a sitting writes, where the next goes on, growth, the decoder's windows, bad input."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from miniature import captions, train_long, videos, wan
from miniature.grow import grow
from miniature.pool import fill_pool
from miniature.train_dit import DIT_FILE
from miniature.train_vae import VAE_FILE
from miniature.tune_decoder import window
from miniature.vae import WanVAE, normalise_latents
from miniature.weight_files import WEIGHTS, weight_file

SITTING = ["--tiny", "--minutes", "0", "--steps", "3", "--test-clips", "1", "--device", "cpu", "--no-compile",
           "--print-seconds", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def sit(tiny_weights, tmp_path_factory):
    """Call with options: one sitting of three steps, from the tiny weights if they do not say; returns its folder."""

    def run(*options):
        out = tmp_path_factory.mktemp("sitting")
        train_long.main(["--out", str(out), "--from", str(tiny_weights), *SITTING, *options])
        return out

    return run


@pytest.fixture(scope="module")
def first(sit):
    return sit("--layers", "3", "--decoder-seconds", "1", "--mix", "small=1", "low=1")


def log_of(folder):
    return json.loads((folder / train_long.LOG_FILE).read_text())


def test_a_sitting_writes_what_the_next_and_a_user_need(first):
    files = {DIT_FILE, VAE_FILE, train_long.LIVE_FILE, train_long.LOG_FILE}
    assert {path.name for path in first.iterdir()} == files
    log = log_of(first)
    assert log["run"]["sitting"] == 1
    assert log["results"]["steps"] == log["results"]["decoder_steps"] == 3
    losses = {f"validation_loss_{size}{when}" for size in ("small", "full") for when in ("", "_before")}
    assert {name for name in log["results"] if name.startswith("validation")} == losses
    trained = [record for record in log["records"] if record["stage"] == "train"]
    assert [next(key for key in record if key.startswith("steps_")) for record in trained] == [
        "steps_small",
        "steps_small",
        "steps_low",
    ]
    assert {record["size"] for record in log["records"] if record["stage"] == "encode"} == {"small", "low", "full"}
    assert wan.WanConfig.from_state_dict(load_file(first / DIT_FILE)).num_layers == 3


def test_the_decoder_changes_and_the_encoder_does_not(first, tiny_weights):
    before, after = load_file(tiny_weights / VAE_FILE), load_file(first / VAE_FILE)
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "conv2"}


def test_the_next_sitting_goes_on_from_the_live_weights_with_other_clips(first, sit):
    second = sit("--from", str(first), "--mix", "full=1", "--finish")
    assert log_of(second)["run"]["sitting"] == 2
    key = "blocks.2.ffn.0.weight"
    one, two = load_file(first / train_long.LIVE_FILE)[key], load_file(second / train_long.LIVE_FILE)[key]
    assert not torch.equal(one, two)
    # three steps of warm-up move the weights little
    torch.testing.assert_close(one.float(), two.float(), atol=0.01, rtol=0)
    assert torch.equal(load_file(first / VAE_FILE)["conv2.weight"], load_file(second / VAE_FILE)["conv2.weight"])
    rates = [
        [record["lr"] for record in log_of(folder)["records"] if record["stage"] == "train"]
        for folder in (first, second)
    ]
    assert rates[0] == pytest.approx([0.01, 0.02, 0.03])
    assert rates[1] == pytest.approx([0.01, 0.02, 0.03])


def test_the_same_sitting_twice_gives_the_same_weights(first, sit):
    again = sit("--layers", "3", "--decoder-seconds", "1", "--mix", "small=1", "low=1")
    for name in (DIT_FILE, VAE_FILE, train_long.LIVE_FILE):
        one, two = load_file(first / name), load_file(again / name)
        assert all(torch.equal(one[key], two[key]) for key in one), name


@pytest.mark.skipif(not weight_file(DIT_FILE).exists(), reason="the archive leaves the weights out")
def test_the_next_sitting_goes_on_from_the_shipped_weights():
    state, number = train_long.load_start(WEIGHTS, None)
    kept = load_file(weight_file(DIT_FILE))
    assert number == log_of(WEIGHTS)["run"]["sitting"] + 1
    assert all(torch.equal(state[key], kept[key].float()) for key in kept)


def test_a_folder_without_a_sitting_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="earlier sitting"):
        train_long.load_start(tmp_path, None)


@torch.no_grad()
def test_a_grown_transformer_computes_the_same():
    torch.manual_seed(0)
    small = wan.WanModel(wan.WanConfig(dim=128, ffn_dim=64, num_layers=2)).eval()
    state = grow(small.state_dict(), 5)
    large = wan.WanModel(wan.WanConfig.from_state_dict(state)).eval()
    large.load_state_dict(state)
    assert large.config.num_layers == 5
    x, t, context = torch.randn(1, 16, 2, 4, 6), torch.tensor([500.0]), captions.embed("two red balls")
    torch.testing.assert_close(large(x, t, context), small(x, t, context))
    with pytest.raises(ValueError, match="has 2 layers, it cannot grow to 1"):
        grow(small.state_dict(), 1)


@torch.no_grad()
def test_a_pool_holds_the_latents_of_its_scenes_and_stops_in_time():
    torch.manual_seed(0)
    vae = WanVAE(2).eval()
    train, _ = captions.split_captions()
    options = {"size": (5, 32, 48), "seed": 4, "device": torch.device("cpu"), "pixels": 5 * 32 * 48}
    pool = fill_pool(vae, train, [3, 9], **options)
    clip = videos.render(pool.scenes.select(torch.tensor([1])), frames=5, height=32, width=48)
    with torch.autocast("cpu", torch.bfloat16):
        expected = normalise_latents(vae.encode(clip).float()).bfloat16()
    assert torch.equal(pool.latents[1:], expected)
    assert pool.tokens == 2 * 2 * 3
    assert len(fill_pool(vae, train, [3, 9], until=0.0, **options)) == 1


def test_a_window_of_latents_comes_with_its_window_of_the_video():
    vae = WanVAE(2).eval()
    train, _ = captions.split_captions()
    pool = fill_pool(vae, train, [0, 1], size=(9, 64, 96), seed=4, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    latents, video = window(pool, torch.tensor([1, 0]), 2, 3, generator)
    assert (latents.shape, video.shape) == ((2, 16, 2, 3, 3), (2, 3, 5, 24, 24))
    place = [
        (top, left)
        for top in range(6)
        for left in range(10)
        if torch.equal(pool.latents[[1, 0], :, :2, top : top + 3, left : left + 3].float(), latents)
    ]
    ((top, left),) = place
    whole = videos.render(pool.scenes.select(torch.tensor([1, 0])), frames=5, height=64, width=96)
    torch.testing.assert_close(video, whole[..., 8 * top : 8 * top + 24, 8 * left : 8 * left + 24], atol=1e-4, rtol=0)


def test_gradients_are_compared_with_plain_torch(tiny_weights):
    state = {key: value.float() for key, value in load_file(tiny_weights / DIT_FILE).items()}
    model, device = train_long.build(state, False, torch.device("cpu")).train(), torch.device("cpu")
    size = train_long.TINY["full"]
    assert train_long.gradient_error(model, state, size, device) < 0.02
    with torch.no_grad():
        model.patch_embedding.weight.mul_(-1)
    with pytest.raises(ArithmeticError, match="try another --attention"):
        train_long.gradient_error(model, state, size, device)


def test_a_mix_becomes_shares():
    assert train_long.parse_mix("short=1,full=3,low=0") == {"short": 0.25, "full": 0.75}
    generator = torch.Generator().manual_seed(0)
    drawn = [train_long.draw_name({"short": 0.25, "full": 0.75}, generator) for _ in range(400)]
    assert drawn.count("short") == pytest.approx(100, abs=30)


@pytest.mark.parametrize("text", ["short", "short=x", "huge=1", "full=-1", "full=0"])
def test_a_bad_mix_is_named(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_long.main(["--out", str(tmp_path), "--minutes", "1", "--mix", text])
    assert f"mix '{text}'" in capsys.readouterr().err


def test_the_speed_script_times_every_size_and_part(tiny_weights, tmp_path, monkeypatch, capsys):
    from benchmarks import miniature_length

    monkeypatch.setattr(miniature_length, "WEIGHTS", tiny_weights)
    miniature_length.main(["--tiny", "--repeats", "1", "--attention", "any", "--device", "cpu", "--no-compile",
                           "--log", str(tmp_path / "log.json")])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    for name in train_long.TINY:
        assert sum(line.startswith((f"{name}: render", f"any {name}: ")) for line in lines) == 2
    assert sum(" ms a step" in line and line.startswith("decoder") for line in lines) == 2


TWO_PROCESSES = """
import json, sys, torch
from pathlib import Path
from miniature.optim import Log
from miniature.processes import Processes

processes = Processes(torch.device("cpu"))
model = torch.nn.Linear(3, 2)
for p in model.parameters():
    p.grad = torch.full_like(p, 1.0 + 2 * processes.rank)
processes.average_gradients(model)
assert all(torch.equal(p.grad, torch.full_like(p, 2.0)) for p in model.parameters())
assert processes.agree(0.25 + processes.rank) == 0.25
assert (processes.share(64), processes.share(2), processes.share(1), processes.count) == (32, 2, 1, 2)

from miniature import train_long
train_long.Processes = lambda device: processes  # a group is made once in a process

class KeptLog(Log):
    def record(self, **values):
        super().record(**values)
        Path(f"records_{processes.rank}.json").write_text(json.dumps(self.data["records"]))

train_long.Log = KeptLog
train_long.main(sys.argv[1:])
"""


def test_two_processes_share_a_sitting(tmp_path, first):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(TWO_PROCESSES)
    options = ["--out", str(out), "--from", str(first), *SITTING, "--mix", "small=1,full=1", "--sparse-share", "0.5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    root = str(WEIGHTS.parent.parent)
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = log_of(out)
    assert log["run"]["processes"] == 2 and log["results"]["steps"] == 3
    assert {path.name for path in out.iterdir()} == {DIT_FILE, VAE_FILE, train_long.LIVE_FILE, train_long.LOG_FILE}
    # The same size in both at each step, with clips and noise, so a loss, of its own.
    one, two = (json.loads((tmp_path / f"records_{rank}.json").read_text()) for rank in (0, 1))
    one, two = ([record for record in records if record["stage"] == "train"] for records in (one, two))
    assert len(one) == len(two) == 3
    for mine, other in zip(one, two, strict=True):
        assert mine.keys() == other.keys()
        assert [mine[key] != other[key] for key in mine if key.startswith("loss_")] == [True]
