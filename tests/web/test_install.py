"""The pack as the Registry ships it, in a fresh ComfyUI: what the Manager leaves in custom_nodes after unpacking."""

import functools
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from tooling.archive import packed_files
from tooling.locales import english
from tooling.paths import PACK_FOLDER, ROOT
from tooling.server import Server


def archive(target):
    with zipfile.ZipFile(target, "w") as zipped:
        for name in packed_files():
            zipped.write(ROOT / name, name)


def has_manager():
    return importlib.util.find_spec("comfyui_manager") is not None


def unpacked(base):
    with zipfile.ZipFile(base / "served" / "pack.zip") as zipped:
        zipped.extractall(base / "custom_nodes" / PACK_FOLDER)


def by_the_manager(base, comfyui):
    """Lets the Manager install the archive, served over HTTP as the Registry does, and uninstall it; leaves what it installed."""
    pack, copy = base / "custom_nodes" / PACK_FOLDER, base / "installed"
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=base / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as registry:
        threading.Thread(target=registry.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{registry.server_port}/pack.zip"
        command = [sys.executable, str(Path(__file__).with_name("manager_install.py")), url, PACK_FOLDER, str(copy)]
        variables = os.environ | {"COMFYUI_PATH": str(comfyui), "COMFYUI_FOLDERS_BASE_PATH": str(base)}
        done = subprocess.run(command, cwd=base, env=variables, capture_output=True, text=True, check=False)
        registry.shutdown()
    said = done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0 and len(re.findall(r"^(?:un)?installed: \S+ True", done.stdout, re.M)) == 2, said
    assert not pack.exists(), "uninstalling leaves nothing behind"
    copy.rename(pack)


@pytest.fixture(scope="module")
def installed(comfyui_path, tmp_path_factory):
    """Base directory with nothing in it but the archive: installed by the Manager, unpacked by hand where there is none."""
    base = tmp_path_factory.mktemp("fresh")
    for folder in ("models", "custom_nodes", "input", "output", "user", "served"):
        (base / folder).mkdir()
    archive(base / "served" / "pack.zip")
    if has_manager():
        by_the_manager(base, comfyui_path)
    else:
        unpacked(base)
    return base


@pytest.fixture(scope="module")
def fresh(installed, comfyui_path):
    """A ComfyUI on that base directory."""
    with Server(comfyui_path, installed, OMP_NUM_THREADS="1") as running:
        yield running


@pytest.mark.skipif(not has_manager(), reason="comfyui-manager is not installed")
def test_the_manager_leaves_the_archive_as_unpacking_does(installed):
    """So that one ComfyUI stands for both ways to install."""
    pack = installed / "custom_nodes" / PACK_FOLDER
    assert (pack / ".tracking").is_file()
    with zipfile.ZipFile(installed / "served" / "pack.zip") as zipped:
        shipped = {name: zipped.read(name) for name in zipped.namelist()}
    files = [path for path in pack.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    found = {path.relative_to(pack).as_posix(): path.read_bytes() for path in files if path.name != ".tracking"}
    assert found == shipped


def test_every_node_template_and_help_is_there(fresh):
    nodes = english(fresh.get("/object_info"))
    assert {
        "SLA2LoadRouter",
        "SLA2ApplyAttention",
        "SLA2Report",
        "SLA2TrainRouter",
        "SLA2SaveRouter",
        "SLA2Compare",
    } <= set(nodes)
    assert fresh.get("/workflow_templates")[PACK_FOLDER]
    assert f"/extensions/{PACK_FOLDER}/js/sla2.js" in fresh.get("/extensions")
    assert "Accelerate this model" in [entry["name"] for entry in fresh.get("/global_subgraphs").values()]
    assert "SLA2Compare" in fresh.get("/i18n")["zh"]["nodeDefs"]


def test_the_import_is_without_complaint(fresh):
    log = Path(fresh.log).read_text(encoding="utf-8", errors="replace")
    (seconds,) = re.findall(rf"([\d.]+) seconds: \S*{PACK_FOLDER}", log)
    print(f"imported in {seconds} s; half a second is what users should wait on an idle machine")
    assert "IMPORT FAILED" not in log and "comfy_entrypoint" not in log


def test_the_doctor_was_shipped_and_runs_from_the_unpacked_folder(fresh):
    pack = fresh.base / "custom_nodes" / PACK_FOLDER
    code = f"import runpy; print(runpy.run_path({str(pack / 'tooling' / 'doctor.py')!r}, run_name='doctor')['environment']())"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "('sla2-attention', '" in done.stdout, done.stderr
