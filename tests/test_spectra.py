"""Parts of spectra against whole decompositions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import growkern as gk
from growkern import spectra, whitening
from growkern.spectra import dominant
from growkern.whitening import Factor, relative_cut, times


@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_columns_of_a_rounded_moment_span_all_that_stands_above_the_cut(decay):
    """Against all eigenvectors, as the float32 sums of 200 samples of 700 features have them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 700, generator=g) * torch.logspace(0, -decay, 200)[:, None]
    a = (x.mT @ x).double()
    a = a / a.diagonal().outer(a.diagonal()).sqrt()
    cut = torch.tensor(1e-8 * 700)
    w, vectors = dominant(a, cut)
    all_w, all_vectors = torch.linalg.eigh(a)
    above = all_w > cut
    assert len(w) < 350  # not from a whole decomposition
    torch.testing.assert_close(w[w > cut], all_w[above], rtol=1e-8, atol=0)
    kept = vectors[:, w > cut]
    assert (kept.mT @ kept - torch.eye(int(above.sum()), dtype=torch.float64)).norm() < 1e-8
    assert (kept @ kept.mT - all_vectors[:, above] @ all_vectors[:, above].mT).norm() < 1e-8


def test_weak_directions_of_a_double_moment_are_as_whole_as_strong_ones():
    g = torch.Generator().manual_seed(0)
    f64 = {"generator": g, "dtype": torch.float64}
    weak = torch.linalg.qr(torch.randn(512, 5, **f64))[0].mT
    x = torch.randn(2000, 30, **f64) @ torch.randn(30, 512, **f64) / 30**0.5
    x += 1e-6 * torch.randn(2000, 5, **f64) @ weak * 512**0.5
    factor = Factor(x.mT @ x / 2000, by_eigenvectors=True)
    white = factor.whiten(factor.whiten(x.mT @ x / 2000).mT)
    assert factor.rank == 35
    assert (white - torch.eye(35, dtype=torch.float64)).norm() < 1e-4


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_wide_moments_of_nothing_or_no_number_come_to_an_end(value):
    a = torch.full((600, 600), value, dtype=torch.float64)
    assert not dominant(a, torch.tensor(0.0))[0].gt(0).any()


def test_products_with_float32_moments_are_those_of_float64():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 600, 40, generator=g), torch.randn(2, 3, 600, generator=g, dtype=torch.float64)
    torch.testing.assert_close(times(b, a), b @ a.double(), rtol=1e-12, atol=1e-12)


def almost_whole(kind, null, dtype, n=520):
    """A moment of n features with about so many null directions."""
    g = torch.Generator().manual_seed(0)
    if kind == "smooth":  # 20 eigenvalues of each power of ten, through the cut-off
        w = relative_cut(torch.tensor(n), dtype) * 10 ** ((torch.arange(n).double() - null - 0.5) / 20)
        q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
        return (q * w.clamp_max(1) @ q.mT).to(dtype)
    x = torch.randn(2 * n, n, generator=g, dtype=dtype)
    if null:
        x[:, -null:] = x[:, :null] if kind == "copies" else 2 * x[:, :null] - x[:, null : 2 * null]
    if kind == "dead":
        x[:, n // 2 : n // 2 + 40] = 0
    if kind == "units":
        x *= torch.logspace(-6, 6, n, dtype=dtype)[torch.randperm(n, generator=g)]
    return x.mT @ x / len(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "null"),
    [
        ("sums", 0),
        ("sums", 1),
        ("sums", 30),
        ("sums", 65),
        ("sums", 150),
        ("copies", 30),
        ("units", 30),
        ("dead", 30),
        ("smooth", 10),
    ],
)
def test_small_null_spaces_are_left_out_as_by_eigenvectors(kind, null, dtype, monkeypatch):
    a = almost_whole(kind, null, dtype)
    right = Factor(a, by_eigenvectors=True)
    if null < 150:
        monkeypatch.setattr(whitening, "dominant", None)
    factor = Factor(a)
    assert factor.sound
    assert factor.rank == right.rank
    assert 0.5 * right.condition <= factor.condition <= 1.01 * right.condition
    # On a spectrum through the cut-off of double precision, eigenvalues themselves are known to 1e-4.
    tolerance = 1e-3 if kind == "smooth" and dtype == torch.float64 else 1e-7
    white = factor.whiten(factor.whiten(a.double()).mT)  # the projection on the range, in some basis
    assert (white - white.mT).norm() < tolerance
    assert (white @ white - white).norm() < tolerance
    assert abs(white.trace() - factor.rank) < tolerance
    unit = a.diagonal().double().sqrt()[:, None]
    b = a.double() @ (torch.randn(len(a), 3, dtype=torch.float64) / unit.clamp_min(1e-300)).nan_to_num()
    one, other = unit * factor.solve(b), unit * right.solve(b)
    assert (one - other).norm() < tolerance * other.norm()


def test_a_moment_that_is_none_by_far_is_factored_by_eigenvectors(monkeypatch, caplog):
    """And if it were larger, would be only after a word of warning."""
    monkeypatch.setattr(spectra, "_LONG", 512)
    a = almost_whole("sums", 0, torch.float32)
    a[3, 4] = a[4, 3] = 1.3 * a[3, 3]
    right, factor = Factor(a, by_eigenvectors=True), Factor(a)
    assert factor.rank == right.rank == len(a) - 1
    b = torch.randn(len(a), 3, dtype=torch.float64)
    torch.testing.assert_close(factor.solve(b), right.solve(b))
    assert "520 features has neither few directions nor nearly all" in caplog.text


def test_a_null_direction_that_was_missed_shows(monkeypatch):
    a, whole = almost_whole("sums", 5, torch.float32), spectra.null_space
    monkeypatch.setattr(whitening, "null_space", lambda *args: whole(*args)[:, 1:])
    right, factor = Factor(a, by_eigenvectors=True), Factor(a)
    assert factor.rank == right.rank == len(a) - 5
    b = torch.randn(len(a), 3, dtype=torch.float64)
    torch.testing.assert_close(factor.solve(b), right.solve(b))


@pytest.mark.parametrize("method", ["tiny", "joint", "fisher"])
def test_neurons_do_not_depend_on_how_null_directions_are_left_out(method, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(900, 560, generator=g)
    x[:, 540:] = x[:, :20] - x[:, 20:40]
    target = F.relu(x @ torch.randn(560, 6, generator=g) / 20)
    model = nn.Sequential(nn.Linear(560, 8), nn.ReLU(), nn.Linear(8, 6))
    site = gk.find_sites(model, x[:1])
    moments = gk.collect(model, site, [(x, target)], F.mse_loss)["0"]
    found = []
    for unused in ("dominant", "null_space"):
        with monkeypatch.context() as patch:
            patch.setattr(whitening, unused, lambda *_: None)
            found.append(gk.solve(moments, method=method))
    one, other = found
    assert len(one) == len(other) > 0
    assert one.rank == other.rank == 541 - (method == "joint")  # h has the ones too
    for name in ("alpha", "omega", "singular_values"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-6)
    for name in ("gain", "removed", "noise"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6)
