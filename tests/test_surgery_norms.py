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
    close(model[1].weight[6:], (pre.var(1, unbiased=False) + model[1].eps).sqrt().repeat_interleave(2))
    close(model[1].bias[6:], pre.mean(1).repeat_interleave(2))


def test_group_norm_refuses_part_of_a_group() -> None:
    model, new, _ = grouped()
    odd = drawn(new, 3)
    before = picture(model)
    with pytest.raises(ValueError, match="multiples of 2"):
        gk.apply(model, odd)
    assert_same(before, picture(model))
