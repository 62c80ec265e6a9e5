"""What both commands do before anything is installed: the virtual environment, ComfyUI's checkout."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import demo
from tooling import comfyui
from tooling.environment import Environment, SetupError


def test_the_official_release_is_what_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(comfyui, "clone", lambda *asked: asked)
    assert comfyui.clone_comfyui(tmp_path) == (comfyui.REPOSITORY, comfyui.RELEASE, tmp_path)


def test_an_earlier_clone_is_used_again(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "main.py").touch()
    assert comfyui.clone_comfyui(tmp_path) is None


def test_a_wrong_comfyui_path_stops_the_demo(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SetupError, match="COMFYUI_PATH names"):
        demo.choose_comfyui(tmp_path)


def test_comfyui_is_found_by_path_and_at_home(monkeypatch, tmp_path):
    (tmp_path / "ComfyUI").mkdir()
    (tmp_path / "ComfyUI" / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    assert comfyui.find_comfyui()[0] == tmp_path / "ComfyUI"
    monkeypatch.delenv("COMFYUI_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(comfyui, "ROOT", tmp_path / "elsewhere" / "pack")
    assert comfyui.find_comfyui()[0] == tmp_path / "ComfyUI"
    monkeypatch.setattr(comfyui, "ROOT", tmp_path / "ComfyUI" / "custom_nodes" / "pack")
    assert comfyui.find_comfyui()[0] == tmp_path / "ComfyUI"


@pytest.fixture(scope="module")
def created(tmp_path_factory):
    """(folder, its record) of a real virtual environment."""
    made = Environment(tmp_path_factory.mktemp("made") / "venv")
    made.create()
    return made.folder, made._record.read_text()


@pytest.fixture
def environment(created, monkeypatch):
    """A real, empty virtual environment whose pip only writes down what it was asked."""
    folder, record = created
    empty = Environment(folder)
    empty._record.write_text(record)
    empty.asked = []
    monkeypatch.setattr(empty, "_pip", lambda arguments, quiet=False: empty.asked.append(arguments) and 0)
    yield empty
    (empty.site_packages() / "inherited.pth").unlink(missing_ok=True)


def test_a_second_run_installs_nothing(environment):
    environment.install("some packages", ["numpy"])
    environment.install("some packages", ["numpy"])
    assert len(environment.asked) == 1
    environment.install("some packages", ["numpy", "pytest"])
    assert len(environment.asked) == 2
    again = Environment(environment.folder)
    kept = Path(environment.python).stat().st_ino
    again.create()
    assert Path(again.python).stat().st_ino == kept


def test_the_environment_that_runs_this_is_not_made_anew(environment, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(environment.folder))
    environment._record.write_text("{}")
    kept = Path(environment.python).stat().st_ino
    Environment(environment.folder).create()
    assert Path(environment.python).stat().st_ino == kept


def test_two_that_install_at_a_time_are_both_remembered(environment):
    names = [f"package {number}" for number in range(200)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: environment._mark(name, [name]), names))
    assert set(names) <= set(environment._read())


def test_torch_is_the_cpu_build_without_a_gpu(environment, monkeypatch):
    monkeypatch.setattr("tooling.environment.has_nvidia_gpu", lambda: False)
    environment.install_torch()
    assert environment.asked[0][-1] == "torch==2.13.0+cpu"


def test_a_cuda_torch_that_is_there_is_kept(environment, monkeypatch):
    monkeypatch.setattr("tooling.environment.has_nvidia_gpu", lambda: True)
    monkeypatch.setattr("tooling.environment.has_cuda_torch", lambda python: True)
    environment.install_torch()
    assert environment.asked == []
    assert environment.ask("import torch; print('seen')") == "seen"


def test_a_failing_pip_is_one_sentence(environment, monkeypatch):
    monkeypatch.setattr(environment, "_pip", lambda arguments, quiet=False: 1)
    with pytest.raises(SetupError, match="pip could not install nonsense"):
        environment.install("nonsense", ["nonsense"])


def test_comfyuis_requirements_go_in_without_torch(environment, monkeypatch, tmp_path):
    (tmp_path / "requirements.txt").write_text("torch\ntorchvision\ntorchaudio\ntorchsde\n# note\n\nnumpy>=1.25\n")
    monkeypatch.setattr(comfyui, "_install_torch_companions", lambda environment: None)
    comfyui.install_comfyui(environment, tmp_path)
    assert environment.asked[0][-2:] == ["torchsde", "numpy>=1.25"]


def test_here_installs_nothing():
    here = Environment(None)
    here.create()
    here.install_torch()
    here.install("anything", ["anything"])
    assert here.python == sys.executable and not here.installs
