"""Commands that run beside each other, each one's output shown whole when it ends. Standard library only."""

import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from .environment import say

SAY_EVERY_S = 60
PERCENT = re.compile(r"\[ *(\d+)%\]")


@dataclass(frozen=True)
class Part:
    """A command. variables: for its environment."""

    title: str
    command: list
    variables: dict = field(default_factory=dict)


class Running:
    """A started Part; what it prints goes to a file of its own."""

    def __init__(self, part, log, cwd):
        self.part, self.log, self.start = part, log, time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                part.command, cwd=cwd, env=part.variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    @property
    def seconds(self):
        return time.monotonic() - self.start

    def __str__(self):
        found = PERCENT.findall(self.text())
        return f"{self.part.title} ({found[-1]}%)" if found else self.part.title

    def text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")


def at_once():
    """How many commands this machine runs beside each other: three, as servers and browsers leave two cores a third of their
    time, and one on a single core."""
    return 1 if os.cpu_count() in (None, 1) else 3


def run_side_by_side(parts, folder, cwd, limit):
    """Exit statuses in the order of ``parts``, at most ``limit`` of which run at a time; outputs pass through ``folder``.

    A part's output appears under its title when it ends, and once a minute what is still running.
    """
    waiting = list(enumerate(parts))
    running, statuses, said = {}, [None] * len(parts), time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                number, part = waiting.pop(0)
                say(f"   started: {part.title}")
                running[number] = Running(part, Path(folder) / f"{number}.log", cwd)
            ended = [number for number, one in running.items() if one.process.poll() is not None]
            for number in ended:
                one = running.pop(number)
                statuses[number] = one.process.returncode
                say(f"\n== {one.part.title}: {one.seconds:.0f} s\n{one.text().rstrip()}\n")
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                say(f"   still running: {', '.join(map(str, running.values()))}")
            if not ended:
                time.sleep(0.1)
    finally:
        for one in running.values():  # only where this was interrupted
            one.process.terminate()
            one.process.wait()
    return statuses
