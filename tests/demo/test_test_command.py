"""The README's test command: what it adds up, and what its last lines say."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import run_tests
from tooling.audit import judge
from tooling.environment import Environment, SetupError

MARKED = """
import pytest
@pytest.fixture(autouse=True)
def needs(request):
    request.node.user_properties.append(("comfyui", "needed"))
def test_e(): pass
def test_f(): pytest.skip("no ComfyUI found at /nowhere")
"""


def pytest_report(folder, source):
    """(JUnit report, exit status) of a test file."""
    file, report = folder / "test_part.py", folder / "report.xml"
    file.write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    done = subprocess.run([*command, f"--junitxml={report}", str(file)], cwd=folder, capture_output=True, check=False)
    return report, done.returncode


def test_counts_of_several_pytest_processes_add_up(tmp_path):
    counts = run_tests.Counts()
    assert counts.add(*pytest_report(tmp_path, "def test_a(): assert 1\ndef test_b(): assert 0")) == (2, 0)
    source = "import pytest\ndef test_c(): pytest.skip('x')\ndef test_d(x): pass"
    assert counts.add(*pytest_report(tmp_path, source)) == (1, 1)
    assert str(counts) == "1 passed, 2 failed, 1 skipped" and not counts.broken
    counts.add(tmp_path / "absent.xml", 139)
    assert counts.broken


def test_comfyui_tests_are_counted_with_the_reasons_why_not(tmp_path):
    counts = run_tests.Counts()
    assert counts.comfyui() == "ComfyUI tests: NONE RAN, there were none among the tests chosen"
    counts.add(*pytest_report(tmp_path, MARKED))
    assert counts.comfyui() == "ComfyUI tests: 1 ran, 1 left out\n  1 x no ComfyUI found at /nowhere"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty repository in place of ours, whose requirements are not looked at."""
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    for name in ("INTERPRETER", "COMPILE", "WEB"):
        monkeypatch.setattr(run_tests, name, tmp_path / "tests" / name.lower())
    monkeypatch.setattr(run_tests, "audit", lambda environment: ("audited", []))
    return tmp_path


def test_compiled_modules_are_kept_in_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX")
    run_tests.keep_bytecode(Environment(None))
    assert os.environ["PYTHONDONTWRITEBYTECODE"] == "1" and "PYTHONPYCACHEPREFIX" not in os.environ
    run_tests.keep_bytecode(Environment(tmp_path / "venv"))
    (tmp_path / "module.py").write_text("x = 1")
    subprocess.run([sys.executable, "-c", "import module"], cwd=tmp_path, check=True)
    assert list((tmp_path / "venv" / "bytecode").rglob("module.*.pyc")) and not (tmp_path / "__pycache__").exists()


class Nowhere:
    def create(self):
        pass


def test_the_oldest_triton_is_installed_while_the_rest_is_and_its_failure_is_one_of_the_set_up(monkeypatch):
    begun = threading.Event()

    def fails(environment):
        begun.set()
        raise SetupError("no Triton 3.2")

    monkeypatch.setattr(run_tests, "oldest_triton", fails)
    monkeypatch.setattr(run_tests, "prepare", lambda *_: begun.wait(60) or pytest.fail("one after the other"))
    with pytest.raises(SetupError, match=r"no Triton 3\.2"):
        run_tests.set_up(Nowhere(), None, everything=True)
    monkeypatch.setattr(run_tests, "prepare", lambda *_: None)
    run_tests.set_up(Nowhere(), None, everything=False)


def test_lost_kernel_tests_are_loud_and_no_success(repository):
    counts = run_tests.Counts()
    assert run_tests.run_all(Environment(None), counts) == [
        "!! Kernels were NOT compiled with Triton 3.2.0: --here installs nothing.",
        "!! Kernels were NOT run compiled with the installed Triton: there are no tests of them.",
        "!! Kernels were NOT run in Triton's interpreter: there are no tests of them.",
        "audited",
    ]
    assert counts.broken


@pytest.mark.parametrize(
    ("source", "note"),
    [
        ("", "!! Kernels were NOT run in X: there are no tests of them."),
        (
            "import pytest\npytest.skip('no Triton', allow_module_level=True)",
            "!! Kernels were NOT run in X: all 1 tests were skipped (see above).",
        ),
        ("import os\ndef test_a(): assert os.environ['TRITON_INTERPRET'] == '1'", None),
    ],
    ids=["empty", "skipped", "runs"],
)
def test_kernel_tests_that_did_not_run_are_loud(repository, source, note):
    run_tests.INTERPRETER.mkdir(parents=True)
    (run_tests.INTERPRETER / "test_some.py").write_text(source)
    counts = run_tests.Counts()
    suite = run_tests.kernel_suite(run_tests.INTERPRETER, "in X", TRITON_INTERPRET="1")
    assert run_tests.run_suites(Environment(None), counts, [suite], 1) == ([note] if note else [])
    assert counts.broken == ("no tests of them" in (note or ""))


def test_every_test_is_in_one_suite_and_failures_of_all_count(repository):
    marked = "import pytest, os\n@pytest.mark.comfyui\ndef test_c(): assert not os.environ.get('TRITON_INTERPRET')\n"
    files = {"tests/test_a.py": "def test_b(): assert 0\n" + marked}
    for folder in (run_tests.INTERPRETER, run_tests.COMPILE, run_tests.WEB):
        files[f"{folder.relative_to(repository)}/test_{folder.name}.py"] = "def test_bfloat16(): pass"
    for name, source in files.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(source)
    counts = run_tests.Counts()
    old = repository / "old triton"
    assert run_tests.run_suites(Environment(None), counts, run_tests.suites(old), 2) == []
    assert str(counts) == "5 passed, 1 failed, 0 skipped" and not counts.broken


def test_some_tests_of_the_page_run_in_the_newest_one_too(tmp_path):
    environment = Environment(tmp_path)
    assert run_tests.newest_page(environment) is None and run_tests.newest_page(Environment(None)) is None
    page = tmp_path / "newest-page/comfyui_frontend_package/static"
    page.mkdir(parents=True)
    assert run_tests.newest_page(environment) == page
    (suite,) = [suite for suite in run_tests.suites(None, page) if suite.variables.get("COMFYUI_FRONTEND") == str(page)]
    assert suite not in list(run_tests.suites(None))
    *files, _, chosen = suite.arguments
    text = "".join(Path(file).read_text(encoding="utf-8") for file in files)
    # every word still chooses something
    assert all(
        word in text or word in ("classic_dark", "vue_light") for word in re.findall(r"\w+", chosen) if len(word) > 3
    )


def test_a_vulnerable_requirement_is_no_success(repository, monkeypatch):
    monkeypatch.setattr(run_tests, "audit", lambda environment: ("found", ["numpy"]))
    monkeypatch.setattr(run_tests, "run_suites", lambda *_: [])
    counts = run_tests.Counts()
    assert run_tests.run_all(Environment(None), counts)[-1] == "found" and counts.broken


NUMPY = {"name": "numpy", "version": "2.4.6", "vulns": []}
SKIPPED = {"name": "safetensors", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("packages", "sentence", "vulnerable"),
    [
        ([NUMPY], "pip-audit: 1 packages audited, 0 skipped, 0 vulnerable.", []),
        ([NUMPY, SKIPPED], "pip-audit: 1 packages audited, 1 skipped, 0 vulnerable.", []),
        (
            [NUMPY | {"vulns": [{"id": "X"}]}],
            "pip-audit: 1 packages audited, 0 skipped, 1 vulnerable: numpy.",
            ["numpy"],
        ),
        ([SKIPPED], "pip-audit could NOT run: 0 packages audited (Dependency not found).", None),
        ([], "pip-audit could NOT run: 0 packages audited (none listed).", None),
    ],
)
def test_an_audit_of_nothing_is_none(packages, sentence, vulnerable):
    assert judge(json.dumps({"dependencies": packages}), "") == (sentence, vulnerable)


def test_an_audit_that_fails_says_its_last_line():
    assert judge("", "Traceback\nConnectionError: no network") == (
        "pip-audit could NOT run: ConnectionError: no network",
        None,
    )
