"""What GradMax, random and Fisher neurons promise."""

import dataclasses

import pytest
import torch
from regressions import least_squares, measure, mlp, regression, samples, squared
from torch import nn

import growkern as gk


def test_gradmax_gradient_norm_on_tanh():
    torch.manual_seed(0)
    model, (x, y) = mlp(), regression()
    m = measure(model, x, y)
    new = gk.solve(m, method="gradmax", neurons=1)
    assert torch.equal(new.alpha, torch.zeros_like(new.alpha))
    existing = model[2].weight.norm(dim=0).mean().item()
    assert new.omega.norm().item() == pytest.approx(existing, rel=1e-12)
    before = model(x)
    gk.apply(model, new)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-13)
    squared(model(x), y).backward()
    gradient = torch.cat([model[0].weight.grad[-1], model[0].bias.grad[-1:]])
    assert gradient.norm().item() == pytest.approx(existing * new.singular_values[0].item(), rel=1e-10)
    assert model[2].weight.grad[:, -1].abs().max() == 0


def test_gradmax_pairs_on_relu_and_is_not_dead():
    torch.manual_seed(0)
    model, (x, y) = mlp(act=nn.ReLU), regression()
    new = gk.solve(measure(model, x, y), method="gradmax", neurons=4)
    assert len(new) == 4
    torch.testing.assert_close(new.alpha[1::2], -new.alpha[::2])
    torch.testing.assert_close(new.omega[:, 1::2], -new.omega[:, ::2])
    existing = torch.cat([model[0].weight], 1).norm(dim=1).mean()
    torch.testing.assert_close(new.alpha.norm(dim=1), 1e-3 * existing.expand(4))
    gk.apply(model, new)
    squared(model(x), y).backward()
    assert (model[0].weight.grad[-4:].norm(dim=1) > 1e-4).all()


def test_random_preserves_the_function_and_draws_like_the_layer():
    torch.manual_seed(0)
    model, (x, y) = mlp(p=50), regression(p=50)
    new = gk.solve(measure(model, x, y), method="random", neurons=400)
    bound = 50**-0.5
    assert new.alpha.abs().max() <= bound
    assert new.alpha.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    before = model(x)
    gk.apply(model, new)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-13)


def test_fisher_singular_values_are_canonical_correlations():
    torch.manual_seed(0)
    model, (x, y) = mlp(), regression()
    m = measure(model, x, y)
    a, h, v = samples(model, x, y)
    residual = least_squares(h, v)
    qa = torch.linalg.qr(a)[0]
    root = torch.linalg.cholesky(v.mT @ v)
    expected = torch.linalg.svdvals(torch.linalg.solve_triangular(root, residual.mT @ qa, upper=False))
    new = gk.solve(m, method="fisher", neurons=4)
    torch.testing.assert_close(new.singular_values, expected, rtol=1e-9, atol=0)
    # Rescaling an output of v leaves λ alone: it has no unit.
    stretch = torch.tensor([1.0, 10.0, 0.1, 1000.0], dtype=torch.float64)
    scaled = dataclasses.replace(
        m,
        **{k: getattr(m, k) * stretch for k in ("xv", "hv", "xr")},
        vv=m.vv * stretch * stretch[:, None],
        null=None,
    )
    torch.testing.assert_close(
        gk.solve(scaled, method="fisher", neurons=4).singular_values, expected, rtol=1e-8, atol=0
    )


def test_fisher_on_a_wide_moment_of_few_directions():
    """600 outputs and 100 samples: vv has 100 directions, and its factor as many columns, give or take."""
    torch.manual_seed(0)
    model, x, target = mlp(p=12, q=5, r=600).double(), torch.randn(100, 12).double(), torch.randn(100, 600).double()
    m = measure(model, x, target)
    assert torch.linalg.matrix_rank(m.vv) <= 100
    new = gk.solve(m, method="fisher", neurons=3)
    w, q = torch.linalg.eigh(m.vv)
    root = q * w.clamp_min(0).where(w > 1e-10 * w[-1], torch.zeros(())).pow(-0.5).nan_to_num(posinf=0) @ q.mT
    t = torch.linalg.solve_triangular(torch.linalg.cholesky(m.xx), m.xr, upper=False) @ root
    expected = torch.linalg.svdvals(t)
    torch.testing.assert_close(new.singular_values, expected[:3], rtol=1e-8, atol=0)
    auto = gk.solve(measure(model, x, target, null_draws=4), method="fisher", neurons="auto")
    assert auto.noise is not None
    assert 0 < auto.noise < 10 * expected[0]
