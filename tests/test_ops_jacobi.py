"""Eigenproblems and singular value decompositions: every backend against float64 and against their definition."""

import math

import pytest
import torch
from cases import MatrixCase, cases, device_of
from torch import Tensor

from growkern import ops
from growkern.backend import INTERPRETED, available, use_backend

# Largest error relative to the norm of the matrix, per unit of √n.
TOLERANCES = {torch.float64: 2e-15, torch.float32: 1e-6}

LARGEST_INTERPRETED = 900  # entries: the interpreter of Triton takes two seconds for a matrix of 33²

pytestmark = pytest.mark.usefixtures("one_thread", "poison")


def runs(op: str) -> list[tuple[MatrixCase, torch.dtype, str]]:
    slow = ("triton",) if INTERPRETED else ()
    return [
        (case, dtype, backend)
        for case in cases(op)
        for dtype in case.dtypes
        for backend in available(op)
        if backend not in slow or math.prod(case.shape) <= LARGEST_INTERPRETED
    ]


EIGH, SVD = runs("eigh"), runs("svd")
RANDOM = next(case for case in cases("eigh") if case.name == "33")


def spread(a: Tensor, expected: Tensor) -> float:
    """Largest Frobenius distance of any matrix of the batch, per unit of √n."""
    if not a.numel():
        return 0.0
    return (a - expected).norm(dim=(-2, -1)).max().item() / max(a.shape[-2:]) ** 0.5


def identity_like(gram: Tensor) -> Tensor:
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)


def assert_decomposes(a: Tensor, w: Tensor, q: Tensor, tolerance: float):
    """a q = q diag(w), qᵀq = 1 and ascending w: nothing else is an eigendecomposition."""
    a, w, q = a.double(), w.double(), q.double()
    scale = a.norm(dim=(-2, -1)).clamp_min(1e-300)[..., None, None] if a.numel() else 1.0
    assert spread(q * w[..., None, :] @ q.mT / scale, a / scale) <= tolerance
    assert spread(q.mT @ q, identity_like(q)) <= 5 * tolerance
    assert (w.diff(dim=-1) >= 0).all()


def assert_factors(a: Tensor, u: Tensor, s: Tensor, vh: Tensor, tolerance: float):
    """a = u diag(s) vh, orthonormal u and vh, and descending s ≥ 0."""
    a, u, s, vh = a.double(), u.double(), s.double(), vh.double()
    scale = a.norm(dim=(-2, -1)).clamp_min(1e-300)[..., None, None] if a.numel() else 1.0
    assert spread(u * s[..., None, :] @ vh / scale, a / scale) <= tolerance
    assert spread(u.mT @ u, identity_like(u.mT @ u)) <= 5 * tolerance
    assert spread(vh @ vh.mT, identity_like(vh @ vh.mT)) <= 5 * tolerance
    assert (s.diff(dim=-1) <= 0).all()
    assert (s >= 0).all()


def assert_same_values(values: Tensor, expected: Tensor, a: Tensor, tolerance: float):
    """Values agree to a backward-stable error, which is relative to the norm of the whole matrix."""
    assert values.shape == expected.shape
    if values.numel():
        norms = a.double().norm(dim=(-2, -1)).clamp_min(1e-300)[..., None]
        assert ((values.double() - expected).abs() / norms).max() <= tolerance


@pytest.mark.parametrize(("case", "dtype", "backend"), EIGH, ids=str)
def test_eigh(case: MatrixCase, dtype, backend):
    (a,), _ = case.arguments(dtype, device=device_of(backend))
    with use_backend(backend):
        w, q = ops.eigh(a)
    assert w.dtype == q.dtype == dtype
    assert (w.shape, q.shape) == (a.shape[:-1], a.shape)
    assert_decomposes(a, w, q, TOLERANCES[dtype])
    assert_same_values(w, torch.linalg.eigvalsh(a.double()), a, TOLERANCES[dtype])


@pytest.mark.parametrize(("case", "dtype", "backend"), SVD, ids=str)
def test_svd(case: MatrixCase, dtype, backend):
    (a,), _ = case.arguments(dtype, device=device_of(backend))
    *batch, m, n = a.shape
    k = min(m, n)
    with use_backend(backend):
        u, s, vh = ops.svd(a)
    assert u.dtype == s.dtype == vh.dtype == dtype
    assert (u.shape, s.shape, vh.shape) == ((*batch, m, k), (*batch, k), (*batch, k, n))
    assert_factors(a, u, s, vh, TOLERANCES[dtype])
    assert_same_values(s, torch.linalg.svdvals(a.double()), a, TOLERANCES[dtype])


@pytest.mark.parametrize("backend", available("eigh"))
def test_eigh_of_known_matrices(backend):
    with use_backend(backend), torch.device(device_of(backend)):
        w, q = (part.cpu() for part in ops.eigh(torch.tensor([[2.0, 1.0], [1.0, 2.0]])))
        indefinite = ops.eigh(torch.diag(torch.tensor([3.0, -5.0, 0.0, 1.0])))[0].cpu()
    assert torch.allclose(w, torch.tensor([1.0, 3.0]))
    assert torch.allclose(q.abs(), torch.full((2, 2), 0.5**0.5))
    assert torch.allclose(indefinite, torch.tensor([-5.0, 0.0, 1.0, 3.0]), atol=1e-6)


@pytest.mark.parametrize("backend", available("svd"))
def test_svd_of_known_matrices(backend):
    with use_backend(backend), torch.device(device_of(backend)):
        u, s, vh = (part.cpu() for part in ops.svd(torch.tensor([[0.0, -4.0, 0.0], [3.0, 0.0, 0.0]])))
    assert torch.allclose(s, torch.tensor([4.0, 3.0]))
    assert torch.allclose(u.abs(), torch.eye(2), atol=1e-6)
    assert torch.allclose(vh.abs(), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), atol=1e-6)


@pytest.mark.parametrize("backend", available("eigh"))
def test_badly_scaled_matrices_of_one_batch_do_not_disturb_each_other(backend):
    (a,), _ = RANDOM.arguments(torch.float64, device=device_of(backend))
    scaled = a[:3] * torch.tensor([1e-15, 1.0, 1e15], dtype=torch.float64, device=a.device)[:, None, None]
    with use_backend(backend):
        w, q = ops.eigh(scaled)
    for one, values, vectors in zip(scaled, w, q, strict=True):
        assert_decomposes(one, values, vectors, TOLERANCES[torch.float64])


@pytest.mark.parametrize("backend", available("eigh"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", ["random", "gram"])
def test_eigh_errs_at_most_twice_as_much_as_lapack(values, dtype, backend):
    (a,), _ = MatrixCase(op="eigh", name="12", shape=(4, 12, 12), values=values).arguments(dtype)
    a = a.to(device_of(backend))

    def errors(w: Tensor, q: Tensor) -> Tensor:
        """Largest ‖aq − qw‖/‖a‖ and ‖qᵀq − 1‖ of the batch."""
        w, q = w.double(), q.double()
        residual = (a.double() @ q - q * w[:, None]).norm(dim=(1, 2)) / a.double().norm(dim=(1, 2))
        return torch.stack([residual.max(), (q.mT @ q - identity_like(q)).norm(dim=(1, 2)).max()])

    with use_backend(backend):
        assert (errors(*ops.eigh(a)) <= 2 * errors(*torch.linalg.eigh(a))).all()


@pytest.mark.skipif("triton" not in available("svd"), reason="LAPACK's small singular values are not as accurate")
def test_small_singular_values_are_as_accurate_as_large_ones():
    (a,), _ = MatrixCase(op="svd", name="graded", shape=(20, 12)).arguments(torch.float32)
    a = (a * torch.logspace(0, -9, 12)).to(device_of("triton"))
    expected = torch.linalg.svdvals(a.double())  # absolutely accurate to 1e-16
    with use_backend("triton"):
        values = ops.svd(a)[1].double()
    assert ((values - expected).abs() / expected).max() < 1e-5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("op", "backend"), [(op, b) for op in ("eigh", "svd") for b in available(op)])
def test_a_matrix_that_is_not_finite_comes_back_nan_alone(op, backend, bad):
    a = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    a = a + a.mT
    spoiled = a.clone()
    spoiled[0, 1, 4, 2] = spoiled[0, 1, 2, 4] = bad
    spoiled[1, 0, 0, 0] = bad
    with use_backend(backend):
        expected, out = (getattr(ops, op)(matrices.to(device_of(backend))) for matrices in (a, spoiled))
    for part, full in zip(out, expected, strict=True):
        for index in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
            if index in ([0, 1], [1, 0]):
                assert part[tuple(index)].isnan().all()
            else:
                assert torch.allclose(part[tuple(index)], full[tuple(index)], atol=1e-5)


@pytest.mark.parametrize("op", ["eigh", "svd"])
def test_a_matrix_that_does_not_converge_comes_back_nan_alone(op, monkeypatch):
    """LAPACK fails on next to nothing that is finite, so a batch that holds a marked matrix is made to fail."""
    solve = getattr(torch.linalg, op)

    def fail_on_marked(a: Tensor, **options: bool):
        if (a == 77.0).any():
            raise torch.linalg.LinAlgError("failed to converge")
        return solve(a, **options)

    monkeypatch.setattr(torch.linalg, op, fail_on_marked)
    a = torch.stack([torch.eye(4), torch.full((4, 4), 77.0), 2 * torch.eye(4), torch.full((4, 4), torch.nan)])
    with use_backend("reference"):
        out = getattr(ops, op)(a.view(2, 2, 4, 4))
    values = out[0 if op == "eigh" else 1].flatten(0, 1)
    assert torch.equal(values[0], torch.ones(4))
    assert torch.equal(values[2], torch.full((4,), 2.0))
    for part in out:
        assert part.flatten(0, 1)[[1, 3]].isnan().all()
        assert part.flatten(0, 1)[[0, 2]].isfinite().all()


def test_inputs_that_require_gradients_give_results_without():
    a = torch.eye(3).requires_grad_()
    assert not any(part.requires_grad for part in (*ops.eigh(a), *ops.svd(a)))


def test_autocast_changes_nothing():
    (a,), _ = RANDOM.arguments(torch.float32)
    expected = ops.eigh(a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.eigh(a)
    assert all(torch.equal(one, other) for one, other in zip(out, expected, strict=True))


@pytest.mark.parametrize(
    ("op", "a", "error_type", "message"),
    [
        (
            "eigh",
            torch.zeros(3, 3, dtype=torch.float16),
            TypeError,
            "a: expected float32 or float64, got torch.float16",
        ),
        ("svd", torch.zeros(3, 3, dtype=torch.int64), TypeError, "a: expected float32 or float64, got torch.int64"),
        ("eigh", torch.zeros(2, 3, 4), ValueError, r"a: expected a \(\.\.\., n, n\) tensor, got \(2, 3, 4\)"),
        ("eigh", torch.zeros(3), ValueError, r"a: expected a \(\.\.\., n, n\) tensor, got \(3,\)"),
        ("svd", torch.zeros(3), ValueError, r"a: expected a \(\.\.\., m, n\) tensor, got \(3,\)"),
    ],
)
def test_refusals(op, a, error_type, message):
    with pytest.raises(error_type, match=message):
        getattr(ops, op)(a)
