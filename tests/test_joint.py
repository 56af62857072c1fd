"""Method 'joint': new neurons and the update of the old weights are the best together."""

import pytest
import torch
from regressions import least_squares, measure, mlp, regression, samples
from torch import nn

import growkern as gk


@pytest.mark.parametrize("bias", [True, False])
def test_joint_is_never_worse_and_optimal(bias):
    torch.manual_seed(2)
    model, (x, y) = mlp(bias=bias), regression(seed=3)
    m = measure(model, x, y)
    a, h, v = samples(model, x, y)
    for count in (1, 2, 3):
        tiny, joint = gk.solve(m, neurons=count), gk.solve(m, method="joint", neurons=count)

        def after_refit(new):
            return least_squares(h, v - a @ (new.omega @ new.alpha).mT).square().sum(1).mean().item()

        assert after_refit(joint) <= after_refit(tiny) * (1 + 1e-12)
        assert joint.bottleneck - joint.removed == pytest.approx(after_refit(joint), rel=1e-9)
        refit = v - a @ (joint.omega @ joint.alpha).mT - h @ joint.best_update.mT
        assert refit.square().sum(1).mean().item() == pytest.approx(after_refit(joint), rel=1e-9)
    # Brute force at K = 1: gradient descent on alpha, omega with the refit solved exactly, many starts.
    best = min(brute_force_joint(a, h, v, seed) for seed in range(6))
    joint = gk.solve(m, method="joint", neurons=1)
    assert joint.bottleneck - joint.removed == pytest.approx(best, rel=1e-6)


def brute_force_joint(a, h, v, seed):
    basis = torch.linalg.qr(h)[0]
    free_a, free_v = a - basis @ (basis.mT @ a), v - basis @ (basis.mT @ v)
    g = torch.Generator().manual_seed(seed)
    alpha = torch.randn(a.shape[1], generator=g, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([alpha], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        t = free_a @ alpha  # the best omega for a given alpha, in closed form
        omega = free_v.mT @ t / t.square().sum()
        return (free_v - t[:, None] * omega).square().sum(1).mean()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return loss().item()


def test_joint_refit_is_the_best_at_the_scale_in_use_for_relu_slopes():
    torch.manual_seed(0)
    model, (x, y) = mlp(act=nn.ReLU), regression()
    m = measure(model, x, y)
    a, h, v = samples(model, x, y)
    new = gk.solve(m, method="joint", neurons=2)
    assert m.slope == 0.5
    seen = 0.5 * a @ (new.omega @ new.alpha).mT
    left = v - seen - h @ new.best_update.mT
    assert (h.mT @ left).abs().max() < 1e-9


def test_joint_with_both_biases_ignores_the_direction_of_ones():
    torch.manual_seed(4)
    model, (x, y) = mlp(), regression(seed=5)
    new = gk.solve(measure(model, x, y), method="joint", neurons=3)
    assert new.rank == 6
    assert torch.equal(new.alpha[:, -1], torch.zeros(3, dtype=torch.float64))
