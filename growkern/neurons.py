"""SOLVE for the neurons that remove most of a bottleneck: one solver, four switches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from growkern.arguments import check_choice, check_count
from growkern.chance import threshold
from growkern.moments import Moments
from growkern.sites import GrowthSite
from growkern.whitening import Factor, singular, whiten_both

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
        What chance produces among the singular values: the threshold of ``neurons="auto"``.
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
    if isinstance(moments, Mapping):
        options: dict[str, Any] = {"neurons": neurons, "max_neurons": max_neurons, "paired": paired}
        return {name: solve(each, method=method, **options) for name, each in moments.items()}
    try:
        return _solve(moments, method, neurons, max_neurons, paired)
    except ArithmeticError as error:
        raise ValueError(f"moments: site {moments.site.name!r}: {error}") from None


def _solve(moments: Moments, method: str, neurons: int | str, max_neurons: int | None, paired: bool) -> NewNeurons:
    """Solve one site."""
    check_options(method, neurons, max_neurons)
    rule, site = METHODS[method], moments.site
    paired = paired or (rule.starts_at_zero == "fan_in" and not moments.smooth)
    unit = granularity(moments, method, paired)
    if neurons != "auto" and int(neurons) % unit:
        why = "± pairs" if paired else "groups of its GroupNorm"
        raise ValueError(f"neurons: site {site.name!r} grows by multiples of {unit} units ({why}), got {neurons}")
    for name, tensor in moments.tensors().items():
        if not tensor.isfinite().all():
            raise ValueError(f"moments: {name} of site {site.name!r} is not finite")
    if rule.schur and moments.xh is None:
        raise ValueError(f"method: 'joint' needs E[x hᵀ], which site {site.name!r} has only with kernel='center'")

    hv, vv = moments.hv.double(), moments.vv.double()
    known = moments.update is not None and not rule.schur and (neurons != "auto" or moments.null_h is None)
    hh = None if known else Factor(moments.hh)
    update = hh.solve(hv) if hh is not None else moments.update.double().mT  # type: ignore[union-attr]  # (q, r)
    power, reachable = float(vv.trace()), float((hv * update).sum())
    bottleneck = max(power - reachable, 0.0)
    unreachable = _project(moments, update)  # N (p, r·offsets)
    target = unreachable if rule.project else moments.xv.double()
    xx, factor = _metric(moments, rule, hh)
    v_factor = Factor(moments.vv) if rule.whiten_v else None

    units = 2 if paired else 1
    limit = min(target.shape) if neurons == "auto" else int(neurons) // units
    if max_neurons is not None:
        limit = min(limit, max_neurons // units)
    noise = None
    if rule.starts_at_zero == "fan_out":
        alpha, omega, values = _random(moments, limit * units // unit * unit // units)
    else:
        u, values, w = singular(whiten_both(target, factor, v_factor, moments.offsets))
        if neurons == "auto":
            noise = threshold(moments, factor, v_factor, hh, bottleneck, rule.project)
            limit = min(limit, int((values > noise).sum()))
        scale = float(moments.xv.norm()) if factor is None else (v_factor.rank if v_factor else power) ** 0.5
        floor = max(1e3 * torch.finfo(moments.vv.dtype).eps * scale, 1e-7 * float(values[:1].sum()))
        limit = min(limit, int((values > floor).sum())) * units // unit * unit // units
        u, values, w = u[:, :limit], values[:limit], w[:, :limit]
        alpha, omega = _scaled(moments, rule, factor, v_factor, u, values, w)

    linear = (alpha @ unreachable * omega.mT).sum()  # ⟨Σ α ωᵀ, N⟩
    removed = float(2 * linear - ((alpha @ xx @ alpha.mT) * (omega.mT @ omega)).sum())
    gain = moments.slope * units * float((alpha @ moments.xv.double() * omega.mT).sum())
    gain *= moments.count if moments.reduction == "sum" else 1
    if rule.schur and hh is not None:
        passed = alpha @ moments.xh.double()  # type: ignore[union-attr]  # (K, q)
        update = hh.solve(hv - moments.slope * units * (omega @ passed).mT)
    if paired:
        alpha = torch.stack([alpha, -alpha], dim=1).flatten(0, 1)
        omega = torch.stack([omega, -omega], dim=2).flatten(1, 2)
        values = values.repeat_interleave(2)
    mean = variance = None
    if moments.x_mean is not None and moments.x_second is not None:
        mean = alpha @ moments.x_mean.double()
        variance = ((alpha @ moments.x_second.double() * alpha).sum(1) - mean.square()).clamp_min(0)
    return NewNeurons(
        site=site,
        method=method,
        kernel=moments.kernel,
        alpha=alpha,
        omega=omega,
        singular_values=values,
        best_update=update.mT.contiguous(),
        bottleneck=bottleneck,
        reachable=reachable,
        removed=removed,
        gain=gain,
        rank=alpha.shape[1] if factor is None else factor.rank,
        condition=1.0 if factor is None else factor.condition,
        noise=noise,
        mean=mean,
        variance=variance,
    )


def check_options(method: str, neurons: int | str, max_neurons: int | None) -> None:
    """Raise a ValueError for options of `solve` that no moments could satisfy."""
    check_choice("method", method, METHODS)
    check_count("neurons", neurons, also="auto")
    if max_neurons is not None:
        check_count("max_neurons", max_neurons)
    if neurons == "auto" and METHODS[method].starts_at_zero == "fan_out":
        raise ValueError(f"neurons: {method!r} has no directions to count; give an integer")


def granularity(moments: Moments, method: str, paired: bool) -> int:
    """Units that a site grows by: whole groups of a GroupNorm, and ± pairs, also those that `method` needs."""
    paired = paired or (METHODS[method].starts_at_zero == "fan_in" and not moments.smooth)
    return moments.multiple * 2 if paired and moments.multiple % 2 else moments.multiple


def _project(moments: Moments, update: Tensor) -> Tensor:
    """N = xv − xh hh⁺ hv, or as it was measured directly."""
    if moments.xr is not None:
        return moments.xr.double()
    if moments.xh is None:
        raise ValueError(f"moments: site {moments.site.name!r} has neither xr nor xh; measure it with collect()")
    return moments.xv.double() - moments.xh.double() @ update


def _metric(moments: Moments, rule: Method, hh: Factor | None) -> tuple[Tensor, Factor | None]:
    """Give the quadratic form of new neurons, (p, p), and its factor where x is whitened."""
    xx = moments.xx.double()
    if not rule.schur:
        return xx, Factor(moments.xx) if rule.whiten_x else None
    assert moments.xh is not None and hh is not None  # noqa: PT018
    passed = hh.whiten(moments.xh.mT)  # (q, p)
    complement = xx - passed.mT @ passed
    if moments.x_bias and moments.h_bias and torch.isclose(moments.xx[-1, -1], moments.hh[-1, -1], rtol=1e-6):
        complement[-1], complement[:, -1] = 0, 0  # the ones of x are the ones of h
    return complement, Factor(complement, xx.diagonal() * (complement.diagonal() > 0), moments.xx.dtype)


def _scaled(
    moments: Moments,
    rule: Method,
    x: Factor | None,
    v: Factor | None,
    u: Tensor,
    values: Tensor,
    w: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fan-in (K, p) and fan-out (r·offsets, K) from singular vectors u, w of the whitened target."""
    if rule.starts_at_zero == "fan_in":
        start = 0.0 if moments.smooth else _GRADMAX_START * (moments.fan_in_norm or 1.0)
        return start * u.mT, w * (moments.fan_out_norm or 1.0)
    assert x is not None
    if v is not None:
        by_row = w.reshape(v.width, moments.offsets * w.shape[1])
        w = v.unwhiten(by_row).reshape(moments.xv.shape[1], w.shape[1])
    if w.numel():  # singular vectors have no sign of their own: the largest entry of the fan-out is positive
        sign = w.gather(0, w.abs().argmax(0, keepdim=True)).sign()
        u, w = u * sign, w * sign
    root = values.sqrt()
    return (x.unwhiten(u) * root).mT, w * root


def _random(moments: Moments, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fan-in from the layers' own initialisation (uniform up to 1/√fan-in), fan-out zero."""
    p = moments.xx.shape[0]
    bound = max(p - moments.x_bias, 1) ** -0.5
    like = moments.xx.new_empty(0, dtype=torch.float64)
    alpha = like.new_empty(count, p).uniform_(-bound, bound)
    return alpha, like.new_zeros(moments.xv.shape[1], count), like.new_zeros(count)
