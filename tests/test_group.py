"""What goes on on the host where sites are summed together: which do, what is known of them, and what is kept."""

import contextlib

import pytest
import torch
from no_kernels import NoKernels

from growkern.ops import ConvGeometry
from growkern.ops.moments import Call, Residual, cuda, gpu, group, tiles
from growkern.ops.moments.layout import Layout
from growkern.ops.moments.schedule import Tiles, refuse_capture


class Recorded(NoKernels):
    """Notes down which kernels are launched, and with what."""

    def __init__(self):
        self.launches = []

    def __getattr__(self, kernel):
        return lambda *arguments: self.launches.append((kernel, arguments))

    def of(self, kernel):
        return [arguments for name, arguments in self.launches if name == kernel]


@pytest.fixture(autouse=True)
def _nothing_known():
    group.forget()
    yield
    group.forget()


def call(width=8, rows=20, device="cpu", targets=None):
    x, h, v = (torch.zeros(rows, each, device=device) for each in (width, width, targets or width))
    return Call(x, h, v)


def residual(given, signs=None, rows_per_sign=1):
    update = torch.zeros(given.v.shape[1], given.h.shape[1], device=given.x.device)
    return Residual(given, update, signs, rows_per_sign)


def sizes(monkeypatch):
    """How many sites the groups have that are laid out from here on."""
    found, finish = [], Layout.finish
    monkeypatch.setattr(Layout, "finish", lambda self, cut: found.append(len(self._plans)) or finish(self, cut))
    return found


def test_sites_are_summed_on_their_own_device(monkeypatch):
    """The meta device stands for a second GPU."""
    entered = []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor.device.type)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    engine, launched = Recorded(), []
    monkeypatch.setattr(
        Recorded, "correlate_group", lambda self, *given: launched.append((entered[-1], given[3].device.type)), False
    )
    calls = [call(device=device) for device in ("cpu", "meta", "cpu")]
    out = group.grouped_moments(engine, calls)
    assert [six[0].device.type for six in out] == ["cpu", "meta", "cpu"]
    assert launched == [("cpu", "cpu"), ("meta", "meta")]


def test_capture_is_asked_for_on_each_device(monkeypatch):
    monkeypatch.setattr(gpu, "is_capturing", lambda device: device.type == "meta")
    engine = Recorded()
    group.grouped_moments(engine, [call(device=device) for device in ("cpu", "meta", "meta")])
    assert [given[3].device.type for given in engine.of("correlate_group")] == ["cpu"]
    assert [given[2].device.type for given in engine.of("correlate")] == ["meta"] * 2


def test_a_known_group_still_refuses_what_a_new_one_does():
    good, engine = residual(call(), torch.ones(8, 3), 7), NoKernels()
    group.grouped_residuals(engine, [good])
    for signs, raised in (
        (torch.ones(8, 4), ValueError),
        (torch.ones(8, 3, dtype=torch.int8), TypeError),
        (torch.ones(8, 3, dtype=torch.bool), TypeError),
        ("no", TypeError),
        ([1], TypeError),
    ):
        with pytest.raises(raised, match=r"^signs: expected"):
            group.grouped_residuals(engine, [good._replace(signs=signs)])


@pytest.mark.parametrize(
    ("name", "value", "raised"),
    [("producer", [1, 1], TypeError), ("kernel", ["full"], ValueError), ("h", "no", TypeError), ("v", [], TypeError)],
)
def test_what_cannot_be_looked_up_is_refused_by_name(name, value, raised):
    maps = torch.zeros(3, 2, 4, 5, 5).unbind()
    good = Call(*maps, ConvGeometry(1), ConvGeometry(1))
    engine = NoKernels()
    group.grouped_moments(engine, [good])
    with pytest.raises(raised, match=f"^{name}: expected"):
        group.grouped_moments(engine, [good._replace(**{name: value})])


def test_v_is_cut_by_its_width(monkeypatch):
    """Sites of one width, whose v differ: those that CUDA cuts alike go together."""
    monkeypatch.setattr(Recorded, "subtract_tile", staticmethod(cuda.subtract_tile))
    found, engine = sizes(monkeypatch), Recorded()
    given = [residual(call(64, targets=targets)) for targets in (8, 64, 20, 33)]
    group.grouped_residuals(engine, given)
    assert found == [1, 2, 1]
    assert [launch[1:3] for launch in engine.of("subtract_group")] == [(2, (16, 16)), (2, (64, 64)), (1, (32, 32))]


@pytest.mark.parametrize(("site", "of_group", "together"), [(640, 1921, [3, 3, 1]), (640, 10**9, [7]), (639, 1, [])])
def test_groups_are_bounded(site, of_group, together, monkeypatch):
    """x v⊥ᵀ and h v⊥ᵀ of 8 channels, alone and under 4 draws, are 640 elements."""
    monkeypatch.setattr(group, "SITE_ELEMENTS", site)
    monkeypatch.setattr(gpu, "APART_BYTES", 4 * of_group)
    found, engine = sizes(monkeypatch), Recorded()
    group.grouped_residuals(engine, [residual(call(), torch.ones(4, 20)) for _ in range(7)])
    assert found == together
    assert len(engine.of("correlate")) == 7 - sum(together)  # the others alone


def test_what_is_kept_of_a_site_keeps_nothing_of_another():
    calls = [call(8), call(12), call(8)]
    moments = group.grouped_moments(NoKernels(), calls)
    residuals = group.grouped_residuals(NoKernels(), [residual(each, torch.ones(2, 20)) for each in calls])
    for results in (moments, residuals):
        assert len({each.untyped_storage().data_ptr() for site in results for each in site}) == 3
    for site in moments:
        assert site[0].untyped_storage().nbytes() == sum(each.nbytes for each in site)


def test_layouts_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(group, "KEPT", 2)
    found, engine = sizes(monkeypatch), NoKernels()
    for width, made in ((8, 1), (16, 2), (8, 2), (24, 3), (8, 3), (16, 4)):
        group.grouped_moments(engine, [call(width)])
        assert len(found) == made


def test_tuned_tiles_reach_layouts_that_are_known(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine, mine = Recorded(), Tiles(32, 16, 16, 2)
    given = [call(32)]
    try:
        for cut in (tiles.choose(("", "capability 9"), "matrix", "ieee", 32), mine):
            for _ in range(2):
                group.grouped_moments(engine, given)
            assert engine.of("correlate_group")[-1][4].tiles == cut
            tiles.write_tuned("", [{"kinds": ["matrix"], "operands": "ieee", "width": 32, "tiles": mine._asdict()}])
    finally:
        for cached in (tiles._tuned, tiles.choose):
            cached.cache_clear()


def test_a_refused_capture_says_what_to_run_before(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="one by one before capturing"):
        refuse_capture(torch.device("cuda"))
