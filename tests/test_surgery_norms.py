"""Widening norms: new channels are born as the identity, old groups stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import F64, assert_same, close, picture
from growth import drawn, grouped, lively
from torch import Tensor, nn

import growkern as gk

pytestmark = pytest.mark.usefixtures("one_thread")

NORMED: dict[str, tuple[Callable[[bool], tuple[nn.Module, ...]], tuple[int, ...]]] = {
    "linear": (lambda b: (nn.Linear(6, 5, bias=b), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)), (6,)),
    "conv": (
        lambda b: (nn.Conv2d(3, 5, 3, 2, 1, bias=b), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1)),
        (3, 9, 8),
    ),
    "average pooling": (
        lambda b: (nn.Conv2d(3, 5, 3, bias=b), nn.AvgPool2d(2), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 2)),
        (3, 9, 8),
    ),
    "padded average pooling": (
        lambda b: (nn.Conv2d(3, 5, 3, bias=b), nn.AvgPool2d(3, 2, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3)),
        (3, 9, 8),
    ),
    "pooling after": (
        lambda b: (nn.Conv2d(3, 5, 3, 2, bias=b), nn.BatchNorm2d(5), nn.AvgPool2d(3, 1, 1), nn.Conv2d(5, 4, 3)),
        (3, 9, 7),
    ),
    "flatten": (
        lambda b: (nn.Conv2d(3, 5, 3, bias=b), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(40, 4)),
        (3, 6, 4),
    ),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NORMED)
def test_batch_norm_is_born_as_the_identity(name: str, bias: bool) -> None:
    """In evaluation mode; its running statistics are those of the pre-activation on the measured batches."""
    build, sample = NORMED[name]
    model = lively(nn.Sequential(*build(bias)).double())
    batches = [(torch.randn(n, *sample, dtype=F64) + 0.5, None) for n in (37, 24)]
    (site,) = gk.find_sites(model, batches[0][0])
    moments = gk.collect(model, [site], batches, lambda y, _: y.pow(4).mean(), null_draws=0)
    new = gk.solve(moments["0"], neurons=2, method="random")
    (norm,) = (m for m in model if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    old = {k: v.clone() for k, v in norm.state_dict().items()}
    gk.apply(model, new, scale=-0.6)
    seen: list[tuple[Tensor, Tensor]] = []
    norm.register_forward_hook(lambda m, a, out: seen.append((a[0][:, 5:], out[:, 5:])))
    with torch.no_grad():
        for x, _ in batches:
            model.eval()(x)
    before, after = (torch.cat([pair[i].transpose(0, 1).flatten(1) for pair in seen], 1) for i in (0, 1))
    assert len(before) == 2
    close(after, before, 1e-12)
    close(norm.running_mean[5:], before.mean(1))
    close(norm.running_var[5:], before.var(1, unbiased=False))
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(norm, key)[:5], old[key])
    assert norm.num_batches_tracked == old["num_batches_tracked"]


def test_group_norm_keeps_old_groups() -> None:
    model, new, x = grouped()
    before = model(x)
    same = copy.deepcopy(model)
    gk.apply(same, new, scale=0.0)
    assert (same(x) - before).abs().max() <= 1e-12
    outputs: list[Tensor] = []
    model[1].register_forward_hook(lambda m, a, out: outputs.append(out.detach()))
    model(x)
    gk.apply(model, new, scale=0.5)
    model(x)
    close(outputs[1][:, :6], outputs[0], 1e-12)
    assert (model[1].num_groups, model[1].num_channels) == (5, 10)
    pre = F.conv2d(x, model[0].weight[6:], model[0].bias[6:]).transpose(0, 1).reshape(2, -1)  # two groups of two
    size = model[1].weight[6:] / (pre.var(1, unbiased=False) + model[1].eps).sqrt().repeat_interleave(2)
    close(model[1].bias[6:], size * pre.mean(1).repeat_interleave(2))
    fan_in = torch.cat([model[0].weight[6:].flatten(1), model[0].bias[6:, None]], 1)
    close(model[0].weight[6:].flatten(1).norm(dim=1).mean(), same[0].weight[:6].flatten(1).norm(dim=1).mean())
    fan_out = consumer_columns(model, 6, new) * size[:, None]
    close(fan_out[:, :, None] * fan_in[:, None], 0.5 * new.omega.T[:, :, None] * new.alpha[:, None])


def consumer_columns(model: nn.Module, units: int, new: gk.NewNeurons) -> Tensor:
    """Fan-out (K, r·offsets) of the new units in the last layer."""
    return model[-1].weight.detach()[:, units:].transpose(0, 1).reshape(len(new), -1)


@pytest.mark.parametrize("method", ["tiny", "fisher"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_new_units_take_the_scale_of_existing_ones_under_a_norm(activation: type[nn.Module], method: str) -> None:
    """The fan-in always; the norm's weight where σ(c·t) = c·σ(t). The product with ω is what was solved for."""
    layers = (nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), activation(), nn.Conv2d(5, 4, 3))
    model = lively(nn.Sequential(*layers).double())
    x = torch.randn(40, 3, 9, 8, dtype=F64)
    x[:, 0, 0, 0] *= 1e-3  # an input that hardly varies
    (site,) = gk.find_sites(model, x)
    moments = gk.collect(model, [site], [(x, None)], lambda y, _: y.pow(4).mean(), null_draws=0)
    new = gk.solve(moments["0"], neurons=3, method=method)
    before = copy.deepcopy(model)
    gk.apply(model, new, scale=-0.7)
    fan_in, norm = model[0].weight[5:].flatten(1), model[1]
    existing = before[0].weight.flatten(1).norm(dim=1).mean()
    close(fan_in.norm(dim=1), existing.expand(3))
    mean_size = before[1].weight.abs().mean()
    is_at_scale = (norm.weight[5:] - mean_size).abs().max() < 1e-9
    assert is_at_scale == (activation is nn.ReLU)
    slope = norm.weight[5:] / (norm.running_var[5:] + norm.eps).sqrt()
    fan_out = consumer_columns(model, 5, new)
    if activation is nn.Tanh:
        close(slope[:, None] * fan_in, 0.7**0.5 * new.alpha)
        close(fan_out, -(0.7**0.5) * new.omega.T)
    found = slope[:, None, None] * fan_out[:, :, None] * fan_in[:, None]
    close(found, -0.7 * new.omega.T[:, :, None] * new.alpha[:, None])


def test_group_norm_refuses_part_of_a_group() -> None:
    model, new, _ = grouped()
    odd = drawn(new, 3)
    before = picture(model)
    with pytest.raises(ValueError, match="multiples of 2"):
        gk.apply(model, odd)
    assert_same(before, picture(model))
