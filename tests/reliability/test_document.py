"""docs/RELIABILITY.md names tests: each of them exists, and each test of this folder has its row."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
DOCUMENT = (TESTS.parent / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w/]+\.py)::(test_\w+)`", DOCUMENT)


def functions(path):
    return set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_test_that_is_named_exists():
    missing = [(file, name) for file, name in NAMED if name not in functions(TESTS / file)]
    assert len(NAMED) > 100 and missing == []


def test_every_row_names_a_test():
    rows = [line for line in DOCUMENT.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    assert len(rows) > 60 and [row for row in rows if "::test_" not in row.split("|")[-2]] == []
    assert all(row.count("|") == 4 for row in rows)


def test_every_test_of_this_folder_has_its_row():
    here = {
        (f"reliability/{path.name}", name) for path in TESTS.glob("reliability/test_*.py") for name in functions(path)
    }
    left_out = {
        name
        for file, name in here - set(NAMED)
        if file != "reliability/test_document.py"
        and not name.startswith(("test_an_unspoilt", "test_a_run_without_nan"))
    }
    assert left_out == set()
