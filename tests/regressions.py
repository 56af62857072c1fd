"""Regressions in float64 whose samples x, h and v can be written out by hand."""

import torch
from torch import nn

import growkern as gk


def mlp(p=6, q=5, r=4, act=nn.Tanh, bias=True):
    layers = [nn.Linear(p, q, bias=bias), act(), nn.Linear(q, r, bias=bias)]
    return nn.Sequential(*layers).double()


def conv_net(kernel=3, stride=1, act=nn.Tanh, norm=False, pool=False, bias=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, padding=1, bias=bias)]
    layers += [nn.BatchNorm2d(3)] if norm else []
    layers += [act()] + ([nn.AvgPool2d(2)] if pool else [])
    layers += [nn.Conv2d(3, 4, kernel, stride=stride, padding=kernel // 2, bias=bias)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3)).double()


def regression(n=200, p=6, r=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=g, dtype=torch.float64)
    mix = torch.randn(p, r, generator=g, dtype=torch.float64)
    return x, torch.sin(2 * x @ mix) + 0.3 * torch.randn(n, r, generator=g, dtype=torch.float64)


def images(n=24):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, 8, 8, generator=g, dtype=torch.float64)
    return x, torch.randn(n, 3, generator=g, dtype=torch.float64)


def squared(output, target):
    """Half the squared error, summed over outputs and averaged over samples: v is the plain residual."""
    return 0.5 * (output - target).square().sum(-1).mean()


def measure(model, x, y, site=None, **kwargs):
    site = site or gk.find_sites(model, x[:2])[0]
    return gk.collect(model, [site], [(x, y)], squared, **kwargs)[site.name]


def samples(model, x, y):
    """x and h with their ones, and v, of the two-layer model, by hand."""
    ones = x.new_ones(len(x), 1)
    with torch.no_grad():
        h = model[1](model[0](x))
        v = y - model[2](h)
    bias = model[0].bias is not None
    return (torch.cat([x, ones], 1), torch.cat([h, ones], 1), v) if bias else (x, h, v)


def least_squares(a, b):
    """Residual of b on a."""
    return b - a @ torch.linalg.lstsq(a, b, driver="gelsd").solution
