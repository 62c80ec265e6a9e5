"""A virtual environment of our own: torch first, everything else under constraints that leave torch alone.

Standard library only: this runs before anything is installed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

TORCH = "2.13.0"


class SetupError(RuntimeError):
    """A step of the set-up failed; the message is one sentence for the user."""


def say(text):
    print(text, flush=True)


def has_nvidia_gpu():
    """True where the NVIDIA driver answers and lists a card."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def has_cuda_torch(python):
    """True where ``python`` has a torch that sees a CUDA device."""
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return (
        subprocess.run([python, "-c", code], capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode == 0
    )


class Environment:
    """A folder with a virtual environment, and the record of what was installed, so that a second run skips it.

    folder None: the interpreter that runs this, into which nothing is installed. bytecode: whether pip compiles modules.
    """

    def __init__(self, folder, bytecode=True):
        self.folder = None if folder is None else Path(folder).resolve()
        self._recording = threading.Lock()  # run_tests.py installs two things at a time
        self._install = ["install", "-qq", *([] if bytecode else ["--no-compile"])]
        if self.folder is None:
            self.python = sys.executable
            return
        self.python = str(self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        self._record = self.folder / "installed.json"

    @property
    def installs(self):
        return self.folder is not None

    def create(self):
        """Makes the environment, or makes it anew where it is broken or of another Python; not the one that runs this."""
        if not self.installs or Path(sys.prefix).resolve() == self.folder:
            return
        wanted = [sys.version_info.major, sys.version_info.minor, sys.prefix]
        if self._read().get("python") == wanted and Path(self.python).exists():
            return
        say(f"Making a virtual environment in {self.folder}")
        shutil.rmtree(self.folder, ignore_errors=True)
        made = _run([sys.executable, "-m", "venv", str(self.folder)])
        if made:
            raise SetupError(
                "Python cannot make a virtual environment here (see above); on Debian and Ubuntu install python3-venv."
            )
        self._write({"python": wanted})

    def inherit(self):
        """Lets the environment see the packages of the interpreter that runs this, so that its CUDA torch is used."""
        here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (self._site_packages() / "inherited.pth").write_text("\n".join(here) + "\n", encoding="utf-8")

    def install_torch(self):
        """A CUDA torch that is there is kept; else one is installed: the CPU build where there is no NVIDIA GPU."""
        if not self.installs or self._done("torch", TORCH):
            return
        if has_nvidia_gpu():
            if has_cuda_torch(sys.executable):
                say("Using the CUDA build of PyTorch that is already installed")
                self.inherit()
            else:
                say(f"Installing torch {TORCH} for the NVIDIA GPU")
                self._must_install([f"torch=={TORCH}"])
        else:
            self._install_cpu_torch()
        self._mark("torch", TORCH)

    def _install_cpu_torch(self):
        say(f"Installing torch {TORCH} (CPU build)")
        if not self._pip([*self._install, f"torch=={TORCH}+cpu"], quiet=True):
            return
        if sys.platform == "linux":
            say(
                "  No index that pip knows has a build marked as CPU; taking the default one. If that one is the CUDA build "
                "(gigabytes), stop here and set PIP_EXTRA_INDEX_URL to the CPU index that pytorch.org names."
            )
        self._must_install([f"torch=={TORCH}"])

    def install(self, name, packages, *options):
        """pip install under the constraint that torch stays; skipped where the same list went in before."""
        if not self.installs or not packages or self._done(name, [*packages, *options]):
            return
        say(f"Installing {name}")
        self._must_install(packages, *options)
        self._mark(name, [*packages, *options])

    def _must_install(self, packages, *options):
        constraints = self._constraints()
        if self._pip([*self._install, *options, *constraints, *packages]):
            raise SetupError(f"pip could not install {', '.join(packages[:6])}{' ...' if len(packages) > 6 else ''}.")

    def _constraints(self):
        version = self.ask(
            "import importlib.metadata as m\ntry: print(m.version('torch'))\nexcept m.PackageNotFoundError: print()"
        )
        if not version:
            return []
        path = self.folder / "constraints.txt"
        path.write_text(f"torch=={version}\n", encoding="utf-8")
        return ["-c", str(path)]

    def ask(self, code):
        """What a line of Python prints there, stripped; "" where it fails."""
        done = subprocess.run(
            [self.python, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    def imports(self, module):
        """True where ``import module`` succeeds there."""
        return self.ask(f"import {module}; print('yes')").endswith("yes")

    def _pip(self, arguments, quiet=False):
        command = [self.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        return _run(command, quiet)

    def site_packages(self):
        return self._site_packages()

    def _site_packages(self):
        return Path(self.ask("import sysconfig; print(sysconfig.get_paths()['purelib'])"))

    def _read(self):
        if not self._record.exists():
            return {}
        return json.loads(self._record.read_text(encoding="utf-8"))

    def _write(self, record):
        self._record.write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _done(self, name, what):
        with self._recording:
            return self._read().get(name) == _fingerprint(what)

    def _mark(self, name, what):
        with self._recording:
            self._write(self._read() | {name: _fingerprint(what)})


def _fingerprint(what):
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _run(command, quiet=False):
    where = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if quiet else {}
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False, **where).returncode
