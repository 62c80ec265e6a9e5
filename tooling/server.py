"""A ComfyUI server of our own: started on a free port, driven over its HTTP and WebSocket interface, stopped at the end."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid

import aiohttp

from .environment import SetupError


class PromptFailed(RuntimeError):
    """ComfyUI refused or failed a prompt; the message names the node and what it said."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """``with Server(comfyui, base, device) as server``: ready on entry, stopped on exit. base: its --base-directory."""

    def __init__(self, comfyui, base, device, wait_s=300):
        self.address = f"127.0.0.1:{free_port()}"
        self.base, self.wait_s = base, wait_s
        self.log = base / "server.log"
        self.client = uuid.uuid4().hex
        self.command = [
            sys.executable, str(comfyui / "main.py"), "--disable-auto-launch", "--listen", "127.0.0.1",
            "--port", self.address.split(":")[1], "--base-directory", str(base), "--use-pytorch-cross-attention",
            "--database-url", "sqlite:///:memory:", "--disable-api-nodes", *(["--cpu"] if device == "cpu" else []),
        ]  # fmt: skip

    def __enter__(self):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.base, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + self.wait_s
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise SetupError(f"ComfyUI did not start; the end of {self.log}:\n{self.log_tail()}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def log_tail(self, lines=15):
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _answers(self):
        try:
            self.get("/system_stats")
        except (OSError, urllib.error.URLError):
            return False
        return True

    def get(self, path):
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=60) as answer:
            return json.loads(answer.read())

    def _queue(self, prompt):
        body = json.dumps({"prompt": prompt, "client_id": self.client}).encode()
        request = urllib.request.Request(f"http://{self.address}/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptFailed(f"ComfyUI refused the prompt: {error.read().decode(errors='replace')[:2000]}") from error

    async def run(self, prompt, on_progress):
        """(outputs per node, seconds per node). on_progress(node id, step, steps) is called as the server reports."""
        timeout = aiohttp.ClientTimeout(total=3600)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            async with session.ws_connect(f"ws://{self.address}/ws?clientId={self.client}", max_msg_size=0) as socket_:
                number = self._queue(prompt)
                seconds = await _follow(socket_, number, on_progress)
        return self._outputs(number), seconds

    def _outputs(self, number, wait_s=10):
        # the entry appears slightly after the last message
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{number}").get(number)
            if entry is not None:
                return entry["outputs"]
            time.sleep(0.1)
        raise PromptFailed("ComfyUI finished the prompt and left no history entry.")


async def _follow(socket_, number, on_progress):
    seconds, current, since = {}, None, time.monotonic()
    async for message in socket_:
        if message.type != aiohttp.WSMsgType.TEXT:
            continue
        event = json.loads(message.data)
        kind, data = event["type"], event["data"]
        if data.get("prompt_id") != number:
            continue
        if kind == "executing":
            now = time.monotonic()
            if current is not None:
                seconds[current] = now - since
            current, since = data["node"], now
            if current is not None:
                on_progress(current, 0, 0)
        elif kind == "progress":
            on_progress(data["node"], data["value"], data["max"])
        elif kind == "execution_error":
            raise PromptFailed(
                f"{data['node_type']} (node {data['node_id']}) failed: {data['exception_message'].strip()}"
            )
        elif kind in ("execution_success", "execution_interrupted"):
            return seconds
    raise PromptFailed("ComfyUI closed the connection before the prompt ended.")
