"""Kernels in Triton's interpreter, in a process of its own: Triton looks at the variable when it is imported."""

import os
import subprocess
import sys

import pytest


def run_in_the_interpreter(module):
    """Run a test module as a script; it says ``kernels ran`` at its end."""
    pytest.importorskip("triton", minversion="3.7")  # an older interpreter does not know newer versions of NumPy
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "kernels ran" in done.stdout, done.stderr
