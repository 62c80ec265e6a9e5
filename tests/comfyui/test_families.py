"""Every model family on ComfyUI's own class, at miniature size: the video's self-attention runs sparse, nothing else does.

Each ComfyUI at hand runs them once, in a process of its own: the one of the other tests, and older ones in folders
"ComfyUI-*" beside it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from family_models import FAMILIES, RECORDED

from tooling.comfyui import find_comfyui
from tooling.paths import ROOT

HERE = Path(__file__).parent
REFERENCE = "the queries are those of the reference image"


def versions():
    path, _ = find_comfyui()
    return [] if path is None else [path, *sorted(p for p in path.parent.glob("ComfyUI-*") if (p / "comfy").is_dir())]


@pytest.fixture(scope="session")
def probe_of(comfyui_path, comfy_scripts):
    """probe_of(path of a ComfyUI) is what family_probe.py found there."""
    found = {}

    def probe(path):
        if path not in found:
            arguments = [str(HERE / "family_probe.py"), str(path), str(ROOT)]
            if path == comfyui_path:
                done = comfy_scripts.run(*arguments, timeout=600)
            else:
                done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]
            found[path] = json.loads(done.stdout.splitlines()[-1])
        return found[path]

    return probe


def documented():
    """{family: cells of its row} of the table in docs/FAMILIES.md."""
    lines = (ROOT / "docs" / "FAMILIES.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {cells[0]: cells for cells in rows if cells[0] in FAMILIES}


def test_every_family_is_documented():
    assert list(documented()) == list(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("path", versions() or [None], ids=lambda path: path.name if path else "no ComfyUI")
def test_family(probe_of, path, name):
    found, (*_, sparse, other) = probe_of(path)[name], FAMILIES[name]
    if found.get("missing"):
        pytest.skip(f"{path.name} does not have this model")
    assert "error" not in found, found["error"]
    assert found["family"] is None and found["plain again"]
    if not found["calls"]:  # S2V in 0.3.64 passes its blocks no options: the marks hand them on
        assert found["exact"]["sparse"] == found["sparse"]["sparse"] == sparse
        assert found["exact"]["difference"] < 2e-6 and found["sparse"]["difference"] > 2e-4
        return
    # the exact run's checkpoint brings attention of its own (ComfyUI 0.38), which computes whatever SLA2 does not take
    own = found["exact"]["own attention"]
    assert found["exact"]["past own attention"] == 0 and own >= other + len(found["exact"]["dense"])
    # the sparse run's calls come in containers (0.37), where this ComfyUI has them; all are emptied
    assert found["sparse"]["in containers"] in (None, [found["calls"], 0])
    for run, seen in ((found["exact"], 0), (found["sparse"], other)):
        assert run["sparse"] == sparse and run["other"] == seen and run["unreached"] == 0
        assert set(run["dense"]) <= {REFERENCE} and run["model_calls"] == 1
        # every call the model makes is accounted for
        assert run["sparse"] + other + len(run["dense"]) == found["calls"]
        assert run["finite"]
    video = run["sparse"] + len(run["dense"])
    assert documented()[name][3:5] == [f"{run['sparse']} of {video}", f"{run['sparse']} of {found['calls']}"]
    assert found["exact"]["difference"] < 2e-6
    assert found["sparse"]["difference"] > 2e-4
    # of all query and key tokens; beside small references most key blocks hold tokens of two kinds, and are always attended
    assert all(share > 0.06 for share in found["sparse"]["sparsity"])


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("path", versions() or [None], ids=lambda path: path.name if path else "no ComfyUI")
def test_nothing_made_inside_a_recorded_scope_outlives_it(probe_of, path, name):
    """What core's recording of allocations would have to keep, of the plain model and of a run with everything we keep."""
    found = probe_of(path)[name]
    if found.get("missing"):
        pytest.skip(f"{path.name} does not have this model")
    assert "error" not in found, found["error"]
    assert found["left"] == [{"block": 0, "call": 0}] * 3
