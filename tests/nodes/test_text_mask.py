"""Masks over text: the masked tokens leave the keys; every other mask keeps the call dense."""

import pytest
import torch

HEADS, DIM = 2, 64
TEXT, VIDEO = 100, 500


def call(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, TEXT + VIDEO, HEADS * DIM, generator=generator) for _ in range(3)]


def text_mask(live=40, behind=False, kind="additive"):
    mask = torch.zeros(TEXT + VIDEO)
    mask[VIDEO + live if behind else live : None if behind else TEXT] = torch.finfo(torch.float32).min
    return (mask == 0 if kind == "bool" else mask)[None, None]


@pytest.mark.parametrize("kind", ["additive", "bool"])
@pytest.mark.parametrize("front", [TEXT, 0])
def test_sparsity_0_equals_dense_under_a_text_mask(bench, front, kind):
    b = bench(grid=(5, 10, 10), front=front, sparsity=0.0)
    mask = text_mask(behind=front == 0, kind=kind)
    b.model_call()
    for layer in (0, 1):
        out = b.attend(*call(layer), HEADS, mask=mask.clone(), layer=layer)
        torch.testing.assert_close(out, b.attention(*call(layer), HEADS, mask=mask), rtol=1e-4, atol=1e-5)
        assert b.run.layers[layer].sparse == 1


def test_the_mask_is_read_once_per_model_call(bench, monkeypatch, pack_module):
    b, reads = bench(grid=(5, 10, 10), front=TEXT), []
    calls = pack_module("nodes.attention.model_call")
    monkeypatch.setattr(calls, "valid_keys", lambda *args, read=calls.valid_keys: reads.append(1) or read(*args))
    for _ in range(2):
        b.model_call()
        mask = text_mask()
        for layer in range(3):
            b.attend(*call(), HEADS, mask=mask, layer=layer)
    assert len(reads) == 2


VIDEO_MASKED = text_mask()
VIDEO_MASKED[..., -1] = torch.finfo(torch.float32).min
SOFT = text_mask()
SOFT[..., 3] = -1.0
MASKS = {"over the video": VIDEO_MASKED, "with weights": SOFT, "per query": torch.zeros(1, 600, 600)}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_other_masks_stay_dense(bench, mask):
    b = bench(grid=(5, 10, 10), front=TEXT)
    b.model_call()
    assert torch.equal(b.attend(*call(), HEADS, mask=mask), b.attention(*call(), HEADS, mask=mask))
    assert b.run.layers[0].dense == {"the call has an attention mask": 1}


def test_a_family_without_text_in_its_masks_stays_dense(bench):
    b = bench(grid=(5, 10, 10), front=TEXT, text_mask=False)
    b.model_call()
    b.attend(*call(), HEADS, mask=text_mask())
    assert b.run.layers[0].dense == {"the call has an attention mask": 1}


def test_a_batch_of_unlike_masks_stays_dense(bench):
    b = bench(grid=(5, 10, 10), front=TEXT)
    b.model_call()
    q, k, v = (torch.cat([t, t]) for t in call())
    mask = torch.stack([text_mask(40)[0], text_mask(50)[0]])
    assert torch.equal(b.attend(q, k, v, HEADS, mask=mask), b.attention(q, k, v, HEADS, mask=mask[:, None]))
    assert b.run.layers[0].dense == {"the videos of this batch have unlike text masks": 1}
