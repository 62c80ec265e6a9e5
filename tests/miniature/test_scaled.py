"""The world: one scene at every size, whose objects never meet and pass the image test."""

import pytest
import torch

from miniature import captions, objects, scaled, videos
from miniature.captions import Caption


def scenes(height=128, width=208, frames=81, seed=0, motion="bounce"):
    caption = Caption("red", "balls", motion, "tiles", "left")
    return scaled.simulate([caption] * 16, frames=frames, height=height, width=width, seed=seed)


@pytest.mark.parametrize("motion", captions.MOTIONS)
@pytest.mark.parametrize(("height", "width"), [(480, 832), (160, 160)])
def test_objects_stay_inside_and_apart(motion, height, width):
    world = scenes(height, width, motion=motion)
    margin = world.radius[:, None, :, None]
    assert (world.position >= margin - 1e-3).all()
    assert (world.position <= torch.tensor([width, height]) - margin + 1e-3).all()
    distance = (world.position[:, :, 0] - world.position[:, :, 1]).norm(dim=-1)
    assert (distance > 1.1 * world.radius.sum(1, keepdim=True)).all()


@pytest.mark.parametrize("motion", captions.MOTIONS)
def test_objects_move_evenly_and_far(motion):
    world = scenes(motion=motion)
    step = (world.position[:, 1:] - world.position[:, :-1]).norm(dim=-1) / 128
    assert step.max() < 0.016
    reach = (world.position.amax(1) - world.position.amin(1)).amax((1, 2)) / 128
    assert (reach > 0.4).all()


def test_bouncing_objects_are_released_at_rest_at_the_top_and_the_bottom():
    world = scenes(480, 832)
    left, right = (world.position[:, :, i, 1] - 240 for i in (0, 1))
    torch.testing.assert_close(left, -right, atol=1e-3, rtol=0)
    torch.testing.assert_close(left[:, 0].abs(), torch.full((16,), 480 * (0.5 - scaled.RADIUS)))
    assert (left[:, :1].abs() >= left.abs()).all() and left[:, 0].unique().numel() == 2


def test_circling_objects_start_side_by_side_or_one_above_the_other():
    world = scenes(480, 832, motion="circle")
    apart = (world.position[:, 0, 0] - world.position[:, 0, 1]).abs()
    assert (apart.amin(1) < 1e-3).all() and apart.argmax(1).unique().numel() == 2


def test_a_smaller_picture_shows_the_same_scene():
    large, small = (scenes(height, 2 * height, frames=9) for height in (128, 64))
    torch.testing.assert_close(large.position, 2 * small.position)
    torch.testing.assert_close(large.floor_wave, small.floor_wave / 2)
    one = videos.render(large.select(torch.arange(2)), frames=9, height=128, width=256)
    shrunk = torch.nn.functional.avg_pool3d(one, (1, 2, 2))
    other = videos.render(small.select(torch.arange(2)), frames=9, height=64, width=128)
    assert (shrunk - other).abs().mean() < 0.03


def test_seeds_differ_and_repeat():
    assert torch.equal(scenes(seed=3).position, scenes(seed=3).position)
    starts = scenes(seed=3).position[:, 0]
    assert (starts.std(0) > 5).any()
    assert not torch.equal(starts, scenes(seed=4).position[:, 0])


def test_a_picture_higher_than_wide_is_refused():
    with pytest.raises(ValueError, match="swap width and height"):
        scenes(208, 128)


@pytest.mark.parametrize("caption", captions.all_captions()[::27], ids=str)
def test_rendered_scenes_pass_the_image_test(caption):
    world = scaled.simulate([caption], frames=24, height=128, width=208, seed=3)
    video = videos.render(world, frames=24, height=128, width=208)[0]
    found = objects.examine(video, caption)
    assert found.share == 1.0, found.shares()


def test_rope_distances_are_those_of_480_pixels():
    assert [scaled.rope_scale(height) for height in (480, 240, 160)] == [1.0, 2.0, 3.0]
