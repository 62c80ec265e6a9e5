"""A tiny training, shared by the tests that need weights."""

import pytest

from miniature import train

TINY = ["--tiny", "--steps", "3", "--vae-dim", "8", "--layers", "2", "--small-clips", "4", "--full-clips", "2",
        "--print-seconds", "0", "--no-compile", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="session")
def train_tiny():
    """Call with a folder: trains both models for three steps there."""
    return lambda folder, *options: train.main(["all", "--out", str(folder), *TINY, *options])


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory, train_tiny):
    """Folder with the weights, logs and pictures of a tiny training."""
    folder = tmp_path_factory.mktemp("tiny")
    train_tiny(folder)
    return folder
