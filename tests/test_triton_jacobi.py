"""The Triton kernels of `eigh` and `svd` where there is no GPU: interpreted on the CPU, and compiled for others."""

import pytest
from processes import HAS_TRITON, needs_interpreter, python

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@needs_interpreter
def test_the_cases_of_the_table_in_the_interpreter():
    # numpy warns of what Triton takes for granted: a tangent may overflow on its way to 0.
    chosen = ("-q", "-W", "ignore::RuntimeWarning", "tests/test_ops_jacobi.py", "-k", "triton or small")
    tests = python("-m", "pytest", *chosen, TRITON_INTERPRET="1")
    assert "eigh: has triton" in tests
    assert "skipped" not in tests


def test_kernels_of_the_largest_tile_fit_every_target():
    """bench/compiled.py fails on a kernel that spills a register or takes too much shared memory."""
    rows = python("bench/compiled.py", "--only", "eigh 64×64", "svd 64×64").splitlines()
    assert len(rows) == 16
