"""One tag of a git repository, without ever asking the user anything, and given up soon where nothing answers."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time

from .environment import say

SILENCE_S = 15  # with starting and killing git, below the 20 s that a machine without a network may wait
LIMIT_S = 600
# what git says of itself ("Cloning into", warnings of its settings) is no sign of the other side
ALIVE = re.compile(rb"remote:|Receiving objects|Resolving deltas|Updating files|Unpacking objects")
NEVER_ASK = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "",
    "SSH_ASKPASS": "",
    "GCM_INTERACTIVE": "never",
    "GIT_SSH_COMMAND": "ssh -oBatchMode=yes",
}


def clone(repository, tag, target):
    """Clones ``tag`` to ``target``, which appears only when it is whole. None, or a part of a sentence: why not.

    Gives up where git hears nothing for 15 s, hears less than 1,000 bytes/s for as long, or needs more than 10 minutes.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [
        "git", "-c", "credential.helper=", "-c", "core.askPass=", "-c", "http.lowSpeedLimit=1000",
        "-c", f"http.lowSpeedTime={SILENCE_S}", "clone", "--progress", "--depth", "1", "--branch", tag,
        repository, str(partial),
    ]  # fmt: skip
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **NEVER_ASK},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=os.name != "nt",
        )
    except FileNotFoundError:
        return "git is not installed"
    why_not = _wait(process)
    if why_not is None:
        partial.rename(target)
    else:
        shutil.rmtree(partial, ignore_errors=True)
    return why_not


def _wait(process):
    heard, start = _Listener(process.stderr), time.monotonic()
    try:
        while process.poll() is None:
            now = time.monotonic()
            if now - heard.last > SILENCE_S:
                return f"git heard nothing for {SILENCE_S} s"
            if now - start > LIMIT_S:
                return f"git was not done after {LIMIT_S} s"
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            _kill(process)
    heard.thread.join(5)
    if process.returncode:
        lines = [line for line in heard.text.splitlines() if line.startswith(("fatal:", "error:"))]
        return f"git failed ({lines[0] if lines else f'exit status {process.returncode}'})"
    return None


class _Listener:
    """Reads git's messages in a thread: remembers when the other side was last heard, and says each quarter received."""

    def __init__(self, pipe):
        self.last = time.monotonic()
        self.text = ""
        self.quarter = 0
        self.thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self.thread.start()

    def _read(self, pipe):
        while data := pipe.read1(4096):
            if ALIVE.search(data):
                self.last = time.monotonic()
            for percent in re.findall(rb"Receiving objects: +(\d+)%", data):
                if int(percent) // 25 > self.quarter:
                    self.quarter = int(percent) // 25
                    say(f"  received {25 * self.quarter}%")
            self.text = (self.text + data.decode(errors="replace"))[-4000:]


def _kill(process):
    """Ends git and its helpers, which would hold the pipe open."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
