"""With the trained miniature, both videos of the demo show what the caption says: red things that stay in the picture, in 95% of
the frames, as the image test counts (miniature/objects.py). SLA2 skips as much as costs what 97% costs at full length."""

import pytest

from miniature.captions import split_captions
from miniature.scaled import simulate
from miniature.videos import render
from miniature.weight_files import weight_file
from tooling.checkpoint import DIT, LORA, LORA_ROUTER, ROUTER, VAE, Checkpoint, find_or_make
from tooling.comfyui import find_comfyui
from tooling.comfyui_demo import lay_out
from tooling.comparison import read_video
from tooling.demo_plan import CAPTION, plan_for

# of the picture; drawn scenes lie well inside (checked below)
LEAST, MOST = 0.02, 0.3
trained = pytest.mark.skipif(
    not (weight_file(DIT).exists() and weight_file(VAE).exists()),
    reason="the miniature's weights are not in miniature/weights",
)


def red_share(video):
    """(F,) share of clearly red pixels in (3, F, H, W), values in [-1, 1]."""
    red, green, blue = video
    return (red - green.maximum(blue) > 0.4).float().mean((1, 2))


def drawn(words):
    """Six scenes of the captions that hold these words, as the miniature was trained on them, at the demo's size."""
    plan = plan_for("cpu")
    captions = [caption for part in split_captions() for caption in part if words in str(caption)][:6]
    scenes = simulate(captions, frames=plan.frames, height=plan.height, width=plan.width, seed=1)
    return render(scenes, frames=plan.frames, height=plan.height, width=plan.width)


def test_the_demos_caption_is_one_of_the_miniatures():
    assert CAPTION in [str(caption) for part in split_captions() for caption in part]


@pytest.mark.parametrize(("words", "red"), [("red balls", True), ("blue boxes", False), ("yellow stars", False)])
def test_drawn_scenes_are_told_apart_by_their_red_share(words, red):
    for video in drawn(words):
        share = red_share(video)
        assert (share.min() > LEAST and share.max() < MOST) if red else share.max() < 0.005


@trained
def test_all_of_the_miniature_lands_in_comfyuis_model_folders(tmp_path):
    lay_out(tmp_path, find_or_make(tmp_path / "unused"))
    placed = {folder.name: {path.name for path in folder.iterdir()} for folder in (tmp_path / "models").iterdir()}
    assert placed == {"diffusion_models": {DIT}, "vae": {VAE}, "sla2": {ROUTER, LORA_ROUTER}, "loras": {LORA}}


def test_a_checkpoint_without_routers_and_lora_is_laid_out_too(tmp_path):
    for name in (DIT, VAE):
        (tmp_path / name).write_bytes(name.encode())
    lay_out(tmp_path / "base", Checkpoint(tmp_path / DIT, tmp_path / VAE, None, True))
    assert {path.name for path in (tmp_path / "base/models").glob("*/*")} == {DIT, VAE}


def assert_both_show_red_balls(folder, results, host):
    assert results["trained"] and results["host"] == host
    for run in results["runs"]:
        share = red_share(read_video(folder / run["video"]))
        right = ((share > LEAST) & (share < MOST)).float().mean()
        assert right >= 0.95, f"{run['name']}: {share.tolist()}"


@trained
@pytest.mark.slow
@pytest.mark.comfyui
def test_both_videos_show_two_red_balls(comfyui_demo):
    assert_both_show_red_balls(*comfyui_demo, "ComfyUI")


@trained
@pytest.mark.comfyui
def test_the_workflow_first_look_shows_red_things_over_a_grey_floor(comfyui_demo):
    folder, results = comfyui_demo
    for run in results["runs"]:
        assert run["notes"] == []
        video = read_video(folder / run["video"])
        red = (video[0] - video[1].maximum(video[2]) > 0.4).float().mean().item()
        floor = ((video.amax(0) - video.amin(0)) < 0.25).float().mean().item()
        assert 0.01 < red < 0.35 and floor > 0.5, run["name"]


@trained
@pytest.mark.slow
@pytest.mark.skipif(
    find_comfyui()[0] is not None,
    reason="ComfyUI shows them; diffusers' numbers are compared with the miniature's own elsewhere",
)
def test_both_videos_of_diffusers_show_two_red_balls(diffusers_demo):
    assert_both_show_red_balls(*diffusers_demo, "diffusers")
