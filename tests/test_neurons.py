"""The mathematics of `solve`: every identity that TINY and its relatives promise, in float64."""

import dataclasses

import pytest
import torch
from torch import nn

import growkern as gk
from growkern.whitening import Factor

torch.set_default_dtype(torch.float32)


def mlp(p=6, q=5, r=4, act=nn.Tanh, bias=True):
    layers = [nn.Linear(p, q, bias=bias), act(), nn.Linear(q, r, bias=bias)]
    return nn.Sequential(*layers).double()


def regression(n=200, p=6, r=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=g, dtype=torch.float64)
    mix = torch.randn(p, r, generator=g, dtype=torch.float64)
    return x, torch.sin(2 * x @ mix) + 0.3 * torch.randn(n, r, generator=g, dtype=torch.float64)


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
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: (a, torch.ones((), dtype=torch.int32)))
    assert Factor(m.xx)._lower is None
    by_eigh = gk.solve(m, neurons=3)
    for name in ("alpha", "omega", "singular_values", "best_update"):
        torch.testing.assert_close(getattr(by_eigh, name), getattr(by_cholesky, name), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
def test_joint_is_never_worse_and_optimal(bias):
    torch.manual_seed(2)
    model, (x, y) = mlp(bias=bias), regression(seed=3)
    m = measure(model, x, y)
    a, h, v = samples(model, x, y)
    for count in (1, 2, 3):
        tiny, joint = gk.solve(m, neurons=count), gk.solve(m, method="joint", neurons=count)

        def after_refit(new):
            return least_squares(h, v - a @ (new.omega @ new.alpha).mT).square().sum(1).mean().item()

        assert after_refit(joint) <= after_refit(tiny) * (1 + 1e-12)
        assert joint.bottleneck - joint.removed == pytest.approx(after_refit(joint), rel=1e-9)
        refit = v - a @ (joint.omega @ joint.alpha).mT - h @ joint.best_update.mT
        assert refit.square().sum(1).mean().item() == pytest.approx(after_refit(joint), rel=1e-9)
    # Brute force at K = 1: gradient descent on alpha, omega with the refit solved exactly, many starts.
    best = min(brute_force_joint(a, h, v, seed) for seed in range(6))
    joint = gk.solve(m, method="joint", neurons=1)
    assert joint.bottleneck - joint.removed == pytest.approx(best, rel=1e-6)


def brute_force_joint(a, h, v, seed):
    basis = torch.linalg.qr(h)[0]
    free_a, free_v = a - basis @ (basis.mT @ a), v - basis @ (basis.mT @ v)
    g = torch.Generator().manual_seed(seed)
    alpha = torch.randn(a.shape[1], generator=g, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([alpha], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        t = free_a @ alpha  # the best omega for a given alpha, in closed form
        omega = free_v.mT @ t / t.square().sum()
        return (free_v - t[:, None] * omega).square().sum(1).mean()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return loss().item()


def test_joint_refit_is_the_best_at_the_scale_in_use_for_relu_slopes():
    torch.manual_seed(0)
    model, (x, y) = mlp(act=nn.ReLU), regression()
    m = measure(model, x, y)
    a, h, v = samples(model, x, y)
    new = gk.solve(m, method="joint", neurons=2)
    assert m.slope == 0.5
    seen = 0.5 * a @ (new.omega @ new.alpha).mT
    left = v - seen - h @ new.best_update.mT
    assert (h.mT @ left).abs().max() < 1e-9


def test_joint_with_both_biases_ignores_the_direction_of_ones():
    torch.manual_seed(4)
    model, (x, y) = mlp(), regression(seed=5)
    new = gk.solve(measure(model, x, y), method="joint", neurons=3)
    assert new.rank == 6
    assert torch.equal(new.alpha[:, -1], torch.zeros(3, dtype=torch.float64))


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


def finite_difference(model, new, x, y, loss=squared, step=1e-8):
    from growkern.surgery import trial

    model.eval()
    with torch.no_grad():
        at_zero = loss(model(x), y)
        with trial(model, new, scale=step):
            return ((at_zero - loss(model(x), y)) / step).item()


@pytest.mark.parametrize("method", ["tiny", "joint", "fisher"])
@pytest.mark.parametrize(
    ("act", "paired"),
    [(nn.Identity, False), (nn.Tanh, False), (nn.GELU, False), (nn.GELU, True), (nn.ReLU, True)],
)
def test_gain_is_the_derivative_of_the_loss(method, act, paired):
    torch.manual_seed(0)
    model, (x, y) = mlp(act=act), regression()
    new = gk.solve(measure(model, x, y), method=method, neurons=4, paired=paired)
    assert finite_difference(model, new, x, y) == pytest.approx(new.gain, rel=2e-3)


def test_gain_equals_half_the_squares_for_relu_once_the_weights_are_at_their_optimum():
    torch.manual_seed(0)
    model, (x, y) = mlp(act=nn.ReLU), regression()
    update = gk.solve(measure(model, x, y), neurons=1).best_update
    with torch.no_grad():
        model[2].weight += update[:, :-1]
        model[2].bias += update[:, -1]
    new = gk.solve(measure(model, x, y), neurons=3)
    assert new.reachable < 1e-12 * new.bottleneck
    assert new.gain == pytest.approx(0.5 * new.singular_values.square().sum().item(), rel=1e-8)


def conv_net(kernel=3, stride=1, act=nn.Tanh, norm=False, pool=False, bias=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, padding=1, bias=bias)]
    layers += [nn.BatchNorm2d(3)] if norm else []
    layers += [act()] + ([nn.AvgPool2d(2)] if pool else [])
    layers += [nn.Conv2d(3, 4, kernel, stride=stride, padding=kernel // 2, bias=bias)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3)).double()


def images(n=24):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, 8, 8, generator=g, dtype=torch.float64)
    return x, torch.randn(n, 3, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["full", "center"])
@pytest.mark.parametrize("options", [{}, {"norm": True}, {"pool": True}, {"stride": 2}, {"kernel": 5, "bias": False}])
def test_gain_is_the_derivative_of_the_loss_for_convolutions(kernel, options):
    x, y = images()
    model = conv_net(**options)
    model(x)  # lazy layers and running statistics
    site = gk.find_sites(model, x)[0]
    assert (site.producer, site.consumer) == ("0", str(2 + options.get("norm", 0) + options.get("pool", 0)))
    new = gk.solve(measure(model, x, y, site, kernel=kernel), neurons=2)
    assert new.removed > 0
    assert finite_difference(model, new, x, y) == pytest.approx(new.gain, rel=2e-3)


def test_full_kernel_bound_for_one_neuron():
    """Σλ² of one full-kernel neuron is at most what the neuron truly removes at its best amplitude."""
    x, y = images(40)
    model = conv_net(act=nn.Identity)
    model(x)
    site = gk.find_sites(model, x)[0]
    m = measure(model, x, y, site)
    new = gk.solve(m, neurons=1)
    with torch.no_grad():
        h, seen = model[0](x), {}
        handle = model[2].register_forward_hook(lambda mod, args, z: seen.update(z=z))
        z = model[2](h)
        handle.remove()
    z = z.detach().requires_grad_()
    squared(model[3:](z), y).backward()
    v = -len(x) * z.grad
    hp = torch.nn.functional.unfold(h, 3, padding=1)
    hp = torch.cat([hp, torch.ones_like(hp[:, :1])], 1).movedim(1, -1).flatten(0, 1)  # (n·l, q)
    free = least_squares(hp, v.flatten(2).movedim(1, -1).flatten(0, 1))
    free = free.unflatten(0, (len(x), -1)).movedim(-1, 1).reshape_as(v)
    assert new.bottleneck == pytest.approx((free.square().sum() / len(x)).item(), rel=1e-9)
    weight, bias = new.alpha[:, :-1].reshape(1, 2, 3, 3), new.alpha[:, -1]
    omega = new.omega.reshape(4, 3, 3, 1).movedim(-1, 1)
    contribution = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, weight, bias, padding=1), omega, padding=1)
    truly = (free.square().sum() - (free - contribution).square().sum()) / len(x)
    assert new.removed == pytest.approx(new.singular_values.square().sum().item(), rel=1e-9)
    assert truly.item() >= new.removed * (1 - 1e-9)


def test_gradmax_gradient_norm_on_tanh():
    torch.manual_seed(0)
    model, (x, y) = mlp(), regression()
    m = measure(model, x, y)
    new = gk.solve(m, method="gradmax", neurons=1)
    assert torch.equal(new.alpha, torch.zeros_like(new.alpha))
    existing = model[2].weight.norm(dim=0).mean().item()
    assert new.omega.norm().item() == pytest.approx(existing, rel=1e-12)
    before = model(x)
    gk.apply(model, new)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-13)
    squared(model(x), y).backward()
    gradient = torch.cat([model[0].weight.grad[-1], model[0].bias.grad[-1:]])
    assert gradient.norm().item() == pytest.approx(existing * new.singular_values[0].item(), rel=1e-10)
    assert model[2].weight.grad[:, -1].abs().max() == 0


def test_gradmax_pairs_on_relu_and_is_not_dead():
    torch.manual_seed(0)
    model, (x, y) = mlp(act=nn.ReLU), regression()
    new = gk.solve(measure(model, x, y), method="gradmax", neurons=4)
    assert len(new) == 4
    torch.testing.assert_close(new.alpha[1::2], -new.alpha[::2])
    torch.testing.assert_close(new.omega[:, 1::2], -new.omega[:, ::2])
    existing = torch.cat([model[0].weight], 1).norm(dim=1).mean()
    torch.testing.assert_close(new.alpha.norm(dim=1), 1e-3 * existing.expand(4))
    gk.apply(model, new)
    squared(model(x), y).backward()
    assert (model[0].weight.grad[-4:].norm(dim=1) > 1e-4).all()


def test_random_preserves_the_function_and_draws_like_the_layer():
    torch.manual_seed(0)
    model, (x, y) = mlp(p=50), regression(p=50)
    new = gk.solve(measure(model, x, y), method="random", neurons=400)
    bound = 50**-0.5
    assert new.alpha.abs().max() <= bound
    assert new.alpha.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    before = model(x)
    gk.apply(model, new)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-13)


def test_fisher_singular_values_are_canonical_correlations():
    torch.manual_seed(0)
    model, (x, y) = mlp(), regression()
    m = measure(model, x, y)
    a, h, v = samples(model, x, y)
    residual = least_squares(h, v)
    qa = torch.linalg.qr(a)[0]
    root = torch.linalg.cholesky(v.mT @ v)
    expected = torch.linalg.svdvals(torch.linalg.solve_triangular(root, residual.mT @ qa, upper=False))
    new = gk.solve(m, method="fisher", neurons=4)
    torch.testing.assert_close(new.singular_values, expected, rtol=1e-9, atol=0)
    # Rescaling an output of v leaves λ alone: it has no unit.
    stretch = torch.tensor([1.0, 10.0, 0.1, 1000.0], dtype=torch.float64)
    scaled = dataclasses.replace(
        m,
        **{k: getattr(m, k) * stretch for k in ("xv", "hv", "xr")},
        vv=m.vv * stretch * stretch[:, None],
        null=None,
    )
    torch.testing.assert_close(
        gk.solve(scaled, method="fisher", neurons=4).singular_values, expected, rtol=1e-8, atol=0
    )


def test_solve_of_a_dict_is_solve_of_each():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = regression()
    moments = gk.collect(model, gk.find_sites(model, x), [(x, y)], squared)
    found = gk.solve(moments, neurons=2)
    assert list(found) == ["0", "2"]
    for name, new in found.items():
        alone = gk.solve(moments[name], neurons=2)
        assert torch.equal(new.alpha, alone.alpha)
        assert new.site == moments[name].site


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "best"}, "method: expected one of tiny, joint, gradmax, fisher, random, got 'best'"),
        ({"neurons": -1}, "neurons: expected 'auto' or an integer"),
        ({"neurons": "many"}, "neurons: expected 'auto' or an integer"),
        ({"neurons": True}, "neurons: expected 'auto' or an integer"),
        ({"neurons": 3, "paired": True}, "multiples of 2"),
        ({"max_neurons": 1.5}, "max_neurons: expected an integer"),
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
