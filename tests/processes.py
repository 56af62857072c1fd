"""Python in a process of its own, for what has to be set before growkern or Triton is imported."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Of 3.6 the interpreter takes a number from an array of one element, which NumPy 2.4 refuses.
needs_interpreter = pytest.mark.skipif(
    not HAS_TRITON or version("triton").startswith("3.6."), reason="no interpreter of Triton 3.7 or later"
)


def python(*arguments: str, **environment: str) -> str:
    """Run Python from the root of the project; what it printed, or an AssertionError with all of it."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
