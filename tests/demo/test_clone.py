"""Fetching by git: it never asks, it is given up where nothing answers, and never leaves half a checkout."""

import contextlib
import http.server
import os
import shutil
import socket
import stat
import subprocess
import threading
import time

import pytest

from tooling import clone as module
from tooling.clone import clone

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the fake programs are shell scripts")
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Call with a shell script: puts it first on the path, by the name of git."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(script):
        file = folder / "git"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    return make


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield tmp_path / "ComfyUI"
    assert not (tmp_path / "ComfyUI.partial").exists()


def test_the_wait_is_below_20_seconds():
    assert module.SILENCE_S + 2 < 20


@pytest.mark.parametrize("said", ["Cloning into 'x'...", "warning: redirecting to http://portal/"])
def test_a_git_that_only_talks_of_itself_is_given_up_and_killed(git, monkeypatch, tmp_path, target, said):
    marker = tmp_path / "pid"
    git(f'echo $$ > {marker}; while :; do echo "{said}" >&2; sleep 0.2; done')
    monkeypatch.setattr(module, "SILENCE_S", 1)
    start = time.monotonic()
    assert clone("http://host/x", "v1", target).startswith("git heard nothing for 1 s")
    assert time.monotonic() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


def test_a_git_that_receives_may_take_longer(git, monkeypatch, target, capsys):
    # in all longer than the silence that is borne, which is 20 times the pause between two messages
    git(
        'for n in $(seq 1 4 97); do echo "Receiving objects:  $n% (1/2)" >&2; sleep 0.1; done; for last; do :; done; mkdir "$last"'
    )
    monkeypatch.setattr(module, "SILENCE_S", 2)
    assert clone("http://host/x", "v1", target) is None and target.is_dir()
    assert capsys.readouterr().out.split() == ["received", "25%", "received", "50%", "received", "75%"]


def test_there_is_a_limit_for_the_whole(git, monkeypatch, target):
    git('while :; do echo "remote: still here" >&2; sleep 0.1; done')
    monkeypatch.setattr(module, "LIMIT_S", 1)
    assert clone("http://host/x", "v1", target).startswith("git was not done after 1 s")


def test_git_is_told_not_to_ask_and_its_error_is_passed_on(git, tmp_path, target):
    seen = tmp_path / "seen"
    git(
        f'echo "$GIT_TERMINAL_PROMPT $GIT_SSH_COMMAND $*" > {seen}; cat >> {seen}; echo "fatal: no such host" >&2; exit 128'
    )
    assert clone("http://host/x", "v1", target) == "git failed (fatal: no such host)"
    words = seen.read_text().split()
    assert words[:3] == ["0", "ssh", "-oBatchMode=yes"] and "credential.helper=" in words
    assert words[words.index("--branch") :][:2] == ["--branch", "v1"]


def test_no_git_at_all(monkeypatch, tmp_path, target):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clone("http://host/x", "v1", target) == "git is not installed"


@needs_git
def test_a_host_that_accepts_and_never_answers(monkeypatch, target):
    monkeypatch.setattr(module, "SILENCE_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert clone(f"http://127.0.0.1:{silent.getsockname()[1]}/x", "v1", target).startswith("git heard nothing")
    assert not target.exists()


@needs_git
def test_a_host_that_wants_a_password_is_not_given_one(monkeypatch, tmp_path, target):
    used = tmp_path / "used"
    settings = tmp_path / "gitconfig"
    settings.write_text(f'[credential]\n\thelper = "!touch {used}; sleep 60; :"\n[core]\n\taskPass = touch {used}\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    with wants_password() as port:
        start = time.monotonic()
        assert "fatal:" in clone(f"http://127.0.0.1:{port}/x", "v1", target)
    assert time.monotonic() - start < 10 and not used.exists()


@contextlib.contextmanager
def wants_password():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="portal"')
            self.end_headers()

        def log_message(self, *_):
            """Nothing on the terminal."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@needs_git
def test_a_real_clone_is_whole_and_replaces_what_an_earlier_one_left(tmp_path, target):
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "main.py").write_text("print()\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"], ["tag", "v1"]):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=origin, check=True)
    (tmp_path / "ComfyUI.partial").mkdir()
    (tmp_path / "ComfyUI.partial" / "half").touch()
    assert clone(origin.as_uri(), "v1", target) is None
    assert (target / "main.py").is_file() and not (target / "half").exists()
