"""Captions and procedural videos."""

import pytest
import torch

from miniature import captions, scaled, videos
from miniature.captions import Caption


def test_word_vectors_never_change():
    vector = captions.word_vector("red")
    assert vector.shape == (4096,)
    assert set(vector.tolist()) == {-1.0, 1.0}
    # From the SHA-256 of "red/0": the weights shipped with the repository depend on these bits.
    assert vector[:8].tolist() == [-1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, -1.0]


def test_captions_that_share_words_share_vectors():
    one = captions.embed("two red balls bounce over tiles, camera still")
    two = captions.embed("two blue balls bounce over tiles, camera still")
    assert one.shape == (1, captions.CONTEXT_TOKENS, 4096)
    assert [i for i in range(16) if not torch.equal(one[0, i], two[0, i])] == [1]
    assert captions.embed("").abs().sum() == 0


def test_too_long_a_caption_says_so():
    with pytest.raises(ValueError, match="17 words.*at most 16"):
        captions.embed("a " * 17)


def test_held_out_captions_are_new_combinations_of_known_words():
    train, held_out = captions.split_captions()
    assert len(held_out) == captions.HELD_OUT_COUNT
    assert len(set(train) | set(held_out)) == len(captions.all_captions()) == 216
    known = {word for caption in train for word in str(caption).split()}
    assert {word for caption in held_out for word in str(caption).split()} <= known


def scenes(frames=40, seed=0, **choice):
    base = {"colour": "red", "shape": "balls", "motion": "bounce", "background": "tiles", "camera": "still"}
    return scaled.simulate([Caption(**{**base, **choice})] * 8, frames=frames, height=96, width=96, seed=seed)


def test_equal_seeds_give_equal_videos_and_others_do_not():
    one, two, other = (videos.render(scenes(seed=seed), frames=3, height=96, width=96) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_window_is_a_cut_of_the_whole():
    world = scenes(camera="left", background="clouds")
    whole = videos.render(world, frames=20, height=96, width=96)
    origin = torch.tensor([[24, 40]]).expand(8, 2)
    part = videos.render(world, first_frame=7, frames=5, origin=origin, height=32, width=48)
    torch.testing.assert_close(part, whole[:, :, 7:12, 40:72, 24:72], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change",
    [{"colour": "blue"}, {"shape": "stars"}, {"motion": "circle"}, {"background": "waves"}, {"camera": "right"}],
)
def test_every_factor_of_a_caption_is_visible(change):
    base = videos.render(scenes(), frames=20, height=96, width=96)
    changed = videos.render(scenes(**change), frames=20, height=96, width=96)
    assert (base - changed).abs().mean() > 0.005


def test_a_pan_moves_the_floor_and_not_the_objects():
    still, pan = scenes(), scenes(camera="left")
    assert torch.equal(still.position, pan.position)
    assert (still.pan == 0).all()
    assert (pan.pan > 0).all()
