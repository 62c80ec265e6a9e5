"""A ComfyUI server of our own: started on a free port, driven over HTTP, stopped at the end. Standard library only."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from .environment import SetupError
from .paths import ROOT


class PromptFailed(RuntimeError):
    """ComfyUI refused or failed a prompt; the message names the node and what it said."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment(**changes):
    """This process's environment without our root on PYTHONPATH: its folder nodes/ would shadow ComfyUI's module."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = os.pathsep.join(path for path in paths if path and Path(path).resolve() != ROOT)
    others = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return others | ({"PYTHONPATH": kept} if kept else {}) | changes


class Server:
    """``with Server(comfyui, base, device) as server``: ready on entry, stopped on exit.

    base: its --base-directory, with models/, custom_nodes/, input/, output/ and user/. variables: for its environment.
    """

    def __init__(self, comfyui, base, device="cpu", wait_s=300, **variables):
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.url = f"http://{self.address}"
        self.base, self.wait_s, self.variables = base, wait_s, variables
        self.log = base / "server.log"
        self.client = uuid.uuid4().hex
        self.command = [
            sys.executable, str(comfyui / "main.py"), "--disable-auto-launch", "--listen", "127.0.0.1",
            "--port", str(port), "--base-directory", str(base), "--use-pytorch-cross-attention",
            "--database-url", "sqlite:///:memory:", "--disable-api-nodes", *(["--cpu"] if device == "cpu" else []),
        ]  # fmt: skip

    def start(self):
        """Returns when the server answers. Raises SetupError with the end of its log where it does not within wait_s."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.base,
                env=clean_environment(**self.variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + self.wait_s
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SetupError(f"ComfyUI did not start; the end of {self.log}:\n{self.log_tail()}")
            time.sleep(0.2)

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def log_tail(self, lines=15):
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _answers(self):
        try:
            self.get("/system_stats")
        except (OSError, urllib.error.URLError):
            return False
        return True

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path, body):
        """What it answers, parsed; None for an empty answer. Raises PromptFailed where it refuses."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:2000]
            raise PromptFailed(f"ComfyUI refused {path} with {error.code}: {said}") from error

    def queue(self, prompt):
        """Number of the queued API-format prompt."""
        return self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"]

    def history(self, number, wait_s):
        """The history entry of a prompt, waited for."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{number}").get(number)
            if entry is not None:
                return entry
            time.sleep(0.1)
        raise PromptFailed(f"ComfyUI left no history entry of prompt {number} within {wait_s} s.")

    def run(self, prompt, wait_s=300):
        """Queues an API-format prompt and waits for its history entry, be it a success or a failure."""
        return self.history(self.queue(prompt), wait_s)
