"""Small random weights, as a training writes them, shared by the tests that need some."""

import pytest
import torch

from miniature.optim import save_weights
from miniature.train_dit import ABOUT, DIT_FILE
from miniature.train_long import LOG_FILE
from miniature.train_vae import VAE_FILE
from miniature.vae import WanVAE
from miniature.wan import WanConfig, WanModel


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """Folder with the files of a random transformer of 2 layers and a random VAE."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    save_weights(folder / VAE_FILE, WanVAE(8).state_dict(), torch.float16, ABOUT)
    save_weights(folder / DIT_FILE, WanModel(WanConfig(num_layers=2)).state_dict(), torch.bfloat16, ABOUT)
    (folder / LOG_FILE).write_text('{"run": {"sitting": 0}}')
    return folder
