"""A real ComfyUI server in a subprocess, and its HTTP interface."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
PACK_FOLDER = "sla2-attention"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyServer:
    """Starts on construction, ready when it returns. ``base`` holds models/, custom_nodes/, output/."""

    def __init__(self, comfyui_path, base, wait_s=120):
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.log = base / "server.log"
        command = [
            sys.executable, str(comfyui_path / "main.py"), "--cpu", "--disable-auto-launch", "--listen", "127.0.0.1",
            "--port", str(port), "--use-pytorch-cross-attention", "--base-directory", str(base),
            "--database-url", "sqlite:///:memory:", "--disable-api-nodes",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for a busy core cost far more
        self.process = subprocess.Popen(
            command, cwd=base, env=environment, stdout=self.log.open("wb"), stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + wait_s
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)

    def answers(self):
        try:
            self.get("/system_stats")
        except (OSError, urllib.error.URLError):
            return False
        return True

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def post(self, path, body):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path} answered {error.code}: {error.read().decode()}") from error

    def run(self, prompt, wait_s=120):
        """Queues an API-format prompt and waits for its history entry."""
        number = self.post("/prompt", {"prompt": prompt})["prompt_id"]
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{number}").get(number)
            if entry is not None:
                return entry
            time.sleep(0.1)
        raise TimeoutError(f"prompt {number} did not end within {wait_s} s")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def error_of(entry):
    """(node id, message) of a failed prompt, or None."""
    for kind, details in entry["status"]["messages"]:
        if kind == "execution_error":
            return details["node_id"], details["exception_message"]
    return None
