"""The rooms of nodes/ know those below them alone, and the packages beside it never look up."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"compat": 0, "page": 1, "settings": 1, "runs": 2, "attention": 3, "training": 4, "comparison": 4, "": 5}
# what a LoRA training saves goes through the save node's own functions
UPWARDS = {("training/lora_files.py", "load_router"), ("training/lora_files.py", "save_router")}


def imported(path):
    """(levels up, module) of every relative import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.level, node.module or "") for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level
    ]


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_knows_those_below_it(room):
    files = sorted((ROOT / "nodes" / room).glob("*.py"))
    assert len(files) > 1
    found = set()
    for file in files:
        for level, module in imported(file):
            # one level up from a room is nodes/, two are the repository
            if level == (2 if room else 1):
                first = module.split(".")[0]
                other = first if first in FLOORS else ""
                if other != room and FLOORS[other] >= FLOORS[room]:
                    found.add((file.relative_to(ROOT / "nodes").as_posix(), module))
    assert found <= UPWARDS


@pytest.mark.parametrize(
    ("package", "known"),
    [
        ("sla2_kernels", set()),
        ("sla2_training", {"sla2_kernels"}),
        ("nodes", {"sla2_kernels", "sla2_training", "miniature"}),
    ],
)
def test_a_package_knows_those_below_it(package, known):
    found = set()
    for file in (ROOT / package).rglob("*.py"):
        depth = len(file.relative_to(ROOT / package).parts)  # levels up to the repository, and one more
        if "stage2" in file.parts:  # runs from a clone, on top of everything: CONTRIBUTING.md
            continue
        found |= {module.split(".")[0] for level, module in imported(file) if level == depth + 1}
    assert found <= known


OURS = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path.is_dir() and list(path.glob("*.py")))} - {
    "__init__",
    "tests",
}


def imported_packages(path):
    """Our packages that a file outside the pack imports, by their absolute names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
    return found & OURS


@pytest.mark.parametrize(
    ("scripts", "known"),
    [
        ("miniature", {"sla2_training"}),
        ("tooling", {"miniature", "sla2_kernels", "sla2_diffusers"}),
        ("benchmarks", {"tooling", "miniature", "sla2_kernels", "sla2_training", "sla2_diffusers"}),
        ("demo.py", {"tooling"}),
        ("run_tests.py", {"tooling"}),
    ],
)
def test_scripts_know_those_below_them(scripts, known):
    """benchmarks know tooling, never the other way round."""
    path = ROOT / scripts
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    found = set().union(*map(imported_packages, files)) - {path.stem}
    assert found <= known
    assert {"tooling", "benchmarks", "nodes"} <= OURS
