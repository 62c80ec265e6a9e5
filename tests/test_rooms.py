"""The rooms of nodes/ import those below them alone, and no package imports one above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"compat": 0, "page": 1, "settings": 1, "runs": 2, "attention": 3, "training": 4, "comparison": 4, "": 5}
OURS = {"nodes", "sla2_kernels", "sla2_training", "sla2_diffusers", "miniature", "benchmarks", "tooling"}


def relative_imports(path):
    """(levels up, module) of every relative import, wherever in the file it stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.level, node.module or "") for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level
    ]


def absolute_imports(path):
    """Names of the packages that a file imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_those_below_it(room):
    files = sorted((ROOT / "nodes" / room).glob("*.py"))
    assert len(files) > 1
    found = set()
    for file in files:
        for level, module in relative_imports(file):
            # one level up from a room is nodes/, two are the repository
            if level == (2 if room else 1):
                first = module.split(".")[0]
                other = first if first in FLOORS else ""
                if other != room and FLOORS[other] >= FLOORS[room]:
                    found.add((file.relative_to(ROOT / "nodes").as_posix(), module))
    assert not found


@pytest.mark.parametrize(
    ("package", "known"),
    [
        ("sla2_kernels", set()),
        ("sla2_training", {"sla2_kernels"}),
        ("sla2_diffusers.py", {"sla2_kernels"}),
        ("nodes", {"sla2_kernels", "sla2_training", "miniature"}),
        ("miniature", {"sla2_training", "sla2_kernels"}),
        ("tooling", {"miniature", "sla2_kernels", "sla2_diffusers"}),
        ("benchmarks", {"tooling", "miniature", "sla2_kernels", "sla2_training", "sla2_diffusers"}),
        ("demo.py", {"tooling"}),
        ("run_tests.py", {"tooling"}),
    ],
)
def test_a_package_imports_those_below_it(package, known):
    place = ROOT / package
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    found = set()
    for file in files:
        depth = len(file.relative_to(ROOT).parts)  # levels up to the repository
        relative = {module.split(".")[0] for level, module in relative_imports(file) if level == depth}
        found |= relative | (absolute_imports(file) & OURS)
    assert found - {package} <= known


def test_of_the_miniature_the_nodes_import_the_captions_alone():
    imported = (module for file in (ROOT / "nodes").rglob("*.py") for _, module in relative_imports(file))
    assert {module for module in imported if module.startswith("miniature.")} == {"miniature.captions"}


def test_stage_1_imports_nothing_of_stage_2():
    """Stage 2 runs from a clone with packages of its own; the nodes and stage 1 do without."""
    files = (ROOT / "sla2_training").glob("*.py")
    assert not {m for file in files for _, m in relative_imports(file) if "stage2" in m.split(".")}
