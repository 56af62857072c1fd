"""Second moments: the reference against loops over the definition, then every backend against the reference."""

import itertools

import pytest
import torch
from cases import TOLERANCES, Conv2dCase, LinearCase, cases, device_of, error, to_double
from torch import Tensor
from torch.nn import functional as F

from growkern import ops
from growkern.backend import available, use_backend
from growkern.ops import ConvGeometry
from growkern.ops.moments import reference

LINEAR = cases("linear_moments", "linear_residual")
CONV2D = cases("conv2d_moments", "conv2d_residual")
NAMES = {3: ("xr", "xr_null", "hr_null"), 6: ("xx", "xh", "xv", "hh", "hv", "vv")}

pytestmark = pytest.mark.usefixtures("one_thread", "poison")


def assert_close(out, expected, tolerance):
    assert len(out) == len(expected)
    for name, one, other in zip(NAMES[len(out)], out, expected, strict=True):
        assert one.shape == other.shape, name
        assert error(one, other) <= tolerance, name


def with_ones(features: Tensor, bias: bool, dim: int) -> Tensor:
    return torch.cat([features, torch.ones_like(features.narrow(dim, 0, 1))], dim) if bias else features


# The definition, one sample at a time.


def linear_by_rows(x, h, v, update=None, *, signs=None, rows_per_sign=1, x_bias, h_bias):
    p, q, r = x.shape[1] + x_bias, h.shape[1] + h_bias, v.shape[1]
    one = torch.ones(1, dtype=torch.float64)
    shapes = ((p, p), (p, q), (p, r), (q, q), (q, r), (r, r))
    sums = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    xr = torch.zeros(p, r).double()
    draws = 0 if signs is None else len(signs)
    xr_null, hr_null = torch.zeros(draws, p, r).double(), torch.zeros(draws, q, r).double()
    for i in range(len(x)):
        a = torch.cat([x[i], one]) if x_bias else x[i]
        b = torch.cat([h[i], one]) if h_bias else h[i]
        for total, (left, right) in zip(sums, itertools.combinations_with_replacement((a, b, v[i]), 2), strict=True):
            total += torch.outer(left, right)
        if update is not None:
            left_over = v[i] - update @ b
            xr += torch.outer(a, left_over)
            for s in range(draws):
                sign = signs[s, i // rows_per_sign]
                xr_null[s] += sign * torch.outer(a, left_over)
                hr_null[s] += sign * torch.outer(b, left_over)
    return sums if update is None else (xr, xr_null, hr_null)


def patches_by_conv2d(maps: Tensor, geometry: ConvGeometry, trailing: int, bias: bool) -> Tensor:
    """Patch features as conv2d's own weights order them: output channel k has weight e_k."""
    (kh, kw), (ph, pw) = geometry.kernel_size, geometry.padding
    padded = F.pad(maps, (pw, pw + trailing, ph, ph + trailing, 0, 1))  # conv2d wants at least one channel
    channels = padded.shape[1]
    weight = torch.eye(channels * kh * kw, dtype=maps.dtype).view(-1, channels, kh, kw)
    features = F.conv2d(padded, weight, None, geometry.stride, 0, geometry.dilation)
    return with_ones(features, bias, 1)[:, [*range((channels - 1) * kh * kw), -1]] if bias else features[:, : -kh * kw]


def conv2d_by_positions(case: Conv2dCase, x, h, v, update=None, signs=None):
    """Every moment as a loop over images, consumer positions and taps."""
    consumer = case.consumer
    xs = patches_by_conv2d(x, case.producer, case.trailing[0], case.x_bias)
    hs = patches_by_conv2d(h, consumer, case.trailing[1], case.h_bias)
    assert xs.shape[2:] == h.shape[2:]
    assert hs.shape[2:] == v.shape[2:]
    (kh, kw), (sh, sw) = consumer.kernel_size, consumer.stride
    (ph, pw), (dh, dw) = consumer.padding, consumer.dilation
    full = case.kernel == "full"
    taps = list(itertools.product(range(kh), range(kw))) if full else [(kh // 2, kw // 2)]
    p, q, r = xs.shape[1], hs.shape[1], v.shape[1]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    draws = 0 if signs is None else len(signs)
    xx, xh, xv, hh, hv, vv = zeros(p, p), zeros(p, q), zeros(p, r, len(taps)), zeros(q, q), zeros(q, r), zeros(r, r)
    xr, xr_null, hr_null = zeros(p, r, len(taps)), zeros(draws, p, r, len(taps)), zeros(draws, q, r)
    for b, ly, lx in itertools.product(range(len(v)), range(v.shape[2]), range(v.shape[3])):
        h_l, v_l = hs[b, :, ly, lx], v[b, :, ly, lx]
        hh += torch.outer(h_l, h_l)
        hv += torch.outer(h_l, v_l)
        vv += torch.outer(v_l, v_l)
        left_over = v_l if update is None else v_l - update @ h_l
        for s in range(draws):
            hr_null[s] += signs[s, b] * torch.outer(h_l, left_over)
        for t, (ty, tx) in enumerate(taps):
            iy, ix = sh * ly + dh * ty - ph, sw * lx + dw * tx - pw
            if 0 <= iy < xs.shape[2] and 0 <= ix < xs.shape[3]:
                x_i = xs[b, :, iy, ix]
                xx += torch.outer(x_i, x_i)
                xh += torch.outer(x_i, h_l)
                xv[:, :, t] += torch.outer(x_i, v_l)
                xr[:, :, t] += torch.outer(x_i, left_over)
                for s in range(draws):
                    xr_null[s, :, :, t] += signs[s, b] * torch.outer(x_i, left_over)
    if update is None:
        return xx, xh[:, :0] if full else xh, xv.flatten(1), hh, hv, vv
    return xr.flatten(1), xr_null.flatten(2), hr_null[:, :0] if full else hr_null


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_is_its_definition(case: LinearCase):
    args, named = case.arguments(torch.float64)
    if case.op == "linear_residual":
        named["signs"] = named["signs"].double()
    assert_close(case.function(*args, **named), linear_by_rows(*args, **named), 1e-13)


@pytest.mark.parametrize("case", CONV2D, ids=str)
def test_conv2d_is_its_definition(case: Conv2dCase):
    args, named = case.arguments(torch.float64)
    expected = conv2d_by_positions(case, *args, signs=named.get("signs"))
    assert_close(case.function(*args, **named), expected, 1e-13)


@pytest.mark.parametrize(
    ("case", "dtype", "backend"),
    [(case, dtype, backend) for case in LINEAR + CONV2D for dtype in case.dtypes for backend in available(case.op)],
    ids=str,
)
def test_every_backend_in_every_dtype(case, dtype, backend):
    args, named = case.arguments(dtype, seed=1, device=device_of(backend))
    double_args, double_named = to_double((args, named))
    with use_backend("reference"):
        expected = case.function(*double_args, **double_named)
    with use_backend(backend):
        out = case.function(*args, **named)
    assert {result.dtype for result in out} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert_close(out, expected, TOLERANCES[dtype])


# Identities with convolutions and gradients that PyTorch computes.

GEOMETRIES = [
    (ConvGeometry(3, 1, 1), ConvGeometry(3, 1, 1)),
    (ConvGeometry((3, 2), (2, 1), (1, 2), (1, 2)), ConvGeometry((2, 3), (1, 2), (3, 1), (2, 1))),
]


def pair_of_convolutions(producer: ConvGeometry, consumer: ConvGeometry, kernel: str):
    """x, h, v and the convolutions of 4 new neurons that lie between x and v."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 9, 8, dtype=torch.float64)
    first = torch.nn.Conv2d(2, 4, producer.kernel_size, producer.stride, producer.padding, producer.dilation)
    second = torch.nn.Conv2d(
        4, 5, consumer.kernel_size, consumer.stride, consumer.padding, consumer.dilation, bias=False
    )
    first, second = first.double(), second.double()
    if kernel == "center":
        kh, kw = consumer.kernel_size
        center = torch.zeros_like(second.weight)
        center[:, :, kh // 2, kw // 2] = 1
        second.weight.data *= center
    h = torch.randn(3, 3, *first(x).shape[2:], dtype=torch.float64)
    v = torch.randn_like(second(first(x)))
    return x, h, v, first, second


@pytest.mark.parametrize("kernel", ["full", "center"])
@pytest.mark.parametrize(("producer", "consumer"), GEOMETRIES)
def test_xv_is_the_gradient_of_new_neurons(producer, consumer, kernel):
    """d⟨v, ω∗(α∗x)⟩/dα = ω xvᵀ and d/dω = α xv, in the order of both weights' flatten(1)."""
    x, h, v, first, second = pair_of_convolutions(producer, consumer, kernel)
    (second(first(x)) * v).sum().backward()
    xv = ops.conv2d_moments(x, h, v, producer=producer, consumer=consumer, kernel=kernel, x_bias=True)[2]
    alpha = torch.cat([first.weight.flatten(1), first.bias[:, None]], 1).detach()  # (K, p)
    alpha_grad = torch.cat([first.weight.grad.flatten(1), first.bias.grad[:, None]], 1)
    kh, kw = consumer.kernel_size
    omega, omega_grad = second.weight.detach(), second.weight.grad  # (r, K, kh, kw)
    if kernel == "center":
        omega, omega_grad = (w[:, :, kh // 2, kw // 2, None, None] for w in (omega, omega_grad))
    omega, omega_grad = (w.transpose(0, 1).flatten(1) for w in (omega, omega_grad))  # (K, r·taps)
    assert error(omega @ xv.T, alpha_grad) < 1e-13
    assert error(alpha @ xv, omega_grad) < 1e-13


@pytest.mark.parametrize(("producer", "consumer"), GEOMETRIES)
def test_full_xx_is_the_energy_that_the_taps_read(producer, consumer):
    """αᵀ xx α summed over neurons = Σ over taps of ‖what a consumer with that tap alone reads‖²."""
    x, h, v, first, _ = pair_of_convolutions(producer, consumer, "full")
    xx = ops.conv2d_moments(x, h, v, producer=producer, consumer=consumer, x_bias=True)[0]
    alpha = torch.cat([first.weight.flatten(1), first.bias[:, None]], 1)
    taps = torch.eye(consumer.taps, dtype=torch.float64).view(-1, 1, *consumer.kernel_size)
    pre = first(x).flatten(0, 1)[:, None]
    read = F.conv2d(pre, taps, None, consumer.stride, consumer.padding, consumer.dilation)
    energy = read.square().sum()
    assert abs(torch.trace(alpha @ xx @ alpha.T) - energy) < 1e-12 * energy


@pytest.mark.parametrize("kernel", ["full", "center"])
@pytest.mark.parametrize(("producer", "consumer"), GEOMETRIES)
def test_residual_is_the_moment_of_what_a_convolution_leaves(producer, consumer, kernel):
    x, h, v, *_ = pair_of_convolutions(producer, consumer, kernel)
    weight, bias = torch.randn(5, 3, *consumer.kernel_size).double(), torch.randn(5).double()
    left_over = v - F.conv2d(h, weight, bias, consumer.stride, consumer.padding, consumer.dilation)
    options = {"producer": producer, "consumer": consumer, "kernel": kernel, "x_bias": True, "h_bias": True}
    update = torch.cat([weight.flatten(1), bias[:, None]], 1)
    signs = torch.stack([torch.ones(3), torch.tensor([1.0, -1.0, -1.0])]).double()
    xr, xr_null, hr_null = ops.conv2d_residual(x, h, v, update, signs=signs, **options)
    flipped = left_over * signs[1, :, None, None, None]
    for out, null, weighted in ((xr, xr_null[0], left_over), (xr_null[1], xr_null[1], flipped)):
        _, _, xv, _, hv, _ = ops.conv2d_moments(x, h, weighted, **options)
        assert error(out, xv) < 1e-13
        assert error(null, xv) < 1e-13
    if kernel == "center":
        assert error(hr_null[1], hv) < 1e-13
    unchanged = ops.conv2d_residual(x, h, v, torch.zeros_like(update), **options)[0]
    assert error(unchanged, ops.conv2d_moments(x, h, v, **options)[2]) < 1e-13


def test_linear_residual_without_update_is_the_moment():
    x, h, v = torch.randn(3, 50, 7).double().unbind()
    signs = torch.ones(2, 50)
    xr, xr_null, hr_null = ops.linear_residual(x, h, v, torch.zeros(7, 8), signs=signs, x_bias=True, h_bias=True)
    _, _, xv, _, hv, _ = ops.linear_moments(x, h, v, x_bias=True, h_bias=True)
    assert error(xr, xv) < 1e-13
    assert error(xr_null, xv.expand(2, -1, -1)) < 1e-13
    assert error(hr_null, hv.expand(2, -1, -1)) < 1e-13


# Promises about sums, chunks, autocast, precision and gradients.

SAMPLES = [case for case in LINEAR + CONV2D if case.name in ("1000 rows", "3×3-full", "3×3-center")]


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_split_batches_add_to_the_whole(case):
    args, named = case.arguments(torch.float64)
    whole = case.function(*args, **named)
    parts = []
    for some in (slice(0, 1), slice(1, None)):
        samples = [*(tensor[some] for tensor in args[:3]), *args[3:]]
        signs = {"signs": named["signs"][:, some]} if "signs" in named else {}
        parts.append(case.function(*samples, **{**named, **signs}))
    assert_close([one + other for one, other in zip(*parts, strict=True)], whole, 1e-13)


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_chunks_add_to_the_whole_and_repeat_bit_by_bit(case, monkeypatch):
    args, named = case.arguments(torch.float64)
    with use_backend("reference"):
        whole = case.function(*args, **named)
        monkeypatch.setattr(reference, "CHUNK_BYTES", 1)
        one, other = case.function(*args, **named), case.function(*args, **named)
    assert_close(one, whole, 1e-13)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_patches_of_a_large_batch_stay_bounded(monkeypatch):
    """Whatever the batch, no chunk holds more than CHUNK_BYTES of patches, unless it is one image."""
    sizes = []
    fill = reference._fill
    monkeypatch.setattr(reference, "_fill", lambda patches, windows: sizes.append(patches) or fill(patches, windows))
    monkeypatch.setattr(reference, "CHUNK_BYTES", 2**20)
    case = Conv2dCase(op="conv2d_moments", name="large", batch=64, channels=(8, 8, 8), maps=(16, 16))
    args, named = case.arguments(torch.float32)
    with use_backend("reference"):
        ops.conv2d_moments(*args, **named)
    assert len(sizes) > 2
    assert max(patches.nbytes for patches in sizes) <= 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_autocast_changes_nothing(case, dtype):
    args, named = case.arguments(dtype)
    expected = case.function(*args, **named)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.function(*args, **named)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_a_low_matmul_precision_neither_leaks_in_nor_is_changed(case, precision):
    args, named = case.arguments(torch.float32)
    expected = case.function(*to_double((args, named))[0], **named)
    before = torch.get_float32_matmul_precision()
    seen = []
    try:
        torch.set_float32_matmul_precision("medium")
        out = case.function(*args, **named, precision=precision)
        seen = [torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision]
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["medium", "bf16"]
    assert_close(out, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize(("precision", "during"), [("ieee", "ieee"), ("tf32", "tf32")])
def test_cuda_matmuls_run_at_the_precision_asked_for(precision, during):
    settings = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for allowed in (True, False):
            settings.allow_tf32 = allowed
            with reference.matmul_precision(torch.device("cuda"), precision):
                assert settings.fp32_precision == during
            assert settings.allow_tf32 is allowed
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_inputs_that_require_gradients_give_results_without(case):
    args, named = case.arguments(torch.float32)
    expected = case.function(*args, **named)
    out = case.function(*(tensor.requires_grad_() for tensor in args), **named)
    assert not any(result.requires_grad for result in out)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    with torch.inference_mode():
        assert_close(case.function(*args, **named), [result.double() for result in expected], 0.0)
