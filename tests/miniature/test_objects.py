"""The test of a video's objects: rendered scenes pass, videos with the faults it is made for fail, each by its check."""

import dataclasses
import json

import pytest
import torch

from miniature import captions, measure, objects, scaled, videos
from miniature.captions import Caption

FRAMES, HEIGHT, WIDTH = 24, 160, 192
BALLS = Caption("red", "balls", "circle", "waves", "still")


def scene(caption=BALLS, seed=0):
    return scaled.simulate([caption], frames=FRAMES, height=HEIGHT, width=WIDTH, seed=seed)


def draw(scenes):
    return videos.render(scenes, frames=FRAMES, height=HEIGHT, width=WIDTH)[0]


def verdict(video, caption=BALLS):
    return objects.examine(video, caption)


def failed(video, caption=BALLS):
    """The checks that more than 5% of the frames fail."""
    return {check for check, share in verdict(video, caption).shares().items() if share < objects.PASS_SHARE}


@pytest.mark.parametrize("caption", captions.all_captions()[::9], ids=str)
def test_rendered_scenes_pass(caption):
    found = verdict(draw(scene(caption, seed=3)), caption)
    assert found.share == 1.0, found.shares()
    assert (found.counts == 2).all()


def test_a_collision_is_two_objects():
    caption = Caption("yellow", "boxes", "bounce", "clouds", "right")
    close = scene(caption)
    middle = torch.tensor([WIDTH / 2, HEIGHT / 2])
    apart = close.radius.sum() / 2
    close.position[:] = torch.stack(
        [middle - apart * torch.tensor([1.0, 0.0]), middle + apart * torch.tensor([1.0, 0.0])]
    )
    assert verdict(draw(close), caption).passed


def test_merging_objects_fail():
    world = scene()
    world.position[:, 8:, 1] = world.position[:, 8:, 0] + 6.0
    assert "count" in failed(draw(world))


def test_a_vanished_object_fails():
    world = scene()
    world.position[:, 20:, 1] = -500.0
    found = verdict(draw(world))
    assert not found.passed
    assert found.counts.tolist() == [2] * 20 + [1] * 4


def test_a_third_object_fails():
    world = scene()
    free = (world.position[0, :, 0] + world.position[0, :, 1]) / 2
    third = dataclasses.replace(world, position=torch.stack([free, free], 1)[None], radius=world.radius * 0.6)
    both = draw(world)
    extra = draw(third)
    plain = draw(dataclasses.replace(world, position=world.position - 900.0))
    painted = torch.where((extra - plain).abs().amax(0) > 0.05, extra, both)
    assert verdict(both).passed
    assert "count" in failed(painted)


def test_a_small_piece_beside_the_objects_fails():
    video = draw(scene())
    video[:, 4:, 2:20, 2:26] = torch.tensor([0.8, -0.7, -0.7]).view(3, 1, 1, 1)
    assert "count" in failed(video)


def test_an_object_of_another_colour_fails():
    world = scene()
    video, other = draw(world), draw(dataclasses.replace(world, kind=world.kind + torch.tensor([1, 0, 0, 0, 0])))
    left = torch.arange(WIDTH) < WIDTH / 2
    assert failed(torch.where(left, other, video)) == {"colour"}
    assert failed(other) == {"colour"}
    late = torch.cat([video[:, :22], other[:, 22:]], 1)
    assert failed(late) == {"colour"}


@pytest.mark.parametrize(
    ("shown", "asked"), [("boxes", "balls"), ("balls", "boxes"), ("stars", "boxes"), ("boxes", "stars")]
)
def test_another_shape_fails(shown, asked):
    video = draw(scene(dataclasses.replace(BALLS, shape=shown)))
    assert "shape" in failed(video, dataclasses.replace(BALLS, shape=asked))


def test_a_growing_object_fails():
    world = scene()
    parts = [
        dataclasses.replace(world, radius=world.radius * factor) for factor in torch.linspace(0.7, 1.3, 3).tolist()
    ]
    video = torch.cat([draw(part)[:, 8 * i : 8 * i + 8] for i, part in enumerate(parts)], 1)
    assert "size" in failed(video)


def test_an_object_that_jumps_fails():
    world = scene()
    world.position[:, ::2, 1] += 40.0
    assert "steady" in failed(draw(world))


def test_an_empty_video_fails_every_check_but_steadiness():
    world = scene()
    found = verdict(draw(dataclasses.replace(world, position=world.position - 900.0)))
    assert found.share == 0
    assert (found.counts == 0).all()


def test_a_wrong_tensor_is_named():
    with pytest.raises(ValueError, match="needs \\(3, frames, height, width\\)"):
        objects.examine(torch.zeros(1, 3, 5, 32, 32), BALLS)


SMALL = ["--captions", "2", "--frames", "9", "--height", "160", "--width", "160", "--device", "cpu"]


def test_the_command_passes_what_the_renderer_draws(tmp_path, capsys):
    measure.main(["--out", str(tmp_path), "--source", "rendered", *SMALL])
    assert "2 of 2 captions passed" in capsys.readouterr().out
    report = json.loads((tmp_path / "measure.json").read_text())
    assert [row["counts"] for row in report["rows"]] == [[2] * 9] * 2
    assert (tmp_path / "measure.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_fails_an_untrained_model_and_reports_its_loss(tiny_weights, tmp_path, capsys):
    measure.main(["--out", str(tmp_path), "--weights", str(tiny_weights), "--steps", "1", "--loss-clips", "1",
                  "--captions", "1", "--frames", "5", "--height", "32", "--width", "32", "--device", "cpu"])  # fmt: skip
    assert "0 of 1 captions passed, validation loss" in capsys.readouterr().out


def test_the_command_compares_the_vae_with_the_truth(tiny_weights, tmp_path):
    measure.main(["--out", str(tmp_path), "--weights", str(tiny_weights), "--source", "vae", "--captions", "1",
                  "--frames", "5", "--height", "32", "--width", "32", "--device", "cpu"])  # fmt: skip
    row = json.loads((tmp_path / "measure.json").read_text())["rows"][0]
    assert len(row["colour_error"]) == 5
    assert row["psnr_db"] < 30


def test_bad_options_are_named(tmp_path, capsys):
    for options, message in (
        (["--captions", "25"], "24 held-out captions"),
        (["--source", "vae", "--loss-clips", "2"], "needs --source model"),
    ):
        with pytest.raises(SystemExit):
            measure.main(["--out", str(tmp_path), *options])
        assert message in capsys.readouterr().err
