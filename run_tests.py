"""Runs the tests in an environment of their own: python run_tests.py

    python run_tests.py            makes .venv-tests (once), installs what the tests need, runs everything, three processes
                                   at a time: what a process prints appears when it ends
    python run_tests.py --here     uses the current interpreter and installs nothing
    python run_tests.py ARGS       hands ARGS to one pytest process, e.g. tests/nodes -k report

ComfyUI's tests run where a checkout is found: COMFYUI_PATH, else two levels up when installed in custom_nodes, else
~/ComfyUI. The last lines say how many of them ran, and why others did not.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET  # noqa: S405  reads the report that our own pytest just wrote
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from tooling.audit import audit, install_audit
from tooling.browser import find_chromium
from tooling.comfyui import find_comfyui, install_comfyui, install_manager
from tooling.environment import Environment, SetupError, say
from tooling.side_by_side import Part, at_once, run_side_by_side

ROOT = Path(__file__).resolve().parent
RUFF = "ruff==0.17.*"  # its formatting is tested, and changes with its minor version
IMPORT_GUARD = "comfy-import-guard==1.3.0"  # needs nothing but git
TOOLS = ["pytest>=8", "hypothesis", RUFF, IMPORT_GUARD]
PACKAGES = [*TOOLS, "numpy", "safetensors", "diffusers>=0.35", "peft", "accelerate", "Pillow"]
OLDEST_TRITON = "3.2.0"
TEMPLATES = "comfyui-workflow-templates-json==0.1.123"  # newer than what the tested ComfyUI brings
NEWEST_PAGE = "comfyui-frontend-package==1.58.1"  # likewise
# what differed between pages: menus, links, subgraphs, the undo, both renderers
IN_THE_NEWEST_PAGE = "subgraph or menu or user_placed or stroke_is_one or refused or default_graph or say_what_happened and (classic_dark or vue_light)"
TRITON_HAS_WHEELS = sys.platform == "linux"
OLDEST_TRITON_HAS_WHEEL = TRITON_HAS_WHEELS and sys.version_info < (3, 14)
INTERPRETER, COMPILE, WEB = (ROOT / "tests" / name for name in ("kernels/interpreter", "kernels/compile", "web"))


def set_up(environment, comfyui, everything):
    """Installs what the tests need. everything: also what only a run of all suites needs, and at the same time."""
    environment.create()
    with ThreadPoolExecutor(1) as beside:
        # into a folder of its own, so that the two do not disturb each other
        apart = beside.submit(oldest_triton, environment) if everything else None
        prepare(environment, comfyui)
    if apart is not None:
        apart.result()
        install_audit(environment)


def prepare(environment, comfyui):
    """Installs what most tests need; torch first, so that nothing else brings another one."""
    environment.install_torch()
    environment.install("test packages", PACKAGES)
    if TRITON_HAS_WHEELS and not environment.imports("triton"):
        environment.install("Triton", ["triton>=3.2"])
    if comfyui is not None:
        install_comfyui(environment, comfyui)
        install_manager(environment, comfyui)
    if WEB.is_dir() and find_chromium():
        environment.install("Playwright", ["playwright"])
        if environment.installs:
            install_apart(environment, "ComfyUI's newest templates", TEMPLATES, templates_folder(environment.folder))
            install_apart(environment, "ComfyUI's newest page", NEWEST_PAGE, environment.folder / "newest-page")


def install_apart(environment, what, package, folder):
    """Installs one package, without what it needs, into a folder that only some tests look at."""
    apart = ("--no-deps", "--target", str(folder))
    environment.install(f"{what} in a folder apart", [package], *apart)


def templates_folder(environment=sys.prefix):
    """Where prepare() puts the templates: in the environment's folder, where its interpreter finds them."""
    return Path(environment) / "official-templates"


def newest_page(environment):
    """Folder of the page that prepare() put apart, for COMFYUI_FRONTEND; None where there is none."""
    page = environment.folder / "newest-page" / "comfyui_frontend_package" / "static" if environment.installs else None
    return page if page is not None and page.is_dir() else None


def keep_bytecode(environment):
    """Python's compiled modules in the environment's folder, for all processes: written when first imported, and kept.

    pip compiles none, as most are never imported. Wherever nothing is installed, everything stays as the user set it.
    """
    if environment.installs:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ.setdefault("PYTHONPYCACHEPREFIX", str(environment.folder / "bytecode"))


def oldest_triton(environment):
    """Folder with the oldest supported Triton, or (None, why not)."""
    if not environment.installs:
        return None, "--here installs nothing"
    if not OLDEST_TRITON_HAS_WHEEL:
        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        return None, f"Triton {OLDEST_TRITON} has no wheel for {python} on {sys.platform}"
    folder = environment.folder / f"triton-{OLDEST_TRITON}"
    install_apart(environment, f"Triton {OLDEST_TRITON}", f"triton=={OLDEST_TRITON}", folder)
    return folder, None


class Counts:
    """Adds up the outcomes of several pytest processes; ComfyUI's tests also by themselves (tests/conftest.py marks them)."""

    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.broken = False
        self.comfyui_ran, self.comfyui_left_out = 0, Counter()

    def add(self, report, status):
        """(tests that ran, tests left out) of one process."""
        # 5: nothing collected, which is no failure of a test
        self.broken |= status not in (0, 1, 5) or (status == 1 and not report.exists())
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []  # noqa: S314
        skips = [case.find("skipped") for case in cases]
        left_out = sum(skip is not None for skip in skips)
        failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
        self.failed += failed
        self.skipped += left_out
        self.passed += len(cases) - failed - left_out
        for case, skip in zip(cases, skips, strict=True):
            if case.find("properties/property[@name='comfyui']") is None:
                continue
            if skip is None:
                self.comfyui_ran += 1
            else:
                self.comfyui_left_out[skip.get("message", "").removeprefix("Skipped: ")] += 1
        return len(cases) - left_out, left_out

    def comfyui(self):
        """How many of ComfyUI's tests ran, and why others were left out."""
        left_out = self.comfyui_left_out.total()
        if not self.comfyui_ran and not left_out:
            return "ComfyUI tests: NONE RAN, there were none among the tests chosen"
        said = f"ComfyUI tests: {self.comfyui_ran} ran, {left_out} left out"
        if not self.comfyui_ran:
            said = f"ComfyUI tests: NONE RAN, {left_out} left out"
        reasons = [f"{count} x {reason}" for reason, count in self.comfyui_left_out.most_common()]
        return said + "".join(f"\n  {line}" for line in reasons)

    def __str__(self):
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclass(frozen=True)
class Suite:
    """Tests for one pytest process. kernels: how they run them, for suites whose absence is a failure."""

    title: str
    arguments: list
    variables: dict = field(default_factory=dict)
    kernels: str | None = None


def suites(old_triton, page=None):
    """Triton's interpreter, another Triton and another page need processes of their own; the longest suites come first."""
    others = [str(ROOT / "tests"), *(f"--ignore={folder}" for folder in (INTERPRETER, COMPILE, WEB))]
    yield Suite("What needs ComfyUI", [*others, "-m", "comfyui"])
    yield kernel_suite(COMPILE, "compiled with the installed Triton")
    yield Suite("Pages of ComfyUI", [str(WEB)] if WEB.is_dir() else [])
    yield Suite("Everything else", [*others, "-m", "not comfyui"])
    yield kernel_suite(INTERPRETER, "in Triton's interpreter", TRITON_INTERPRET="1")
    if old_triton is not None:
        path = os.pathsep.join(filter(None, (str(old_triton), os.environ.get("PYTHONPATH"))))
        # of the dtypes, the one that video models have, and float32, which this release has compiled by ending the process;
        # without sm_86, which has the formats of sm_80 and the memory of sm_89, and with one of each two cards' backward passes:
        # it takes minutes as it is
        chosen = "(bfloat16 and not sm_86 and not (test_backward_fits and sm_89)) or odd or sm_86-float32-128-int8"
        bfloat16 = kernel_suite(COMPILE, f"compiled with Triton {OLDEST_TRITON}", PYTHONPATH=path)
        yield replace(bfloat16, arguments=[*bfloat16.arguments, "-k", chosen])
    if page is not None and WEB.is_dir():
        chosen = [str(WEB / f"test_{name}.py") for name in ("accelerate_in_page", "on_the_nodes", "schedule_editor")]
        yield Suite("The newest page", [*chosen, "-k", IN_THE_NEWEST_PAGE], {"COMFYUI_FRONTEND": str(page)})


def kernel_suite(folder, kernels, **variables):
    return Suite(f"Kernels {kernels}", [str(folder)] if folder.is_dir() else [], variables, kernels)


def run_suites(environment, counts, chosen, limit):
    """Runs them ``limit`` at a time; sentences on kernel tests that did not run."""
    chosen = list(chosen)
    with tempfile.TemporaryDirectory() as folder:
        reports = {suite.title: Path(folder) / f"{number}.xml" for number, suite in enumerate(chosen)}
        parts = [
            Part(
                suite.title,
                pytest_command(
                    environment, reports[suite.title], "-p", "no:cacheprovider", "--durations=10", *suite.arguments
                ),
                settings(**{"OMP_NUM_THREADS": "1"} if limit > 1 else {}) | suite.variables,
            )
            for suite in chosen
            if suite.arguments
        ]
        statuses = dict(zip([part.title for part in parts], run_side_by_side(parts, folder, ROOT, limit), strict=True))
        ran = {title: counts.add(reports[title], status) for title, status in statuses.items()}
    notes = [kernel_note(counts, suite, *ran.get(suite.title, (0, 0))) for suite in chosen if suite.kernels]
    return list(filter(None, notes))


def kernel_note(counts, suite, ran, left_out):
    """None, or a loud sentence where the kernel tests of a suite were not run."""
    if ran:
        return None
    if left_out:
        return f"!! Kernels were NOT run {suite.kernels}: all {left_out} tests were skipped (see above)."
    # the repository has lost its kernel tests: no reason of the machine's
    counts.broken = True
    return f"!! Kernels were NOT run {suite.kernels}: there are no tests of them."


def settings(**more):
    """The environment without what only Triton's interpreter is to see; what the user set wins over ``more``."""
    return more | {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def pytest_command(environment, report, *arguments):
    return [environment.python, "-m", "pytest", f"--junitxml={report}", *arguments]


def run_all(environment, counts):
    """Every suite, several at a time; sentences on what did not run, and on what pip-audit found."""
    folder, why_not = oldest_triton(environment)
    notes = [f"!! Kernels were NOT compiled with Triton {OLDEST_TRITON}: {why_not}."] if folder is None else []
    with ThreadPoolExecutor(1) as beside:
        auditing = beside.submit(audit, environment)  # it mostly waits for its index
        notes += run_suites(environment, counts, suites(folder, newest_page(environment)), at_once())
    found, vulnerable = auditing.result()
    counts.broken |= bool(vulnerable)
    return [*notes, found]


def run_chosen(environment, counts, arguments):
    """One pytest process with the arguments given."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = pytest_command(environment, report, *arguments)
        status = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
        counts.add(report, status)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="use the current interpreter, install nothing")
    options, arguments = parser.parse_known_args()
    environment = Environment(None if options.here else ROOT / ".venv-tests", bytecode=False)
    keep_bytecode(environment)
    comfyui, looked = find_comfyui()
    say(f"ComfyUI: {comfyui}" if comfyui else f"ComfyUI: none at {looked}; its tests will not run")
    try:
        set_up(environment, comfyui, everything=not arguments)
        counts = Counts()
        if arguments:
            run_chosen(environment, counts, arguments)
            notes = []
        else:
            notes = run_all(environment, counts)
    except SetupError as error:
        say(f"The tests could not be set up: {error}")
        return 2
    say("\n== Summary")
    for note in notes:
        say(note)
    if counts.broken:
        say("A part of the tests did not run as it should (see above).")
    say(str(counts))
    say(counts.comfyui())
    nothing_ran = not counts.passed and not arguments
    return 1 if counts.failed or counts.broken or nothing_ran else 0


if __name__ == "__main__":
    sys.exit(main())
