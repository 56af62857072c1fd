"""SOLVE for the neurons that remove most of a bottleneck: one solver, four switches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from growkern.arguments import check_choice, check_count, check_instance
from growkern.between import Between
from growkern.chance import threshold
from growkern.moments import Moments
from growkern.sites import GrowthSite
from growkern.stacks import Solution, Stack, solve_together
from growkern.whitening import Factor, Whitened, by_row, times

_GRADMAX_START = 1e-3  # norm of the fan-in relative to existing units, where relu'(0) = 0 would leave 0 dead


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes
    ----------
    project : bool
        Target N, what the existing weights cannot reach, instead of xv.
    whiten_x, whiten_v : bool
        Measure directions of x, of v, in their own standard deviations.
    schur : bool
        Whiten x by what h cannot express of it: the joint optimum of neurons and existing weights.
    starts_at_zero : str
        "neither", "fan_in" or "fan_out".
    """

    project: bool = True
    whiten_x: bool = True
    whiten_v: bool = False
    schur: bool = False
    starts_at_zero: str = "neither"


METHODS = {
    "tiny": Method(),
    "joint": Method(schur=True),
    "gradmax": Method(project=False, whiten_x=False, starts_at_zero="fan_in"),
    "fisher": Method(whiten_v=True),
    "random": Method(project=False, whiten_x=False, starts_at_zero="fan_out"),
}


@dataclass
class NewNeurons:
    """Neurons for one site, in order of importance, and what they promise.

    Units: v is −∂L/∂z of a sample, so `bottleneck` and `removed` are squared gradients and `gain` is in units of
    the loss. For ``kernel="full"`` `removed` and the singular values share one `xx` among kernel offsets: for one
    neuron a lower bound of what it truly removes.

    Attributes
    ----------
    site : GrowthSite
        Where they belong.
    method : str
        What found them.
    kernel : str
        "linear", "full" or "center".
    alpha, omega : Tensor
        Fan-in (K, p), with the bias last if the producer has one; fan-out (r·offsets, K). float64.
    singular_values : Tensor
        λ (K,), of the whitened target; 0 for "random".
    best_update : Tensor
        dW* (r, q) of the consumer's weights, with the bias last if it has one.
    bottleneck : float
        Ψ = E‖v⊥‖², what no change of the consumer's weights can reach.
    reachable : float
        What dW* reaches: E‖v‖² − Ψ.
    removed : float
        Decrease of Ψ by these neurons in the linear model, 2⟨Σ α ωᵀ, N⟩ − E‖Σ ω αᵀx‖².
    gain : float
        −dL/dγ at γ = 0 of the neurons alone.
    rank, condition : int, float
        Of the moment of x that was factored.
    noise : float or None
        What chance produces among the singular values: the threshold of ``neurons="auto"``, or infinity.
    cut : int
        Units that "auto" could have added and did not, because they do not stand above `noise`.
    mean, variance : Tensor or None
        Of each unit's pre-activation (K,), where a norm lies between.
    """

    site: GrowthSite
    method: str
    kernel: str
    alpha: Tensor
    omega: Tensor
    singular_values: Tensor
    best_update: Tensor
    bottleneck: float
    reachable: float
    removed: float
    gain: float
    rank: int
    condition: float
    noise: float | None
    cut: int
    mean: Tensor | None
    variance: Tensor | None

    def __len__(self) -> int:
        return self.alpha.shape[0]


@overload
def solve(
    moments: Moments, *, method: str = ..., neurons: int | str = ..., max_neurons: int | None = ..., paired: bool = ...
) -> NewNeurons: ...
@overload
def solve(
    moments: Mapping[str, Moments],
    *,
    method: str = ...,
    neurons: int | str = ...,
    max_neurons: int | None = ...,
    paired: bool = ...,
) -> dict[str, NewNeurons]: ...
def solve(
    moments: Moments | Mapping[str, Moments],
    *,
    method: str = "tiny",
    neurons: int | str = "auto",
    max_neurons: int | None = None,
    paired: bool = False,
) -> NewNeurons | dict[str, NewNeurons]:
    """Compute the best new neurons of a site from its moments.

    Parameters
    ----------
    moments : Moments or mapping of str to Moments
        What `collect` measured.
    method : str
        A name in `METHODS`: "tiny" (TINY, proposition 3.2), "joint" (neurons and existing weights together),
        "gradmax" (Evci et al. 2022), "fisher" (whitened on both sides) or "random".
    neurons : "auto" or int
        How many new units; "auto" keeps what stands above chance. Fewer come back where the moments have fewer
        directions. Each ± pair counts as two.
    max_neurons : int, optional
        Upper bound for either.
    paired : bool
        Add (α, ω) and (−α, −ω): exactly linear for ReLU and GELU. "gradmax" pairs by itself on ReLU-like σ.

    Returns
    -------
    NewNeurons or dict of str to NewNeurons
        One for each Moments.

    Raises
    ------
    ValueError
        For an argument that is not as described, or moments that are not finite or lack what is asked for.
    """
    check_options(method, neurons, max_neurons)
    if isinstance(moments, Moments):
        return solve({"": moments}, method=method, neurons=neurons, max_neurons=max_neurons, paired=paired)[""]
    check_instance("moments", moments, Mapping, "Moments or a dict of them")
    for each in moments.values():
        _check(each, method, neurons, paired)

    def alike(each: Moments) -> tuple[Any, ...]:
        alone = id(each) if METHODS[method].starts_at_zero == "fan_out" else None  # random numbers come in order
        return each.smooth, each.multiple, each.x_mean is None, alone

    found = solve_together(moments, alike, lambda m, by: _solve(m, method, neurons, max_neurons, paired, by))
    return {
        name: NewNeurons(site=each.site, method=method, kernel=each.kernel, **found[name])
        for name, each in moments.items()
    }


def _solve(
    m: Stack, method: str, neurons: int | str, max_neurons: int | None, paired: bool, by_eigenvectors: bool
) -> Solution:
    """Solve B sites at once."""
    rule = METHODS[method]
    paired = paired or (rule.starts_at_zero == "fan_in" and not m.parts[0].smooth)
    unit, units = granularity(m.parts[0], method, paired), 2 if paired else 1
    known = m.update is not None and not rule.schur and (neurons != "auto" or m.null_h is None)
    hh = None if known else Factor(m.hh, None, m.dtype, by_eigenvectors)
    update = hh.solve(m.hv) if hh is not None else m.update.mT  # type: ignore[union-attr]  # (B, q, r)
    power, reachable = m.vv.diagonal(dim1=1, dim2=2).double().sum(1), (m.hv * update).sum((1, 2))
    bottleneck = (power - reachable).clamp_min(0)
    unreachable = m.xr if m.xr is not None else m.xv - m.xh @ update  # type: ignore[operator]  # N (B, p, r·offsets)
    target = unreachable if rule.project else m.xv.double()
    x = _whitening(m, rule, hh, by_eigenvectors) if rule.whiten_x else None
    v = Factor(m.vv, None, m.dtype, by_eigenvectors) if rule.whiten_v else None
    sound = [factor.sound for factor in (hh, x, v) if factor is not None]

    limits = [min(each.xv.shape) if neurons == "auto" else int(neurons) // units for each in m.parts]
    limits = limits if max_neurons is None else [min(limit, max_neurons // units) for limit in limits]
    noise = threshold(m, x, v, hh, bottleneck, rule.project) if neurons == "auto" else None
    if rule.starts_at_zero == "fan_out":
        count = m.numbers(limits) * units // unit * unit // units
        alpha, omega, values = _random(m.parts[0], int(limits[0] * units // unit * unit // units))
    else:
        t = Whitened(target, x, v, m.offsets)
        values, side = t.singular(max(limits), noise)
        sound.append(~values.isnan().any(1) & ~(power if noise is None else noise).isnan())
        scale = m.xv.flatten(1).double().norm(dim=1) if x is None else (v.rank if v else power).sqrt()
        floor = torch.maximum(1e3 * torch.finfo(m.dtype).eps * scale, 1e-7 * values[:, :1].sum(1))
        floor = floor if noise is None else torch.maximum(floor, noise)
        count = torch.minimum(m.numbers(limits), (values > floor[:, None]).sum(1)) * units // unit * unit // units
        # How many are wanted at most; on a GPU, to look would be to wait.
        most = min(max(limits), values.shape[1]) if count.is_cuda else int(count.max())
        u, w = t.both_sides(values[:, :most], side[..., :most])
        values = values[:, :most]
        alpha, omega = _scaled(m, rule, x, v, u, values, w)
        wanted = torch.arange(alpha.shape[1], device=count.device) < count[:, None]
        alpha, omega = torch.where(wanted[..., None], alpha, 0), torch.where(wanted[:, None], omega, 0)

    slope = m.numbers([each.slope * units for each in m.parts])
    linear = (alpha @ unreachable * omega.mT).sum((1, 2))  # ⟨Σ α ωᵀ, N⟩
    # α xx αᵀ, where α = L⁻ᵀ u √λ and xx = L Lᵀ
    spread = times(alpha, m.xx) @ alpha.mT if x is None else u.mT @ u * (values[:, None] * values[..., None]).sqrt()
    removed = 2 * linear - (spread * (omega.mT @ omega)).sum((1, 2))
    gain = slope * (alpha.to(m.xv.dtype) @ m.xv * omega.mT).sum((1, 2))  # to the rounding of what was measured
    gain = gain * m.numbers([each.count if each.reduction == "sum" else 1 for each in m.parts])
    if rule.schur and hh is not None:
        passed = alpha @ m.xh  # type: ignore[operator]  # (B, K, q)
        update = hh.solve(m.hv - slope[:, None, None] * (omega @ passed).mT)
    if paired:
        alpha = torch.stack([alpha, -alpha], dim=2).flatten(1, 2)
        omega = torch.stack([omega, -omega], dim=3).flatten(2, 3)
        values = values.repeat_interleave(2, dim=1)
    tensors = {"alpha": alpha, "omega": omega, "singular_values": values, "best_update": update.mT}
    if m.x_mean is not None and m.x_second is not None:
        mean, second = (alpha @ m.x_mean[..., None]).squeeze(-1), (times(alpha, m.x_second) * alpha).sum(2)
        tensors |= {"mean": mean, "variance": (second - mean.square()).clamp_min(0)}
    facts = {"bottleneck": bottleneck, "reachable": reachable, "removed": removed, "gain": gain}
    facts["rank"] = m.numbers([each.xx.shape[0] for each in m.parts]) if x is None else x.rank
    facts["condition"] = torch.ones_like(power) if x is None else x.condition
    if noise is not None:
        facts |= {"noise": noise, "cut": (m.numbers(limits) - count) * units}
    return Solution(tensors, facts, count * units, torch.stack([power.isfinite(), *sound]).all(0))


def check_options(method: str, neurons: int | str, max_neurons: int | None) -> None:
    """Raise a ValueError for options of `solve` that no moments could satisfy."""
    check_choice("method", method, METHODS)
    check_count("neurons", neurons, also="auto")
    if max_neurons is not None:
        check_count("max_neurons", max_neurons)
    if neurons == "auto" and METHODS[method].starts_at_zero == "fan_out":
        raise ValueError(f"neurons: {method!r} has no directions to count; give an integer")


def granularity(site: Moments | Between, method: str, paired: bool) -> int:
    """Units that a site grows by: whole groups of a GroupNorm, and ± pairs, also those that `method` needs."""
    paired = paired or (METHODS[method].starts_at_zero == "fan_in" and not site.smooth)
    return site.multiple * 2 if paired and site.multiple % 2 else site.multiple


def _check(moments: Moments, method: str, neurons: int | str, paired: bool) -> None:
    """Raise a ValueError for moments that lack what is asked for."""
    site, unit = moments.site, granularity(moments, method, paired)
    if neurons != "auto" and int(neurons) % unit:
        why = "± pairs" if unit > moments.multiple or paired else "groups of its GroupNorm"
        raise ValueError(f"neurons: site {site.name!r} grows by multiples of {unit} units ({why}), got {neurons}")
    if METHODS[method].schur and moments.xh is None:
        raise ValueError(f"method: 'joint' needs E[x hᵀ], which site {site.name!r} has only with kernel='center'")
    if moments.xr is None and moments.xh is None:
        raise ValueError(f"moments: site {site.name!r} has neither xr nor xh; measure it with collect()")


def _whitening(m: Stack, rule: Method, hh: Factor | None, by_eigenvectors: bool) -> Factor:
    """Factor of the quadratic form of new neurons, (B, p, p)."""
    if not rule.schur:
        return Factor(m.xx, None, m.dtype, by_eigenvectors)
    assert m.xh is not None and hh is not None  # noqa: PT018
    passed = hh.whiten(m.xh.mT)  # (B, q, p)
    complement = m.xx - passed.mT @ passed
    apart = m.apart & (complement.diagonal(dim1=1, dim2=2) > 0)
    complement = complement * apart[:, None] * apart[..., None]
    return Factor(complement, m.xx.diagonal(dim1=1, dim2=2) * apart, m.dtype, by_eigenvectors)


def _scaled(
    m: Stack, rule: Method, x: Factor | None, v: Factor | None, u: Tensor, values: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    """Fan-in (B, K, p) and fan-out (B, r·offsets, K) from singular vectors u, w of the whitened target."""
    if v is not None:
        w = by_row(v.unwhiten, w, m.offsets)
    if w.numel():  # singular vectors have no sign of their own: the largest entry of the fan-out is positive
        sign = w.gather(1, w.abs().argmax(1, keepdim=True)).sign()
        u, w = u * sign, w * sign
    if rule.starts_at_zero == "fan_in":
        start = m.numbers([0.0 if each.smooth else _GRADMAX_START * (each.fan_in_norm or 1.0) for each in m.parts])
        size = m.numbers([each.fan_out_norm or 1.0 for each in m.parts])
        return start[:, None, None] * u.mT, size[:, None, None] * w
    assert x is not None
    root = values.sqrt()[:, None]
    return (x.unwhiten(u) * root).mT, w * root


def _random(moments: Moments, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fan-in from the layers' own initialisation (uniform up to 1/√fan-in), fan-out zero; a stack of one."""
    p = moments.xx.shape[0]
    bound = max(p - moments.x_bias, 1) ** -0.5
    like = moments.xx.new_empty(0, dtype=torch.float64)
    alpha = like.new_empty(1, count, p).uniform_(-bound, bound)
    return alpha, like.new_zeros(1, moments.xv.shape[1], count), like.new_zeros(1, count)
