"""How the cost of moments grows with images, channels, the size of maps and the number of sites."""

from collections.abc import Iterator
from typing import Any

import peer
import pytest
import torch
from bench_moments import measure
from bench_sites import linear_calls, measure_group
from cases import Case, cases
from race import Race


def maps(size: str, device: str) -> Iterator[Any]:
    for case in cases("conv2d_moments", size="scaling")[:: 1 if size == "bench" else 8]:
        yield pytest.param(case, id=case.name)


def sites(size: str, device: str) -> Iterator[Any]:
    for number in (1, 4, 16, 64, 256) if size == "bench" else (2,):
        yield pytest.param(number, id=f"sites = {number}")


@pytest.mark.later(1)
@pytest.mark.rows.with_args(maps)
def test_maps(case: Case, race: Race, device: str) -> None:
    measure(case, torch.float32, "ieee", race, device, 0.1 * peer.LIMIT[device])


@pytest.mark.later(1)
@pytest.mark.rows.with_args(sites)
def test_sites(width: int, race: Race, device: str) -> None:
    measure_group(f"sites = {width}", linear_calls([32] * width, 1024, device), race, device)
