"""Parts of spectra against whole decompositions."""

import pytest
import torch

from growkern.spectra import dominant
from growkern.whitening import Factor, times


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
