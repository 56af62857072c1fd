"""The predicted gain is the derivative of the loss, and λ² bounds what a neuron removes."""

import pytest
import torch
from regressions import conv_net, images, least_squares, measure, mlp, regression, squared
from torch import nn

import growkern as gk
from growkern.surgery import trial


def finite_difference(model, new, x, y, loss=squared, step=1e-8):

    model.eval()
    with torch.no_grad():
        at_zero = loss(model(x), y)
        with trial(model, new, scale=step):
            return ((at_zero - loss(model(x), y)) / step).item()


@pytest.mark.parametrize("method", ["tiny", "joint", "fisher"])
@pytest.mark.parametrize(
    ("act", "paired"),
    [(nn.Identity, False), (nn.Tanh, False), (nn.GELU, False), (nn.GELU, True), (nn.ReLU, True)],
)
def test_gain_is_the_derivative_of_the_loss(method, act, paired):
    torch.manual_seed(0)
    model, (x, y) = mlp(act=act), regression()
    new = gk.solve(measure(model, x, y), method=method, neurons=4, paired=paired)
    assert finite_difference(model, new, x, y) == pytest.approx(new.gain, rel=2e-3)


def test_gain_equals_half_the_squares_for_relu_once_the_weights_are_at_their_optimum():
    torch.manual_seed(0)
    model, (x, y) = mlp(act=nn.ReLU), regression()
    update = gk.solve(measure(model, x, y), neurons=1).best_update
    with torch.no_grad():
        model[2].weight += update[:, :-1]
        model[2].bias += update[:, -1]
    new = gk.solve(measure(model, x, y), neurons=3)
    assert new.reachable < 1e-12 * new.bottleneck
    assert new.gain == pytest.approx(0.5 * new.singular_values.square().sum().item(), rel=1e-8)


@pytest.mark.parametrize("kernel", ["full", "center"])
@pytest.mark.parametrize("options", [{}, {"norm": True}, {"pool": True}, {"stride": 2}, {"kernel": 5, "bias": False}])
def test_gain_is_the_derivative_of_the_loss_for_convolutions(kernel, options):
    x, y = images()
    model = conv_net(**options)
    model(x)  # lazy layers and running statistics
    site = gk.find_sites(model, x)[0]
    assert (site.producer, site.consumer) == ("0", str(2 + options.get("norm", 0) + options.get("pool", 0)))
    new = gk.solve(measure(model, x, y, site, kernel=kernel), neurons=2)
    assert new.removed > 0
    assert finite_difference(model, new, x, y) == pytest.approx(new.gain, rel=2e-3)


def test_full_kernel_bound_for_one_neuron():
    """Σλ² of one full-kernel neuron is at most what the neuron truly removes at its best amplitude."""
    x, y = images(40)
    model = conv_net(act=nn.Identity)
    model(x)
    site = gk.find_sites(model, x)[0]
    m = measure(model, x, y, site)
    new = gk.solve(m, neurons=1)
    with torch.no_grad():
        h, seen = model[0](x), {}
        handle = model[2].register_forward_hook(lambda mod, args, z: seen.update(z=z))
        z = model[2](h)
        handle.remove()
    z = z.detach().requires_grad_()
    squared(model[3:](z), y).backward()
    v = -len(x) * z.grad
    hp = torch.nn.functional.unfold(h, 3, padding=1)
    hp = torch.cat([hp, torch.ones_like(hp[:, :1])], 1).movedim(1, -1).flatten(0, 1)  # (n·l, q)
    free = least_squares(hp, v.flatten(2).movedim(1, -1).flatten(0, 1))
    free = free.unflatten(0, (len(x), -1)).movedim(-1, 1).reshape_as(v)
    assert new.bottleneck == pytest.approx((free.square().sum() / len(x)).item(), rel=1e-9)
    weight, bias = new.alpha[:, :-1].reshape(1, 2, 3, 3), new.alpha[:, -1]
    omega = new.omega.reshape(4, 3, 3, 1).movedim(-1, 1)
    contribution = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, weight, bias, padding=1), omega, padding=1)
    truly = (free.square().sum() - (free - contribution).square().sum()) / len(x)
    assert new.removed == pytest.approx(new.singular_values.square().sum().item(), rel=1e-9)
    assert truly.item() >= new.removed * (1 - 1e-9)
