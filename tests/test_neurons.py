"""The mathematics of `solve`: every identity that TINY promises, in float64, and its arguments."""

import dataclasses
import itertools

import pytest
import torch
from regressions import conv_net, images, least_squares, measure, mlp, regression, samples, squared
from torch import nn

import growkern as gk
from growkern import ops, whitening
from growkern.spectra import largest_eigenvalue
from growkern.whitening import Factor, Whitened


@pytest.fixture
def problem():
    torch.manual_seed(1)
    model, (x, y) = mlp(), regression()
    return model, x, y, measure(model, x, y)


def test_moments_are_the_means_of_the_samples(problem):
    model, x, y, m = problem
    a, h, v = samples(model, x, y)
    for name, left, right in (
        ("xx", a, a),
        ("xh", a, h),
        ("xv", a, v),
        ("hh", h, h),
        ("hv", h, v),
        ("vv", v, v),
    ):
        torch.testing.assert_close(getattr(m, name), left.mT @ right / len(x), rtol=1e-12, atol=1e-14)


def test_target_is_orthogonal_to_h(problem):
    model, x, y, m = problem
    a, h, v = samples(model, x, y)
    new = gk.solve(m, neurons=2)
    residual = v - h @ new.best_update.mT
    assert (h.mT @ residual).abs().max() < 1e-10
    torch.testing.assert_close(m.xr, a.mT @ residual / len(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_neurons_remove_sum_of_squares_of_the_brute_force_bottleneck(problem, count):
    model, x, y, m = problem
    a, h, v = samples(model, x, y)
    residual = least_squares(h, v)
    bottleneck = residual.square().sum(1).mean()
    new = gk.solve(m, neurons=count)
    assert new.bottleneck == pytest.approx(bottleneck.item(), rel=1e-10)
    left = (residual - a @ (new.omega @ new.alpha).mT).square().sum(1).mean()
    removed = new.singular_values.square().sum().item()
    assert (bottleneck - left).item() == pytest.approx(removed, rel=1e-9)
    assert new.removed == pytest.approx(removed, rel=1e-9)
    # No rank-K map does better: reduced-rank regression of the residual on x.
    s = torch.linalg.svdvals(torch.linalg.qr(a)[0].mT @ residual / len(x) ** 0.5)
    assert removed == pytest.approx(s[:count].square().sum().item(), rel=1e-9)


def test_cholesky_and_eigh_whitening_agree(problem, monkeypatch):
    *_, m = problem
    by_cholesky = gk.solve(m, neurons=3)
    assert Factor(m.xx)._lower is not None
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a, out: out[1].fill_(1))
    assert Factor(m.xx)._lower is None
    by_eigh = gk.solve(m, neurons=3)
    for name in ("alpha", "omega", "singular_values", "best_update"):
        torch.testing.assert_close(getattr(by_eigh, name), getattr(by_cholesky, name), rtol=1e-9, atol=1e-11)


def test_a_realizable_target_has_no_bottleneck():
    torch.manual_seed(0)
    model, (x, _) = mlp(), regression()
    with torch.no_grad():
        h = model[1](model[0](x))
        y = h @ torch.randn(5, 4, dtype=torch.float64) + torch.randn(4, dtype=torch.float64)
    m = measure(model, x, y)
    for neurons in ("auto", 3):
        new = gk.solve(m, neurons=neurons)
        assert new.bottleneck < 1e-12 * new.reachable
        assert len(new) == 0
        assert new.removed == 0


def test_zero_gradient_gives_zero_neurons():
    torch.manual_seed(0)
    model, (x, _) = mlp(), regression()
    m = measure(model, x, model(x).detach())
    for method in ("tiny", "joint", "gradmax", "fisher"):
        for neurons in ("auto", 2):
            new = gk.solve(m, method=method, neurons=neurons)
            assert len(new) == 0
            assert new.bottleneck == new.gain == 0


@pytest.mark.parametrize("method", ["tiny", "joint", "fisher"])
def test_fewer_samples_than_features(method):
    torch.manual_seed(0)
    model, (x, y) = mlp(p=40, q=3), regression(n=20, p=40)
    new = gk.solve(measure(model, x, y), method=method, neurons=4)
    a, h, v = samples(model, x, y)
    assert new.rank <= 20
    assert new.alpha.isfinite().all()
    assert new.omega.isfinite().all()
    if method != "fisher":  # with 20 samples and 41 features, x can fit whatever h leaves
        left = least_squares(h, v - a @ (new.omega @ new.alpha).mT).square().sum(1).mean()
        assert left.item() < 1e-9 * new.bottleneck


def test_rank_deficient_moments_use_their_range_only():
    torch.manual_seed(0)
    x, y = regression(p=6)
    x[:, 4] = x[:, 0] + x[:, 1]
    x[:, 5] = 0
    model = mlp()
    m = measure(model, x, y)
    new = gk.solve(m, neurons=2)
    assert new.rank == 5  # four free features and the ones
    assert torch.equal(new.alpha[:, 5], torch.zeros(2, dtype=torch.float64))
    smaller = dataclasses.replace(
        m,
        **{k: getattr(m, k)[[0, 1, 2, 3, 6]] for k in ("xv", "xh", "xr")},
        xx=m.xx[[0, 1, 2, 3, 6]][:, [0, 1, 2, 3, 6]],
        null=None,
    )
    torch.testing.assert_close(new.singular_values, gk.solve(smaller, neurons=2).singular_values, rtol=1e-8, atol=0)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("method", ["tiny", "joint"])
def test_units_of_the_data_do_not_matter_in_float32(factor, method):
    torch.manual_seed(0)
    x, y = regression(n=500)
    model = mlp().float()
    x, y = x.float(), y.float()
    scaled = mlp().float()
    scaled.load_state_dict(model.state_dict())
    with torch.no_grad():
        scaled[0].weight /= factor
    plain = gk.solve(measure(model, x, y), method=method, neurons=4)
    other = gk.solve(measure(scaled, x * factor, y), method=method, neurons=4)
    assert other.rank == plain.rank
    torch.testing.assert_close(other.singular_values, plain.singular_values, rtol=1e-4, atol=0)
    assert other.removed == pytest.approx(plain.removed, rel=1e-4)
    assert other.gain == pytest.approx(plain.gain, rel=1e-3)
    same = torch.einsum("rk,kp->rp", other.omega, other.alpha[:, :-1]) * factor
    torch.testing.assert_close(same, plain.omega @ plain.alpha[:, :-1], rtol=1e-3, atol=1e-3 * same.abs().max().item())


def test_rescaling_a_hidden_layer_changes_nothing_in_what_is_found():
    torch.manual_seed(0)
    model, (x, y) = mlp(act=nn.ReLU), regression()
    rescaled = mlp(act=nn.ReLU)
    rescaled.load_state_dict(model.state_dict())
    with torch.no_grad():
        size = torch.tensor([0.01, 0.5, 1.0, 7.0, 300.0], dtype=torch.float64)
        rescaled[0].weight *= size[:, None]
        rescaled[0].bias *= size
        rescaled[2].weight /= size
    for method in ("tiny", "joint", "fisher"):
        a = gk.solve(measure(model, x, y), method=method, neurons=3)
        b = gk.solve(measure(rescaled, x, y), method=method, neurons=3)
        for name in ("alpha", "omega", "singular_values"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-7, atol=1e-10)
        assert a.bottleneck == pytest.approx(b.bottleneck, rel=1e-10)


@pytest.mark.parametrize("rank", [100, 400])
def test_wide_moments_of_few_samples_have_the_factor_of_all_their_eigenvectors(rank):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rank, 600, generator=g, dtype=torch.float64) * torch.logspace(0, -2, rank)[:, None]
    target = torch.randn(rank, 3, generator=g, dtype=torch.float64)
    found = Factor(x.mT @ x)
    assert found._lower is None
    assert found.rank == rank
    # As many features as that fit any target of the samples exactly.
    assert (x @ found.solve(x.mT @ target) - target).norm() < 1e-9 * target.norm()


@pytest.mark.parametrize(("rows", "columns"), [(560, 700), (700, 560)])
@pytest.mark.parametrize(("most", "above"), [(3, None), (5, None), (560, 1.5), (560, 9.0), (560, 0.5)])
def test_few_singular_values_of_wide_matrices_are_those_of_all(rows, columns, most, above):
    """Where few are wanted they come by Lanczos' method; in the bulk of noise, and below 1.5 here, from all of them."""
    g = torch.Generator().manual_seed(0)
    t = torch.randn(rows, columns, generator=g, dtype=torch.float64) / 60  # the bulk ends at 0.84
    t[:4, :4] += torch.diag(torch.tensor([8.0, 6.0, 6.0, 4.0]))
    whitened = Whitened(t[None])
    values, vectors = whitened.singular(most, None if above is None else torch.tensor([above]))
    few = (most, above) in ((3, None), (560, 1.5), (560, 9.0))
    assert (values.shape[1] < 560) == few
    u, s, vh = torch.linalg.svd(t, full_matrices=False)
    wanted = {(3, None): 3, (5, None): 5, (560, 1.5): 4, (560, 9.0): 0, (560, 0.5): 300}[most, above]
    assert ((values[0, :wanted] - s[:wanted]).abs() <= 1e-12 * s[0]).all()
    left, right = whitened.both_sides(values[:, :wanted], vectors[..., :wanted])
    assert (left[0] * s[:wanted] @ right[0].mT - u[:, :wanted] * s[:wanted] @ vh[:wanted]).norm() < 1e-9


def test_least_squares_of_many_sites_are_those_of_each(monkeypatch):
    """Of one size or several, with and without full rank; and a site whose moment defeats the eigensolver is named."""
    g = torch.Generator().manual_seed(0)
    sizes = {"a": (20, 5, 3), "b": (20, 6, 2), "c": (9, 300, 4), "d": (4, 6, 3), "e": (40, 6, 3)}
    pairs, expected = {}, {}
    for name, (rows, n, m) in sizes.items():
        x, y = (torch.randn(rows, k, generator=g, dtype=torch.float64) for k in (n, m))
        pairs[name] = x.mT @ x, x.mT @ y
        expected[name] = x, x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    found = whitening.least_squares(pairs)
    assert found.keys() == sizes.keys()
    for name, (x, fitted) in expected.items():
        torch.testing.assert_close(x @ found[name], fitted, rtol=1e-7, atol=1e-8)
    assert whitening.least_squares({}) == {}

    def diverging(a, cut):
        return a.new_full(a.shape[:-1], torch.nan), a.new_full(a.shape, torch.nan)

    monkeypatch.setattr(whitening, "dominant", diverging)
    with pytest.raises(ValueError, match="did not converge on a second moment of site 'd'"):
        whitening.least_squares({name: pairs[name] for name in ("a", "d")})


@pytest.mark.parametrize("by_eigenvectors", [False, True])
@pytest.mark.parametrize("lead", [(), (1,), (2,)])
def test_whitened_targets_are_applied_as_they_are(lead, by_eigenvectors):
    """T b and Tᵀ u without T are those with it, and T is L⁻¹ N M⁻ᵀ on the rows of every offset."""
    g = torch.Generator().manual_seed(0)
    offsets, p, r = 3, 7, 5

    def moment(n: int) -> torch.Tensor:
        a = torch.randn(*lead, n, n - by_eigenvectors, generator=g, dtype=torch.float64)
        return a @ a.mT + (0 if by_eigenvectors else torch.eye(n, dtype=torch.float64))

    x, v = (Factor(moment(n), by_eigenvectors=by_eigenvectors) for n in (p, r))
    target = torch.randn(*lead, p, r * offsets, generator=g, dtype=torch.float64)
    t = Whitened(target, x, v, offsets)
    b, u = (torch.randn(*lead, n, 2, generator=g, dtype=torch.float64) for n in (t.shape[-1], t.shape[-2]))
    apart = t.times(b), t.back(u)
    assert t.matrix.shape == t.shape
    parts = [v.whiten(x.whiten(target[..., k::offsets]).mT).mT for k in range(offsets)]
    torch.testing.assert_close(t.matrix, torch.stack(parts, -1).flatten(-2))
    for found, expected in zip((*apart, t.times(b), t.back(u)), (t.matrix @ b, t.matrix.mT @ u) * 2, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("most", "above"), [(8, None), (560, 1.2)])
def test_singular_values_of_wide_matrices_take_no_decomposition_where_they_stand_out(monkeypatch, most, above):
    """More directions than the first steps hold, and a bulk that is not far: nothing of full size is decomposed."""
    g = torch.Generator().manual_seed(0)
    t = torch.randn(560, 576, generator=g, dtype=torch.float64) / 50  # the bulk ends at 0.95
    t[:20, :20] += torch.diag(torch.linspace(8, 5, 20, dtype=torch.float64))
    expected, sizes, eigh = torch.linalg.svdvals(t), [], ops.eigh
    monkeypatch.setattr(ops, "eigh", lambda a: (sizes.append(a.shape[-1]), eigh(a))[1])
    values, _ = Whitened(t[None]).singular(most, None if above is None else torch.tensor([above]))
    wanted = 8 if above is None else 20
    torch.testing.assert_close(values[0, :wanted], expected[:wanted], rtol=1e-12, atol=0)
    assert max(sizes) < 560 // 2


@pytest.mark.parametrize(("copies", "bulk"), [(20, 0.0), (40, 0.1)])
def test_equal_singular_values_beyond_a_block_are_all_found(copies, bulk):
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 560, generator=g, dtype=torch.float64))[0] for n in (560, 600))
    s = bulk * 0.99 ** torch.arange(560, dtype=torch.float64)
    s[:copies] = 1
    values, _ = Whitened((u * s @ v.mT)[None]).singular(200, torch.tensor([0.5]))
    assert (values[0] > 0.5).sum() == copies


def test_largest_eigenvalues_settle_where_spectra_decay():
    g = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(4, 300, 300, generator=g, dtype=torch.float64))[0]
    spectra = torch.linspace(1, 3, 4, dtype=torch.float64)[:, None] * 0.8 ** torch.arange(300, dtype=torch.float64)
    operators, calls = vectors * spectra[:, None] @ vectors.mT, []

    def apply(b):
        calls.append(b)
        return torch.einsum("dmn,nd->md", operators, b)

    found = largest_eigenvalue(apply, torch.randn(300, 4, generator=g, dtype=torch.float64), 30, settle=True)
    torch.testing.assert_close(found, spectra[:, 0], rtol=1e-10, atol=0)
    assert len(calls) < 15


@pytest.mark.parametrize(("p", "r", "rank"), [(48, 12, 12), (600, 520, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_of_ill_conditioned_moments(dtype, p, r, rank):
    """x with a condition of 1e3, whose moment has 1e6: what float32 sums lose is their rounding, not more."""
    g = torch.Generator().manual_seed(0)
    n, q = 4000, 20
    mix = torch.linalg.qr(torch.randn(p, p, generator=g, dtype=torch.float64))[0]
    x = torch.randn(n, p, generator=g, dtype=torch.float64) * torch.logspace(0, -3, p, dtype=torch.float64) @ mix
    h, noise = (torch.randn(n, k, generator=g, dtype=torch.float64) for k in (q, r))
    ways = torch.randn(p, rank, generator=g, dtype=torch.float64), torch.eye(rank, r, dtype=torch.float64)
    v = 3 * x / x.std(0) @ ways[0] @ ways[1] / p**0.5 + noise
    a, b, c = (t.to(dtype) for t in (x, h, v))
    means = (each / n for each in ops.linear_moments(a, b, c))
    named = dict(zip(("xx", "xh", "xv", "hh", "hv", "vv"), means, strict=True))
    moments = dataclasses.replace(measure(mlp(p=p), *regression(p=p)), xr=None, null=None, update=None, **named)
    exact = torch.linalg.svdvals(torch.linalg.qr(x)[0].mT @ least_squares(h, v)) / n**0.5
    values = gk.solve(moments, neurons=rank).singular_values
    assert ((values - exact[:rank]).abs() / exact[:rank]).max() < (1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize(("rows", "power"), [(2000, 0), (2000, 3), (64, 0)])
def test_condition_is_estimated_in_any_units(rows, power):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 60, generator=g, dtype=torch.float64) * torch.logspace(0, -power, 60, dtype=torch.float64)
    x = x @ torch.linalg.qr(torch.randn(60, 60, generator=g, dtype=torch.float64))[0]
    seen = torch.cat([x[:, :7], x[:, 8:]], 1)
    seen = seen / seen.norm(dim=0)
    w = torch.linalg.eigvalsh(seen.mT @ seen)
    x = x * torch.logspace(-12, 12, 60, dtype=torch.float64)
    x[:, 7] = 0
    found = Factor(x.mT @ x)
    assert found._lower is not None
    assert found.rank == 59
    assert 0.7 < found.condition * w[0] / w[-1] < 1 + 1e-9


@pytest.mark.parametrize("method", ["tiny", "joint", "gradmax", "fisher", "random"])
def test_solve_of_a_dict_is_solve_of_each(method):
    """Sites of several sizes, padded and solved at once, one of them rank-deficient: the numbers of each alone."""
    torch.manual_seed(0)
    widths = (11, 9, 10, 9, 12, 9, 4)
    layers = [nn.Linear(a, b, bias=b != 10) for a, b in itertools.pairwise(widths)]
    acts = [nn.Tanh(), nn.Identity(), nn.Tanh(), nn.ReLU(), nn.Tanh()]
    model = nn.Sequential(*(each for pair in zip(layers, acts, strict=False) for each in pair), layers[-1]).double()
    x, y = regression(p=11)
    moments = gk.collect(model, gk.find_sites(model, x), [(x, y)], squared)
    neurons = 2 if method == "random" else "auto"
    torch.manual_seed(0)
    found = gk.solve(moments, method=method, neurons=neurons)
    assert list(found) == list(moments)
    assert len(found) == 5
    torch.manual_seed(0)
    for name, each in moments.items():
        new, alone = found[name], gk.solve(each, method=method, neurons=neurons)
        for field in dataclasses.fields(new):
            one, other = getattr(new, field.name), getattr(alone, field.name)
            if isinstance(other, torch.Tensor):
                assert (one - other).norm() <= 1e-11 * other.norm(), (name, field.name)
            elif isinstance(other, float):  # with Cholesky the condition is an estimate
                assert one == pytest.approx(other, rel=0.1 if field.name == "condition" else 1e-10), field.name
            else:
                assert one == other, field.name


def test_cut_counts_what_does_not_stand_above_noise(problem):
    *_, m = problem
    everything, auto = gk.solve(m, neurons=4), gk.solve(m)
    assert auto.cut == (everything.singular_values <= auto.noise).sum()
    assert auto.cut + len(auto) == len(everything)
    assert everything.cut == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "best"}, "method: expected one of tiny, joint, gradmax, fisher, random, got 'best'"),
        ({"neurons": -1}, "neurons: expected 'auto' or an integer"),
        ({"neurons": "many"}, "neurons: expected 'auto' or an integer"),
        ({"neurons": True}, "neurons: expected 'auto' or an integer"),
        ({"neurons": 3, "paired": True}, "multiples of 2"),
        ({"max_neurons": 1.5}, "max_neurons: expected None or an integer"),
        ({"method": "random"}, "'random' has no directions"),
    ],
)
def test_arguments_of_solve_are_checked(problem, options, words):
    with pytest.raises(ValueError, match=words):
        gk.solve(problem[3], **options)


def test_solve_names_the_site_of_bad_moments(problem):
    m = problem[3]
    bad = dataclasses.replace(m, hv=m.hv.clone().fill_(float("nan")))
    with pytest.raises(ValueError, match="hv of site '0' is not finite"):
        gk.solve({"0": bad})
    with pytest.raises(ValueError, match="'auto' needs draws"):
        gk.solve(dataclasses.replace(m, null=None))
    x, y = images()
    model = conv_net()
    model(x)
    full = measure(model, x, y, gk.find_sites(model, x)[0])
    with pytest.raises(ValueError, match=r"'joint' needs .* kernel='center'"):
        gk.solve(full, method="joint")
