"""Moments add, move between dtypes and devices, and come back from files as they were."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import F64, close
from networks import NETS, at, quartic
from safetensors.torch import save_file
from torch import Tensor

import growkern as gk
from growkern import GrowthSite, Moments, storage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "kernel"), [("linear", "full"), ("tokens", "full"), ("conv", "center"), ("conv, norm", "center")]
)
def test_moments_add(name: str, kernel: str) -> None:
    net = NETS[name]()
    model, batches = net.model(), net.batches(6, 11, 4)
    options = {"kernel": kernel, "null_draws": 0}
    whole = at(model, batches, quartic, **options)
    parts = at(model, batches[:1], quartic, **options) + at(model, batches[1:], quartic, **options)
    assert parts.count == whole.count
    assert parts.tensors().keys() == whole.tensors().keys()
    assert {"xx", "xh", "xv", "hh", "hv", "vv"} <= parts.tensors().keys()
    for key, value in whole.tensors().items():
        close(getattr(parts, key), value)


def test_what_is_shown_of_moments_and_neurons_is_short() -> None:
    """Tensors by their shapes, and nothing of what was not measured."""
    net = NETS["linear"]()
    moments = at(net.model(), net.batches(40), quartic, null_draws=0)
    assert "xx=(6, 6), xv=(6, 3), hh=(5, 5), hv=(5, 3), vv=(3, 3), xh=(6, 5))" in repr(moments)
    assert "alpha=(2, 6), omega=(3, 2), singular_values=(2,)" in repr(gk.solve(moments, neurons=2))


def test_second_passes_add_only_with_one_update() -> None:
    net = NETS["conv"]()
    model, batches = net.model(), net.batches(6, 11)
    one, other = (at(model, [batch], quartic) for batch in batches)
    with pytest.raises(ValueError, match=r"dW\*"):
        one + other
    again = at(model, batches[:1], quartic)
    for key, value in (one + again).tensors().items():
        close(value, getattr(one, key))


@pytest.mark.parametrize("change", ["site", "kernel", "shape", "what"])
def test_moments_of_different_things_do_not_add(change: str) -> None:
    net = NETS["conv"]()
    batches = net.batches(6)
    one = at(net.model(), batches, quartic, kernel="center", null_draws=0)
    other = {
        "site": dataclasses.replace(one, site=GrowthSite("other", "2", ("1",))),
        "kernel": dataclasses.replace(one, kernel="full"),
        "shape": dataclasses.replace(one, vv=one.vv[:2, :2]),
        "what": dataclasses.replace(one, xh=None),
    }[change]
    with pytest.raises(ValueError, match="moments"):
        one + other
    with pytest.raises(TypeError):
        one + 1  # type: ignore[operator]


@pytest.mark.parametrize("name", ["linear", "conv, norm", "flatten"])
def test_moments_save_and_load(name: str, tmp_path: Path) -> None:
    net = NETS[name]()
    moments = at(net.model(), net.batches(6, 11), quartic)
    path = tmp_path / "site.moments"
    moments.save(path)
    loaded = Moments.load(str(path))
    for field in dataclasses.fields(Moments):
        saved, read_back = getattr(moments, field.name), getattr(loaded, field.name)
        assert type(saved) is type(read_back), field.name
        if isinstance(saved, Tensor):
            assert saved.dtype == read_back.dtype
            assert torch.equal(saved, read_back)
        else:
            assert saved == read_back, field.name
    assert os.listdir(tmp_path) == ["site.moments"]
    one, other = (gk.solve(m, neurons=2) for m in (moments, loaded))
    assert torch.equal(one.alpha, other.alpha)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    net = NETS["linear"]()
    path = tmp_path / "moments"
    at(net.model(), net.batches(6), quartic).save(path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"path: .*moments"):
            Moments.load(path)
    path.write_text("not a file of tensors, but long enough to hold a length")
    with pytest.raises(ValueError, match=r"path: .*moments"):
        Moments.load(path)
    save_file({"xx": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"path: .*moments"):
        Moments.load(path)
    save_file({"xx": torch.ones(2)}, path, metadata={"growkern.moments": json.dumps({"site": "a"})})
    with pytest.raises(ValueError, match=r"path: .*moments"):
        Moments.load(path)
    storage.write(path, "moments", {"xx": torch.ones(2, 2)}, {"site": {"producer": "0", "consumer": "2"}, "spin": 1})
    with pytest.raises(ValueError, match=r"path: .*moments holds moments of another version"):
        Moments.load(path)
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "nothing")


def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = NETS["linear"]()
    path = tmp_path / "moments"
    moments = at(net.model(), net.batches(6), quartic)
    moments.save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        dataclasses.replace(moments, count=99).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["moments"]


def test_moments_to() -> None:
    net = NETS["conv, norm"]()
    moments = at(net.model(), net.batches(6), quartic)
    single = moments.to(torch.float32)
    assert {t.dtype for t in single.tensors().values()} == {torch.float32}
    assert {t.dtype for t in moments.tensors().values()} == {F64}
    for key, value in moments.tensors().items():
        assert torch.equal(getattr(single, key), value.float())
    assert (single.site, single.count, single.slope) == (moments.site, moments.count, moments.slope)
    assert moments.to("meta").xx.is_meta
