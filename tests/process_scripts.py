"""Scripts of the tests that start several processes of their own."""

import os
import subprocess
import sys

from tooling.paths import ROOT


def run_script(script, *arguments, timeout=300, **variables):
    """What a script printed, run from the repository's root with one thread a process; fails where it did."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
