"""The same numbers with the Triton kernels, in Triton's interpreter: it needs a process that starts with TRITON_INTERPRET=1."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

NUMBERS = Path(__file__).with_name("test_numbers.py")
# a choice that takes twenty seconds; all of them: TRITON_INTERPRET=1 python -m pytest tests/reliability/test_numbers.py
CHOSEN = (
    "((q-nan or k-nan or v-nan) and 16bit) or selection_under or (hard_inputs and 16bit and float32) or repeated "
    "or arguments_of_one or strides or 1e5 or (without_weight and (60-learned or 300-learned or int8-0.3))"
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_numbers_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(NUMBERS), "-k", CHOSEN, "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-6000:]
