"""A tiny training, shared by the tests that need weights."""

import pytest

from miniature import train

TINY = ["--tiny", "--steps", "3", "--vae-dim", "8", "--layers", "2", "--small-clips", "4", "--full-clips", "2",
        "--print-seconds", "0", "--no-compile", "--device", "cpu"]  # fmt: skip


# a quarter of what --tiny takes: the convolutions of larger pictures are most of a CPU's time here
SMALLER = {
    "world": (9, 32, 32),
    "vae_batches": [(5, 16, 2), (9, 16, 1)],
    "small": (5, 32, 32),
    "full": (9, 32, 32),
}


@pytest.fixture(scope="session")
def train_tiny():
    """Call with a folder: trains both models, or one stage, for three steps there."""

    def run(folder, *options, stage="all"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(train, "TINY", train.TINY | SMALLER)
            train.main([stage, "--out", str(folder), *TINY, *options])

    return run


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory, train_tiny):
    """Folder with the weights, logs and pictures of a tiny training."""
    folder = tmp_path_factory.mktemp("tiny")
    train_tiny(folder)
    return folder
