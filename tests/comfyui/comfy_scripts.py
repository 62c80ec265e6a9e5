"""Scripts on ComfyUI's classes in processes of their own, which are copies of one that has imported ComfyUI already."""

import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    """What a script left: its exit status, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class ComfyScripts:
    """Runs scripts one after the other, each in a process of its own with this ComfyUI on its path, on the CPU."""

    def __init__(self, comfyui, folder):
        self.folder, self.number = folder, 0
        command = [sys.executable, str(Path(__file__).with_name("warm_process.py")), str(comfyui)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=variables, start_new_session=True, **pipes)
        assert self._answer(300) == "ready"

    def run(self, *arguments, cwd=ROOT, timeout=300):
        """What ``python ARGUMENTS`` leaves."""
        self.number += 1
        output = self.folder / str(self.number)
        output.mkdir()
        order = {"arguments": [str(argument) for argument in arguments], "folder": str(cwd), "output": str(output)}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        status = int(self._answer(timeout))
        return Done(status, *((output / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")))

    def _answer(self, timeout):
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            os.killpg(self.process.pid, 9)
            raise TimeoutError(f"no answer within {timeout} s")
        return self.process.stdout.readline().strip()

    def stop(self):
        self.process.stdin.close()
        self.process.wait(60)
