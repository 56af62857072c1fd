"""Measuring in two processes: the sums of both, and errors that both learn of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import close
from networks import NETS, at, quartic, sign_of_rows
from test_collect_identities import explicit

import growkern as gk
from growkern import Moments

pytestmark = pytest.mark.usefixtures("one_thread")


def _worker(rank: int, folder: str) -> None:
    """One of two processes: measure every other batch, then a batch that is NaN in the second process only."""
    from datetime import timedelta

    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", store, timedelta(seconds=30), world_size=2, rank=rank)
    report: dict[str, str] = {}
    try:
        for name in ("conv", "linear"):
            torch.manual_seed(0)
            net = NETS[name]()
            model, batches = net.model(), net.batches(6, 11, 4, 5)
            moments = at(model, batches[rank::2], quartic, null_draws=3, group=dist.group.WORLD)
            moments.save(f"{folder}/{name}{rank}")
        batches = [(x * (torch.nan if rank else 1), y) for x, y in batches[rank::2]]
        for key, pairs in (("nan", batches), ("nothing", [] if rank else batches)):
            try:
                gk.collect(model, [moments.site], pairs, quartic, group=dist.group.WORLD)
            except ValueError as error:
                report[key] = f"ValueError: {error}"
            except RuntimeError as error:
                report[key] = f"RuntimeError: {error}"
    finally:
        Path(folder, f"report{rank}").write_text(json.dumps(report))
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(rank, str(folder))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        if worker.is_alive():
            worker.kill()
            worker.join()
    return folder


@pytest.mark.check("two processes (gloo)")
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_group_gives_the_sums_of_all_processes(name: str, two_processes: Path) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    model, batches = net.model(), net.batches(6, 11, 4, 5)
    expected = at(model, batches, quartic, null_draws=3)
    found = [Moments.load(two_processes / f"{name}{rank}") for rank in range(2)]
    for key, value in expected.tensors().items():
        assert torch.equal(getattr(found[0], key), getattr(found[1], key)), key
        if not key.startswith("null"):
            close(getattr(found[0], key), value, 1e-9)
    assert {m.count for m in found} == {26}
    signs = torch.cat([sign_of_rows(3, [6, 4], seed=0), sign_of_rows(3, [11, 5], seed=1)], 1)
    close(found[0].null, explicit(net, batches[::2] + batches[1::2], quartic, "full", signs)["null"], 1e-9)


@pytest.mark.check("two processes (gloo)")
@pytest.mark.parametrize("case", ["nan", "nothing"])
def test_all_processes_learn_of_an_error_in_one(case: str, two_processes: Path) -> None:
    """Or the others would wait for it in vain."""
    reports = [json.loads((two_processes / f"report{rank}").read_text()) for rank in range(2)]
    outcomes = {report.get(case, "fine").split(":")[0] for report in reports}
    assert outcomes == {"ValueError"} or (case == "nothing" and outcomes == {"fine"}), reports
