"""LOOK at where a network is held back, without changing it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from growkern.moments import collect
from growkern.neurons import solve
from growkern.passes import Passes, reachable_sites
from growkern.probe import LossFn
from growkern.sites import GrowthSite, resolve


@dataclass(frozen=True)
class Bottlenecks:
    """A table of where a network is held back.

    Attributes
    ----------
    rows : list of dict
        For each site: `site`, `units`, `bottleneck` Ψ, its `share` of E‖v‖², `reachable` (what the existing
        weights can still do), and for new `neurons` above chance what is `removed` and their `gain`.
    """

    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        cells = [list(self.rows[0])] if self.rows else []
        cells += [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in cells
        )
        return "\n".join(lines)


def bottlenecks(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss_fn: LossFn,
    *,
    sites: Sequence[GrowthSite] | None = None,
    reduction: str = "mean",
    batch_dim: int = 0,
) -> Bottlenecks:
    """Measure where a network is held back, without changing it.

    Parameters
    ----------
    model, batches, loss_fn
        As in `collect`.
    sites : sequence of GrowthSite, optional
        Where to look; by default everywhere.
    reduction, batch_dim
        As in `collect`.

    Returns
    -------
    Bottlenecks
        ``print`` it, or read its `rows`; the largest bottleneck first.

    Raises
    ------
    ValueError
        As `collect` does, or if the model has no site that can grow; the message says why.
    RuntimeError
        As `find_sites` does.
    """
    passes = Passes(model, batches, loss_fn, reduction, batch_dim=batch_dim)
    rows = []
    places = reachable_sites(passes, "full") if sites is None else sites
    moments = collect(model, places, passes.batches, loss_fn, reduction=reduction, batch_dim=batch_dim)
    for name, new in solve(moments).items():
        share = new.bottleneck / (new.bottleneck + new.reachable or 1.0)
        row = {
            "site": name,
            "units": resolve(model, new.site).units,
            "bottleneck": new.bottleneck,
            "share": share,
        }
        rows.append(row | {"reachable": new.reachable, "neurons": len(new), "removed": new.removed, "gain": new.gain})
    return Bottlenecks(sorted(rows, key=lambda row: -row["bottleneck"]))
