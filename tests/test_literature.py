"""GradMax's teacher and student, as bench/literature.py trains them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="scipy is not installed")
sys.path.append(str(Path(__file__).parent.parent / "bench"))

from literature import SMALL, stopped, summary, taught


@pytest.mark.usefixtures("one_thread")
def test_a_student_that_grows_learns_what_a_small_one_cannot() -> None:
    grown, small = (taught("relu", method, seed=0, samples=200) for method in ("gradmax", SMALL))
    assert grown < 0.1 * small


@pytest.mark.usefixtures("one_thread")
def test_growing_stops_at_the_width_of_the_teacher() -> None:
    found = stopped(teacher=2, samples=4000, seed=0, unseen=2000)
    assert found["widths"] == sorted(set(found["widths"]))
    assert found["width"] == 2
    assert found["error"] < 0.01


def test_summary() -> None:
    rows = [{"method": "tiny", "seed": seed, "loss": loss} for seed, loss in enumerate((1.0, 2.0, 3.0))]
    assert summary(rows, "loss") == ["tiny: loss 2 ± 2.5, 3 seeds"]  # 4.303 / √3
