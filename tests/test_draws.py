"""Draws of chance: sums over classes under random signs, and what is made of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import F64, close
from networks import NETS, at, quartic, rows, sign_matrix, sign_of_rows
from test_collect_identities import explicit
from torch import Tensor, nn

import growkern as gk
import growkern.draws
from growkern.chance import deviations
from growkern.draws import Draws, rows_per_sign
from growkern.probe import Seen

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("sizes", "draws"), [((16, 21, 1), 16), ((16, 21, 1), 5), ((1,) * 9, 16), ((9,), 2)])
@pytest.mark.parametrize(
    ("name", "kernel"), [("linear", "full"), ("tokens", "full"), ("conv", "full"), ("conv", "center")]
)
@pytest.mark.parametrize(
    ("few", "wide", "waits"),
    [(0, 2**21, False), (2**22, 2**21, False), (0, 0, False), (0, 2**21, True), (2**22, 2**21, True)],
)
def test_a_draw_is_a_sum_under_known_signs(
    name: str,
    kernel: str,
    sizes: tuple[int, ...],
    draws: int,
    few: int,
    wide: int,
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of batches of one image, of fewer images than classes, and where the draws are no power of two."""
    if waits:  # until the end of a pass
        monkeypatch.setattr(Seen, "numbers", 0)
    monkeypatch.setattr(growkern.draws, "_FEW", few)
    monkeypatch.setattr(growkern.draws, "_WIDE", wide)
    net = NETS[name]()
    model, batches = net.model(), net.batches(*sizes)
    run = 7 if name == "tokens" else 1
    moments = at(model, batches, quartic, kernel=kernel, null_draws=draws)
    draws = 8 if draws == 16 and not wide else draws
    expected = explicit(net, batches, quartic, kernel, sign_of_rows(draws, [run * size for size in sizes], run))
    assert moments.null is not None
    assert len(moments.null) == draws
    close(moments.null, expected["null"], 1e-9)
    if moments.null_h is not None:
        close(moments.null_h, expected["null_h"], 1e-9)


@pytest.mark.parametrize(("draws", "entries", "made"), [(8, 1, 8), (8, 2**30, 8), (16, 2**30, 8), (32, 1, 32)])
def test_draws_are_together_as_large_as_what_they_are_made_of(draws: int, entries: int, made: int) -> None:
    """Σ_d n_d ⊗ n_d = J Σ_j Q_j ⊗ Q_j."""
    source = Draws(draws, entries, 100, 0)
    sums = torch.randn(made, 3, 2**15, dtype=F64)  # more than are transformed at a time
    source.places(0, sums[:1], sums[:1, :0])
    source.sums["null"].copy_(sums)
    few, flat = source.made()["null"][..., ::501].flatten(1), sums[..., ::501].flatten(1)
    close(few.T @ few, made * flat.T @ flat)
    close(few, sign_matrix(made, made) @ flat)


@pytest.mark.parametrize("batches", [[1000], [7] * 100, [128] * 7 + [104], [64] * 24, [1] * 5, [3, 900, 2, 95]])
@pytest.mark.parametrize("run", [1, 3])
def test_classes_divide_the_samples_in_order(batches: list[int], run: int) -> None:
    """Every row once, in classes of about the same size, if batches are; parts end where runs do."""
    draws, count, ends, owners = Draws(32, 2**30, sum(batches), 0), sum(batches), [], []
    for size in batches:
        parts = list(draws.parts(size, run))
        assert [part.start for _, part, *_ in parts] == [0, *(part.stop for _, part, *_ in parts[:-1])]
        assert parts[-1][1].stop == size
        assert all(part.stop % run == 0 for _, part, *_ in parts[:-1])
        for number, part, signs, _ in parts:
            assert signs.shape == (1, -(-(part.stop - part.start) // run))
            assert signs.abs().eq(1).all()
            owners.append(number)
            ends.append(part.stop - part.start)
    assert owners == sorted(owners)
    assert owners[-1] <= 15
    sizes = torch.zeros(16).index_add(0, torch.tensor(owners), torch.tensor(ends, dtype=torch.float32))
    assert sizes.max() <= 2.25 * count / 16 + run
    assert max(ends) <= 1.25 * count / 16 + run


def test_signs_are_fair_and_others_in_every_process() -> None:
    signs = torch.cat([sign_of_rows(8, [8192], 1, seed) for seed in range(2)])
    products = signs @ signs.T / 8192
    assert (products - torch.eye(16)).abs().max() < 5 / 8192**0.5
    assert signs[:, 1:].mul(signs[:, :-1]).mean(1).abs().max() < 5 / 8192**0.5
    assert signs.mean(1).abs().max() < 5 / 8192**0.5


@pytest.mark.parametrize("draws", [3, 4, 7, 8, 33])
def test_thresholds_of_other_draws_are_exceeded_as_seldom(draws: int) -> None:
    """By Student's t, whose tail is integrated over u = t/x."""

    def beyond(t: float, freedom: int) -> Tensor:
        u = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
        halves = torch.tensor([freedom / 2, (freedom + 1) / 2], dtype=F64).lgamma()
        density = (1 + (t / u).square() / freedom) ** (-(freedom + 1) / 2) / (freedom * torch.pi) ** 0.5
        return (halves[1] - halves[0]).exp() * (density * t / u.square()).mean()

    assert deviations(16) == pytest.approx(5, rel=1e-11)
    close(beyond(deviations(draws) / (1 + 1 / draws) ** 0.5, draws - 1), beyond(5 / (17 / 16) ** 0.5, 15), 1e-6)


def test_one_draw_knows_no_deviation() -> None:
    net = NETS["linear"]()
    with pytest.raises(ValueError, match=r"null_draws: 'auto' needs draws .* got 1;"):
        at(net.model(), net.batches(20), quartic, null_draws=1)


def test_draws_do_not_depend_on_the_sites_beside() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    batches = [(torch.randn(n, 5, dtype=F64), None) for n in (9, 40)]
    sites = gk.find_sites(model, batches[0][0])
    together = gk.collect(model, sites, batches, quartic)
    for site in sites:
        alone = gk.collect(model, [site], batches, quartic)[site.name]
        assert torch.equal(alone.null, together[site.name].null)


@pytest.mark.parametrize(("name", "kernel"), [("conv", "full"), ("conv", "center"), ("tokens", "full")])
def test_draws_share_a_sign_per_image_or_sequence(name: str, kernel: str) -> None:
    """Of one image a draw is ±N; of two, with N = a + b, it is ±N or ±(a − b)."""
    net = NETS[name]()
    model, batches = net.model(), net.batches(1)
    moments = at(model, batches, quartic, kernel=kernel, null_draws=5)
    assert moments.xr.abs().max() > 1e-8
    for draw in moments.null:
        close(draw.abs(), moments.xr.abs(), 1e-6)
    model, batches = net.model(), net.batches(2)
    moments = at(model, batches, quartic, kernel=kernel, null_draws=24)
    kinds: list[Tensor] = []
    for draw in moments.null:
        if not any(torch.allclose(draw, sign * kind, atol=1e-12) for kind in kinds for sign in (1, -1)):
            kinds.append(draw)
    assert len(kinds) == 2
    assert any(torch.allclose(kind.abs(), moments.xr.abs(), atol=1e-10) for kind in kinds)


@pytest.mark.parametrize(("count", "run"), [(40, 1), (1600, 3)])
def test_draws_are_as_large_as_their_signs_make_them(count: int, run: int) -> None:
    """With no more runs than classes, the mean square of all draws is the sum of the squares behind each sign."""
    net = NETS["linear"]()
    model, batches = net.model(), net.batches(count)
    moments = at(model, batches, quartic, null_draws=2048)
    x = rows(batches[0][0], True)
    h = F.relu(net.producer(batches[0][0])).detach()
    z = net.consumer(h)
    v = -count * torch.autograd.grad(quartic(torch.tanh(z), None), z)[0]
    h = rows(h, True)
    rest = v - h @ torch.linalg.lstsq(h, v).solution
    each = torch.stack([part.sum(0) for part in (torch.einsum("np,nr->npr", x, rest) / count).split(run)])
    close(moments.null.square().mean(0), each.square().sum(0), 1e-9)


def test_rows_per_sign() -> None:
    """One image, or a whole number of sequences, as long as 512 signs are left; 64 rows of unknown structure."""
    assert [rows_per_sign(256, 256, count) for count in (256, 1023, 1024, 5120, 10**6)] == [1, 1, 2, 10, 64]
    assert [rows_per_sign(320, 64, count) for count in (320, 5119, 5120, 10**6)] == [5, 5, 10, 60]
    assert rows_per_sign(6400, 64, 10**6) == 100
    assert rows_per_sign(100, 64, 100) == 64
    assert rows_per_sign(0, 4, 0) == 1
    assert rows_per_sign(4096, 4096, 0) == 1
