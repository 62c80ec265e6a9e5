"""The captions of the miniature world and their conditioning tensors.

There is no text encoder. A word becomes a fixed vector of +1 and -1 taken from the SHA-256 of its letters, so a caption
means the same tensor on every machine and in every library version, and captions that share words share vectors.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass

import numpy as np
import torch

TEXT_DIM = 4096
CONTEXT_TOKENS = 16

COLOURS = ("red", "yellow", "green", "blue")
SHAPES = ("balls", "boxes", "stars")
MOTIONS = ("bounce", "circle")
BACKGROUNDS = ("tiles", "waves", "clouds")
CAMERAS = ("still", "left", "right")
HELD_OUT_COUNT = 24
_HELD_OUT_SEED = 2602


@dataclass(frozen=True)
class Caption:
    """What a video shows, as one choice per factor; `str(caption)` is the sentence the model is conditioned on."""

    colour: str
    shape: str
    motion: str
    background: str
    camera: str

    def __str__(self) -> str:
        camera = "camera still" if self.camera == "still" else f"camera pans {self.camera}"
        return f"two {self.colour} {self.shape} {self.motion} over {self.background}, {camera}"

    def indices(self) -> tuple[int, int, int, int, int]:
        """Position of each choice in COLOURS, SHAPES, MOTIONS, BACKGROUNDS, CAMERAS."""
        return (
            COLOURS.index(self.colour),
            SHAPES.index(self.shape),
            MOTIONS.index(self.motion),
            BACKGROUNDS.index(self.background),
            CAMERAS.index(self.camera),
        )


def all_captions() -> list[Caption]:
    """Every combination (216), in a fixed order."""
    return [Caption(*choice) for choice in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS, CAMERAS)]


def split_captions() -> tuple[list[Caption], list[Caption]]:
    """(training captions, held-out captions): the held-out combinations never occur in training, their words do."""
    captions = all_captions()
    held_out = set(random.Random(_HELD_OUT_SEED).sample(range(len(captions)), HELD_OUT_COUNT))
    train = [caption for index, caption in enumerate(captions) if index not in held_out]
    return train, [captions[index] for index in sorted(held_out)]


def word_vector(word: str) -> np.ndarray:
    """(4096,) float32 of +1 and -1, a pure function of the word."""
    digests = b"".join(hashlib.sha256(f"{word}/{part}".encode()).digest() for part in range(TEXT_DIM // 256))
    bits = np.unpackbits(np.frombuffer(digests, dtype=np.uint8))
    return bits.astype(np.float32) * 2.0 - 1.0


def embed(text: str) -> torch.Tensor:
    """(1, 16, 4096) float32 conditioning of a sentence; words first, then zeros. The empty sentence is all zeros.

    Any words are accepted (unknown ones get a vector that the model never saw).

    Raises:
        ValueError: the sentence has more than 16 words.
    """
    words = str(text).lower().replace(",", " ").split()
    if len(words) > CONTEXT_TOKENS:
        raise ValueError(f"caption has {len(words)} words, the miniature takes at most {CONTEXT_TOKENS}: shorten it")
    out = torch.zeros(1, CONTEXT_TOKENS, TEXT_DIM)
    for position, word in enumerate(words):
        out[0, position] = torch.from_numpy(word_vector(word))
    return out
