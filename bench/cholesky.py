"""The solve of a growth step in PyTorch, by Cholesky and the smaller Gram side."""

from collections.abc import Callable

import torch
from torch import Tensor


def factor(moment: Tensor) -> Tensor:
    """Of Cholesky; a little is added to the diagonal where a feature depends on others, as behind a layer norm."""
    sizes = moment.diagonal()
    lower, info = torch.linalg.cholesky_ex(moment)
    if info or (lower.diagonal().square() <= 1e-6 * sizes).any():
        return torch.linalg.cholesky(moment + 3e-7 * sizes.clamp_min(1e-6 * sizes.mean()).diag())
    return lower


def best_update(hh: Tensor, hv: Tensor) -> Tensor:
    """dW* = (hh⁺ hv)ᵀ."""
    return torch.cholesky_solve(hv, factor(hh)).mT


def by_eigh(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    w, q = torch.linalg.eigh(gram)
    return w[-count:], q[:, -count:]


def by_iteration(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Subspace iteration, where residuals of a 10,000th come soon; of spectra that hardly fall `eigh` is the faster."""
    if len(gram) > 16 * count:
        x = torch.randn(len(gram), 4 * count, dtype=gram.dtype, device=gram.device)
        scaled = gram / gram.diagonal().mean()
        for _ in range(8):
            x = torch.linalg.qr(scaled @ (scaled @ (scaled @ x)))[0]
            image = gram @ x
            w, q = by_eigh(x.mT @ image, count)
            if ((image @ q - (x @ q) * w).norm(dim=0) < 1e-4 * w).all():
                return w, x @ q
    return by_eigh(gram, count)


def best_neurons(
    lower: Tensor, target: Tensor, neurons: int, top: Callable[[Tensor, int], tuple[Tensor, Tensor]] = by_eigh
) -> tuple[Tensor, Tensor]:
    """Fan-in (K, p) and fan-out (r, K), by the eigenproblem of the smaller Gram side, from a factor of xx and N."""
    t = torch.linalg.solve_triangular(lower, target, upper=False)
    if t.shape[0] < t.shape[1]:
        w, u = top(t @ t.mT, neurons)
        s = w.sqrt()
        v = t.mT @ u / s
    else:
        w, v = top(t.mT @ t, neurons)
        s = w.sqrt()
        u = t @ v / s
    alpha = torch.linalg.solve_triangular(lower.mT, u, upper=True) * s.sqrt()
    return alpha.mT, v * s.sqrt()
