"""Fresh random inputs in every run. A failing test prints its seed; SLA2_TEST_SEED=<seed> repeats the run."""

import os
import secrets
import zlib

import pytest
import torch

RUN_SEED = int(os.environ.get("SLA2_TEST_SEED") or secrets.randbelow(2**31))


@pytest.fixture
def generator(request):
    """A seeded torch.Generator of the test's own: the order of the tests changes no input."""
    print(f"SLA2_TEST_SEED={RUN_SEED}")
    return torch.Generator().manual_seed(RUN_SEED + zlib.crc32(request.node.nodeid.encode()))
