"""The miniature's files among a user's own. Its workflow is what the demo runs: tests/demo/test_trained_miniature.py."""

import pytest

from miniature.weight_files import KINDS, weight_file
from tooling.checkpoint import DIT, VAE

pytestmark = pytest.mark.skipif(
    not (weight_file(DIT).exists() and weight_file(VAE).exists()),
    reason="the miniature's weights are not in miniature/weights",
)


def test_each_file_is_listed_by_the_loaders_of_its_kind_alone(comfy):
    """Every file was in the lists of all four kinds, and the first of some became what a new node loads."""
    mine = comfy.base / "models/vae/mine" / VAE
    mine.parent.mkdir(parents=True)
    mine.touch()
    listed = {kind: comfy.server.get(f"/models/{kind}") for kind in (*KINDS.values(), "checkpoints", "text_encoders")}
    mine.unlink()
    mine.parent.rmdir()
    for name, kind in KINDS.items():
        assert [where for where, files in listed.items() if name in files] == [kind]
    # a user's own file of the same name keeps its own
    assert [name for name in listed["vae"] if "wan_miniature" in name] == [f"mine/{VAE}", VAE]
