"""`neurons="auto"`: nothing where there is only noise, and every direction of a planted signal."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import growkern as gk

DRAWS = 100

pytestmark = pytest.mark.usefixtures("one_thread")


def inner_product(output, direction):
    """A loss whose desired update is exactly minus `direction`."""
    return (output * direction).flatten(1).sum(1).mean()


def measured(model, pairs, **kwargs):
    """Moments of the one site of a model for each draw of x and v; what is solved for is cheap beside measuring it."""
    (site,) = gk.find_sites(model, pairs[0][0])
    return {i: gk.collect(model, site, [(x, -v)], inner_product, **kwargs)[site.name] for i, (x, v) in enumerate(pairs)}


def found(moments, method):
    """How many neurons are found in each draw."""
    return [len(new) for new in gk.solve(moments, method=method).values()]


def generators(draws=DRAWS):
    return [torch.Generator().manual_seed(draw) for draw in range(draws)]


def linear_noise(kind, g, x, r):
    v = torch.randn(len(x), r, generator=g)
    if kind == "heavy tails":
        v = v / torch.randn(len(x), 1, generator=g).abs().clamp_min(0.05)
    elif kind == "scale depends on x":
        v = v * x[:, :1].abs() * x[:, 1:2].abs()
    elif kind == "cross-entropy":
        labels = torch.randint(0, r, (len(x),), generator=g)
        v = F.one_hot(labels, r) - torch.softmax(2 * torch.randn(len(x), r, generator=g), 1)
    return v


@functools.cache
def linear_moments_of_noise(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))
    pairs = []
    for g in generators():
        x = torch.randn(160, 16, generator=g)
        pairs.append((x, linear_noise(kind, g, x, 8)))
    return measured(model, pairs)


@pytest.mark.parametrize("method", ["tiny", "joint", "fisher", "gradmax"])
@pytest.mark.parametrize("kind", ["independent", "heavy tails", "scale depends on x", "cross-entropy"])
def test_noise_gives_no_neurons_linear(kind, method):
    assert sum(map(bool, found(linear_moments_of_noise(kind), method))) <= 0.02 * DRAWS


@functools.cache
def convolution_moments_of_noise(smooth, kernel):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1))
    pairs = [(torch.randn(48, 2, 8, 8, generator=g), torch.randn(48, 4, 8, 8, generator=g)) for g in generators()]
    if smooth:
        pairs = [[F.avg_pool2d(F.pad(t, (2, 2, 2, 2), mode="circular"), 5, 1) for t in pair] for pair in pairs]
    return measured(model, pairs, kernel=kernel)


@pytest.mark.parametrize(
    ("kernel", "method"), [("full", "tiny"), ("center", "tiny"), ("center", "joint"), ("full", "fisher")]
)
@pytest.mark.parametrize("smooth", [False, True])
def test_noise_gives_no_neurons_convolution(smooth, kernel, method):
    assert sum(map(bool, found(convolution_moments_of_noise(smooth, kernel), method))) <= 0.02 * DRAWS


@functools.cache
def moments_of_noise_in_a_wide_layer(hidden, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 6)).to(dtype)
    pairs = [[torch.randn(48, width, generator=g).to(dtype) for width in (8, 6)] for g in generators(20)]
    return measured(model, pairs)


@pytest.mark.parametrize("method", ["tiny", "joint", "fisher", "gradmax"])
@pytest.mark.parametrize("hidden", [44, 47, 52, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_gives_no_neurons_where_a_wide_layer_expresses_all_of_it(hidden, method, dtype):
    """With as many units as samples the weights reach any v, and v⊥ and its draws are rounding."""
    for new in gk.solve(moments_of_noise_in_a_wide_layer(hidden, dtype), method=method).values():
        assert (new.noise == float("inf")) == (hidden + 1 > 0.95 * 48)
        assert not len(new)


@functools.cache
def moments_of_noise_in_few_images(hidden):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, hidden, 3, padding=1), nn.Tanh(), nn.Conv2d(hidden, 4, 3, padding=1))
    pairs = [(torch.randn(8, 3, 4, 4, generator=g), torch.randn(8, 4, 4, 4, generator=g)) for g in generators()]
    return measured(model, pairs)


@pytest.mark.parametrize("method", ["tiny", "fisher", "gradmax"])
@pytest.mark.parametrize("hidden", [4, 12])
def test_noise_gives_no_neurons_where_a_whole_kernel_expresses_most_of_it(hidden, method):
    assert sum(map(bool, found(moments_of_noise_in_few_images(hidden), method))) <= 0.02 * DRAWS


@pytest.mark.parametrize("order", [1, -1])
def test_units_that_are_dead_and_small_maps_leave_chance_to_tell(order):
    """Ten of twelve units never fire: 73 directions of 433 in 400 samples; and some images are of one position."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(432, 4))
    with torch.no_grad():
        model[0].bias[2:] = -100
    moments = measured(model, [(torch.randn(400, 3, 6, 6), torch.randn(400, 4))])
    assert gk.solve(moments[0]).noise < float("inf")

    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1))
    batches = [(torch.randn(n, 3, s, s), torch.randn(n, 2, s, s)) for n, s in ((30, 16), (2, 1))][::order]
    moments = gk.collect(model, [gk.GrowthSite("0", "2", ("1",))], batches, inner_product)["0"]
    assert moments.samples == 30 * 16 * 16 + 2
    assert gk.solve(moments).noise < float("inf")


@functools.cache
def moments_of_a_planted_signal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 8))
    alpha, omega = torch.linalg.qr(torch.randn(16, 3))[0], torch.linalg.qr(torch.randn(8, 3))[0]
    pairs = []
    for g in generators(20):
        x = torch.randn(800, 16, generator=g)
        pairs.append((x, 0.7 * x @ alpha @ omega.mT + torch.randn(800, 8, generator=g)))
    return measured(model, pairs)


@pytest.mark.parametrize("method", ["tiny", "joint", "fisher"])
def test_a_planted_signal_is_found_with_its_rank(method):
    assert found(moments_of_a_planted_signal(), method) == [3] * 20


def test_a_planted_signal_is_found_with_its_rank_in_a_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 8, 1))
    alpha, omega = torch.linalg.qr(torch.randn(27, 3))[0], torch.linalg.qr(torch.randn(8, 3))[0]
    pairs = []
    for g in generators(20):
        x = torch.randn(64, 3, 8, 8, generator=g)
        signal = F.conv2d(F.conv2d(x, alpha.mT.reshape(3, 3, 3, 3), padding=1), omega[:, :, None, None])
        pairs.append((x, 0.5 * signal + torch.randn(64, 8, 8, 8, generator=g)))
    assert found(measured(model, pairs), "tiny") == [3] * 20


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_a_constant_error_of_a_whole_sequence_is_one_draw_of_noise(batch_dim):
    """Tokens of a sequence share their error: one sign per token would take 32 times too many for independent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 5))
    pairs = []
    for g in generators():
        x = torch.randn(64, 1, 8, generator=g) + 0.3 * torch.randn(64, 32, 8, generator=g)
        v = torch.randn(64, 1, 5, generator=g).expand(64, 32, 5)
        pairs.append([t.transpose(0, batch_dim) for t in (x, v)])
    assert sum(map(bool, found(measured(model, pairs, batch_dim=batch_dim), "tiny"))) <= 0.02 * DRAWS


@pytest.mark.parametrize("method", ["tiny", "gradmax"])
def test_noise_is_that_of_the_draws_with_what_they_lost_given_back(method):
    """N has lost what h explains once and a draw twice; xv has not lost it, and gets back a leave-one-out residual."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    x, v = (torch.randn(32, n, dtype=torch.float64) for n in (6, 5))
    m = gk.collect(model, [gk.GrowthSite("0", "2", ("1",))], [(x, -v)], inner_product)["0"]
    projected = torch.linalg.solve(m.hh, m.null_h)  # (draws, q, r)
    bottleneck = torch.trace(m.vv) - (m.hv * torch.linalg.solve(m.hh, m.hv)).sum()
    kept = 1 - (m.null_h * projected).sum() / len(m.null) / bottleneck
    assert 0.6 < kept < 0.8  # h has 10 features of 32 rows
    if method == "tiny":
        whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(m.xx), m.null - m.xh @ projected, upper=False)
        tops = torch.linalg.matrix_norm(whitened, 2) / kept.sqrt()
    else:
        tops = torch.linalg.matrix_norm(m.null, 2) / kept
    expected = tops.mean() * (1 + 1e-6) + 5 * tops.std()
    assert gk.solve(m, method=method).noise == pytest.approx(expected.item(), rel=1e-7)


def trained(model, x, y):
    """A network at a minimum of its mean squared error."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def loss():
        optimizer.zero_grad()
        value = F.mse_loss(model(x), y)
        value.backward()
        return value

    optimizer.step(loss)
    return model


@pytest.fixture(scope="module")
def students():
    """Networks of some widths that have learned from one of width 4, and noise on what it says."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for parameter in teacher.parameters():
        parameter.data.mul_(2)
    x = torch.randn(2000, 8, dtype=torch.float64)
    y = teacher(x).detach() + 0.3 * torch.randn(2000, 3, dtype=torch.float64)
    start = {width: nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3)).double() for width in (2, 4, 16)}
    models = {width: trained(model, x, y) for width, model in start.items()}
    site = gk.GrowthSite("0", "2", ("1",))
    return {width: gk.collect(model, [site], [(x, y)], F.mse_loss)["0"] for width, model in models.items()}


@pytest.mark.parametrize("method", ["tiny", "joint", "fisher", "gradmax"])
def test_a_trained_network_gets_neurons_only_where_it_is_narrower_than_what_it_learns(students, method):
    counts = {width: len(gk.solve(moments, method=method)) for width, moments in students.items()}
    assert counts[2] > 0
    assert counts[4] == counts[16] == 0
