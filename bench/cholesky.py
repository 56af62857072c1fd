"""The solve of a growth step in PyTorch, by Cholesky and the smaller Gram side."""

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


def best_neurons(lower: Tensor, target: Tensor, neurons: int) -> tuple[Tensor, Tensor]:
    """Fan-in (K, p) and fan-out (r, K), by the eigenproblem of the smaller Gram side, from a factor of xx and N."""
    t = torch.linalg.solve_triangular(lower, target, upper=False)
    if t.shape[0] < t.shape[1]:
        w, u = torch.linalg.eigh(t @ t.mT)
        s, u = w[-neurons:].sqrt(), u[:, -neurons:]
        v = t.mT @ u / s
    else:
        w, v = torch.linalg.eigh(t.mT @ t)
        s, v = w[-neurons:].sqrt(), v[:, -neurons:]
        u = t @ v / s
    alpha = torch.linalg.solve_triangular(lower.mT, u, upper=True) * s.sqrt()
    return alpha.mT, v * s.sqrt()
