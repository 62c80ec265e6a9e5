"""Runs the tests in an environment of their own: python run_tests.py

    python run_tests.py            makes .venv-tests (once), installs what the tests need, runs everything
    python run_tests.py --here     uses the current interpreter and installs nothing
    python run_tests.py ARGS       hands ARGS to one pytest process, e.g. tests/nodes -k report

ComfyUI's tests run where a checkout is found: COMFYUI_PATH, else two levels up when installed in custom_nodes, else
~/ComfyUI. The last lines say how many ran, or why none did.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET  # noqa: S405  reads the report that our own pytest just wrote
from pathlib import Path

from tooling.comfyui import find_comfyui, install_comfyui
from tooling.environment import Environment, SetupError, say

ROOT = Path(__file__).resolve().parent
PACKAGES = ["pytest>=8", "hypothesis", "numpy", "safetensors", "diffusers>=0.35", "Pillow", "ruff"]
OLDEST_TRITON = "3.2.0"
TRITON_HAS_WHEELS = sys.platform == "linux"
OLDEST_TRITON_HAS_WHEEL = TRITON_HAS_WHEELS and sys.version_info < (3, 14)
INTERPRETER, COMPILE, WEB = (ROOT / "tests" / name for name in ("kernels/interpreter", "kernels/compile", "web"))
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def prepare(environment, comfyui):
    """Installs what the tests need; torch first, so that nothing else brings another one."""
    environment.create()
    environment.install_torch()
    environment.install("test packages", PACKAGES)
    if TRITON_HAS_WHEELS and not environment.imports("triton"):
        environment.install("Triton", ["triton>=3.2"])
    if comfyui is not None:
        install_comfyui(environment, comfyui)
    if WEB.is_dir() and any(map(shutil.which, CHROMIUM)):
        environment.install("Playwright", ["playwright"])


def oldest_triton(environment):
    """Folder with the oldest supported Triton, or (None, why not)."""
    if not environment.installs:
        return None, "--here installs nothing"
    if not OLDEST_TRITON_HAS_WHEEL:
        return (
            None,
            f"Triton {OLDEST_TRITON} has no wheel for Python {sys.version_info.major}.{sys.version_info.minor} on {sys.platform}",
        )
    folder = environment.folder / f"triton-{OLDEST_TRITON}"
    environment.install(f"Triton {OLDEST_TRITON} in a folder of its own", [f"triton=={OLDEST_TRITON}"],
                        "--no-deps", "--target", str(folder))  # fmt: skip
    return folder, None


class Counts:
    """Adds up the outcomes of several pytest processes."""

    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.broken = False

    def add(self, report, status):
        # 5: nothing collected, which is no failure of a test
        self.broken |= status not in (0, 1, 5) or (status == 1 and not report.exists())
        if not report.exists():
            return
        for suite in ET.parse(report).iter("testsuite"):  # noqa: S314
            tests, failures, errors, skipped = (
                int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")
            )
            self.failed += failures + errors
            self.skipped += skipped
            self.passed += tests - failures - errors - skipped

    def __str__(self):
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def run_pytest(environment, counts, title, arguments, **variables):
    say(f"\n== {title}")
    settings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | variables
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [environment.python, "-m", "pytest", f"--junitxml={report}", *arguments]
        status = subprocess.run(command, cwd=ROOT, env=settings, stdin=subprocess.DEVNULL, check=False).returncode
        counts.add(report, status)


def run_all(environment, counts):
    """One process with Triton's interpreter, one with the oldest Triton, one for the rest; sentences on what did not run."""
    notes = []
    if INTERPRETER.is_dir():
        run_pytest(environment, counts, "Kernels in Triton's interpreter", [str(INTERPRETER)], TRITON_INTERPRET="1")
    if COMPILE.is_dir():
        folder, why_not = oldest_triton(environment)
        if folder is None:
            notes.append(f"Kernels were NOT COMPILED with Triton {OLDEST_TRITON}: {why_not}.")
        else:
            path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
            run_pytest(
                environment, counts, f"Kernels compiled with Triton {OLDEST_TRITON}", [str(COMPILE)], PYTHONPATH=path
            )
    run_pytest(environment, counts, "Everything else", ["tests", f"--ignore={INTERPRETER}"])
    return notes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="use the current interpreter, install nothing")
    options, arguments = parser.parse_known_args()
    environment = Environment(None if options.here else ROOT / ".venv-tests")
    comfyui, looked = find_comfyui()
    say(f"ComfyUI: {comfyui}" if comfyui else f"ComfyUI: none at {looked}; its tests will not run")
    try:
        prepare(environment, comfyui)
        counts = Counts()
        if arguments:
            run_pytest(environment, counts, "Tests", arguments, **_inherited())
            notes = []
        else:
            notes = run_all(environment, counts)
    except SetupError as error:
        say(f"The tests could not be set up: {error}")
        return 2
    for note in notes:
        say(note)
    if counts.broken:
        say("A pytest process ended abnormally (see above).")
    say(str(counts))
    nothing_ran = not counts.passed and not arguments
    return 1 if counts.failed or counts.broken or nothing_ran else 0


def _inherited():
    return {key: os.environ[key] for key in ("TRITON_INTERPRET",) if key in os.environ}


if __name__ == "__main__":
    sys.exit(main())
