"""What the Registry, the Manager and a reader of the README rely on."""

import posixpath
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from sla2_kernels import support
from tooling.archive import packed_files
from tooling.comfyui import RELEASE

ROOT = Path(__file__).resolve().parents[1]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    return tomllib.loads(text("pyproject.toml"))


def test_requirements_agree_and_leave_torch_and_triton_alone(project):
    listed = set(text("requirements.txt").split())
    assert listed == {name for name in project["project"]["dependencies"] if "frontend" not in name}
    assert {name.split(">=")[0] for name in listed} == {"numpy", "safetensors"}


def test_requirements_are_lower_bounds_only(project):
    for requirement in (*text("requirements.txt").split(), *project["project"]["dependencies"]):
        assert re.fullmatch(r"[a-z-]+>=\d+(\.\d+)*", requirement), requirement


def test_nothing_runs_when_the_pack_is_installed_or_before_comfyui_starts():
    # the Manager runs install.py, ComfyUI prestartup_script.py; pip runs setup.py
    for name in ("install.py", "uninstall.py", "prestartup_script.py", "setup.py", "install.bat", "install.sh"):
        assert not (ROOT / name).exists(), name


def test_security_rules_are_on_for_what_is_shipped(project):
    lint = project["tool"]["ruff"]["lint"]
    assert "S" in lint["select"] and not [rule for rule in lint["ignore"] if rule.startswith("S")]
    shipped = ("__init__", "nodes", "sla2_kernels", "sla2_training", "sla2_diffusers")
    for pattern, rules in lint["per-file-ignores"].items():
        if pattern.startswith(shipped):
            assert "*" not in pattern and {rule for rule in rules if rule.startswith("S")} <= {"S105", "S106"}


def test_registry_fields(project):
    name = project["project"]["name"]
    assert re.fullmatch(r"[a-z][a-z0-9._-]{1,98}", name) and "comfyui" not in name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert project["project"]["license"] == {"file": "LICENSE"}
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= set(project["tool"]["comfy"])
    environments = [entry for entry in project["project"]["classifiers"] if entry.startswith("Environment")]
    assert environments == ["Environment :: GPU :: NVIDIA CUDA"]


def test_placeholders_are_marked_once_and_named_in_the_checklist():
    marked = [line for line in text("pyproject.toml").splitlines() if "RELEASE" in line]
    assert [line.split(" = ")[0] for line in marked] == ["Repository", "PublisherId"]
    checklist = text("CONTRIBUTING.md").split("## Release checklist")[1]
    assert "`PublisherId`" in checklist and "`Repository`" in checklist
    for placeholder in ("publisher-id", "PUBLISHER/"):
        assert text("pyproject.toml").count(placeholder) == 1


def test_the_version_has_its_section_in_the_changelog(project):
    assert f"## {project['project']['version']}\n" in text("CHANGELOG.md")


def test_floors_agree(project):
    floors = project["tool"]["sla2"]
    assert floors["minimum-triton"] == ".".join(map(str, support.MIN_TRITON))
    assert f"PyTorch {floors['minimum-torch']}, Triton {floors['minimum-triton']}, Python 3.10" in text("README.md")
    assert project["project"]["requires-python"] == ">=3.10"
    comfyui = project["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    tested = re.search(rf"ComfyUI {re.escape(comfyui)} or newer \(tested on (.*?)\)", text("README.md"))[1]
    assert tested.split(" and ") == [RELEASE.removeprefix("v"), comfyui]
    from run_tests import OLDEST_TRITON

    assert OLDEST_TRITON.startswith(floors["minimum-triton"] + ".")


def triton_table():
    """(torch, Triton, what pip is told on Windows) of every row of the README's table."""
    rows = re.findall(
        r"^\| (2\.[\d., ]+) \| (3\.\d+) \| .*?`pip install \"?([^\"`]+)\"?`.* \|$", text("README.md"), re.MULTILINE
    )
    for torch_versions, triton, requirement in rows:
        yield from ((torch_version, triton, requirement) for torch_version in torch_versions.split(", "))


@pytest.mark.parametrize(("torch_version", "triton", "requirement"), list(triton_table()))
def test_the_readmes_triton_table_is_the_packs_own(torch_version, triton, requirement, monkeypatch):
    pinned = triton not in support.NOT_FOR_WINDOWS
    assert requirement == (f"triton-windows=={triton}.*" if pinned else "triton-windows")
    monkeypatch.setattr(torch, "__version__", f"{torch_version}.0+cu126")
    monkeypatch.setattr(support.sys, "platform", "win32")
    assert support.triton_install_command().split("install ")[1].strip('"') == requirement
    monkeypatch.setattr(support.sys, "platform", "linux")
    assert support.triton_install_command().endswith(f'-m pip install "triton=={triton}.*"')


def test_the_readmes_triton_table_is_whole():
    assert {row[0]: row[1] for row in triton_table()} == support.TRITON_OF_TORCH


def test_an_unknown_torch_gets_the_newest_triton(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr(support.sys, "platform", "linux")
    assert support.triton_install_command().endswith("-m pip install triton")


def test_the_readmes_commands_exist():
    commands = re.search(r"## Try it\n.*?```\n(.*?)```", text("README.md"), re.DOTALL)[1].split("\n")
    for command in filter(None, commands):
        assert command.startswith("python ") and (ROOT / command.split()[1]).is_file()
    assert "run_tests.py" in text(".ci/run") and (ROOT / ".ci/run").stat().st_mode & 0o111


PACKED = packed_files()
PAGES = [name for name in PACKED if name.endswith(".md")]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_of_the_archive(page):
    """A folder, too: where one of its files is packed."""
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text(page)) if "://" not in link]
    targets = [posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in links if link]
    assert [link for link in targets if not any(f"{name}/".startswith(f"{link}/") for name in PACKED)] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_command_that_is_not_in_the_archive_is_said_to_need_a_clone(page):
    """In the command's section, or at the head of its page."""
    head, *sections = re.split(r"^## ", text(page), flags=re.MULTILINE)
    for section in (head, *sections):
        for module, file in re.findall(r"\bpython (?:-m ([\w.]+)|([\w./]+\.py))", section):
            named = file or module.replace(".", "/")
            packed = {named, f"{named}.py", f"{named}/__main__.py"} & set(PACKED)
            ours = (ROOT / named.split("/")[0]).exists()
            assert packed or not ours or "clone" in head + section, f"{named} is not in the archive"


def test_every_environment_variable_is_in_the_readme():
    table = text("README.md").split("## Environment variables")[1]
    for folder in ("sla2_kernels", "nodes", "sla2_training"):
        for file in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", file.read_text(encoding="utf-8")):
                assert f"`{name}`" in table, f"{file.name} reads {name}"


def test_licence_is_the_apache_licence():
    assert "Apache License" in text("LICENSE")[:200] and len(text("LICENSE")) > 11000


def test_test_files_have_unique_names():
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_the_pack_imports_without_comfyui_and_without_triton():
    code = (
        "import sys, importlib.util\n"
        "sys.modules['triton'] = None\n"
        f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(ROOT)!r}])\n"
        "pack = importlib.util.module_from_spec(spec)\n"
        "sys.modules['pack'] = pack\n"
        "spec.loader.exec_module(pack)\n"
        "import pack.sla2_kernels, torch\n"
        "x = torch.randn(1, 1, 200, 64)\n"
        "assert pack.sla2_kernels.sla2_attention(x, x, x, sparsity=0.5).isfinite().all()\n"
        "assert callable(pack.comfy_entrypoint) and pack.WEB_DIRECTORY\n"
        "assert not {'comfy', 'nodes'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_what_the_archive_leaves_out_exists_and_is_not_needed():
    left_out = [line.rstrip("/") for line in text(".comfyignore").splitlines() if line and not line.startswith("#")]
    assert [name for name in left_out if not (ROOT / name).exists()] == []
    assert {"nodes", "sla2_kernels", "sla2_training", "web", "workflows", "__init__.py"}.isdisjoint(left_out)


@pytest.mark.parametrize(
    "command", [["check", "--output-format", "concise"], ["format", "--check"]], ids=lambda words: words[0]
)
def test_ruff_finds_nothing(command):
    pytest.importorskip("ruff")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout
