"""What the tests share: torchvision beside a CPU torch, seeds, small networks, and a summary of what ran."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growkern as gk
from growkern import backend

OPS = ("linear_moments", "linear_residual", "conv2d_moments", "conv2d_residual", "eigh", "svd")
CLASSES = 4
F64 = torch.float64


def _define_torchvision_ops() -> None:
    """Let torchvision be imported where its compiled ops, built for another torch, do not load.

    Its Python part registers shapes for `nms` and `qnms` at import and fails where they are not defined.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for library in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


_define_torchvision_ops()


# Which implementations ran, and which checks -----------------------------------------------------------

_calls: Counter[tuple[str, str]] = Counter()
_checks: dict[str, Counter[str]] = {}
_reasons: dict[str, str] = {}


def _counted(op: str, name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        _calls[op, name] += 1
        return implementation(*args)

    return run


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "check(name): a check that the summary reports by name")
    for op, implementations in getattr(backend, "_implementations", {}).items():
        for name, implementation in implementations.items():
            implementations[name] = _counted(op, name, implementation)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    outcome = yield
    report = outcome.get_result()
    for marker in item.iter_markers("check"):
        name = marker.args[0]
        _checks.setdefault(name, Counter())
        if report.when == "call" or report.outcome == "skipped":
            _checks[name][report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            _reasons[name] = report.longrepr[2].removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    write = terminalreporter.write_line
    terminalreporter.section("growkern")
    write(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for op in OPS:
        have = backend.available(op)
        ran = [f"{name} ({_calls[op, name]} calls)" for name in have if _calls[op, name]]
        write(f"{op}: has {', '.join(have)}; ran {', '.join(ran) or 'none'}")
    if torch.cuda.is_available():
        write(f"CUDA: {torch.cuda.get_device_name()}")
    else:
        write("CUDA: no GPU here")
    for name, counts in sorted(_checks.items()):
        ran = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
        reason = f" ({_reasons[name]})" if name in _reasons else ""
        write(f"{name}: {'yes' if counts['passed'] + counts['failed'] else 'no'}, {ran}{reason}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors do not gain from threads, and wait for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that a result that is not written everywhere shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def without_gromo(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make gromo's own statistics fail: each of them is an einsum."""

    def einsum(*args: object) -> None:
        raise AssertionError("gromo's own statistics ran")

    return lambda: monkeypatch.setattr(torch, "einsum", einsum)


# A model as it is, to see that nothing of it has changed ------------------------------------------------


def picture(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Copy all that an operation which changes nothing must leave as it is; for `assert_same`."""
    shot: dict[str, Any] = {"random numbers": torch.get_rng_state()}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple | None)}
        hooks = {k: len(v) for k, v in vars(module).items() if k.endswith("hooks")}
        shot[f"module {name}"] = (type(module), plain, hooks, list(module._parameters), list(module._buffers))
    for name, p in model.named_parameters():
        grad = None if p.grad is None else (id(p.grad), p.grad.clone())
        shot[name] = (id(p), p.detach().clone(), p.stride(), p.requires_grad, grad)
    for name, buffer in model.named_buffers():
        shot[name] = (id(buffer), buffer.clone())
    if optimizer is not None:
        groups = [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups]
        state = {id(p): {k: _copied(v) for k, v in each.items()} for p, each in optimizer.state.items()}
        shot["optimizer"] = (groups, state)
    return shot


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [_copied(v) for v in value] if isinstance(value, list) else value


def assert_same(before: Any, after: Any, where: str = "") -> None:
    """Compare two pictures, tensors bit by bit."""
    if isinstance(before, Tensor):
        torch.testing.assert_close(
            after, before, rtol=0, atol=0, equal_nan=True, check_stride=True, msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_same(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, tuple | list) and type(before) is type(after) and len(before) == len(after):
        for i, pair in enumerate(zip(before, after, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert before == after, where


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    """Assert that two tensors agree relative to the largest entry."""
    assert a.shape == b.shape, (a.shape, b.shape)
    a, b = a.detach(), b.detach()
    scale = max(float(b.abs().max()) if b.numel() else 0.0, 1e-30)
    difference = float((a.double() - b.double()).abs().max()) if b.numel() else 0.0
    assert difference <= tolerance * scale, f"differ by {difference / scale:.3g}, allowed {tolerance:.3g}"


# Small networks ------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block: basic (two 3×3 convolutions) or bottleneck (1×1, 3×3, 1×1)."""

    def __init__(self, channels: int, inner: int, out: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        widths = (channels, *[inner] * (len(kernels) - 1), out)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        for i, k in enumerate(kernels):
            conv = nn.Conv2d(widths[i], widths[i + 1], k, strides[i], k // 2, bias=False)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if (channels, stride) == (out, 1) else nn.Conv2d(channels, out, 1, stride)
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.bottleneck:
            out = self.bn3(self.conv3(self.relu(out)))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    """A stem, two residual blocks and a head."""

    def __init__(self, bottleneck: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.block1 = Block(4, 3, 4, 1, bottleneck)
        self.block2 = Block(4, 5, 6, 2, bottleneck)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Flattened(nn.Module):
    """Convolution, average pooling, flatten, linear; all functional in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3, stride=2), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.conv(x)), 2, 1)
        return self.fc(x.view(x.size(0), -1))


class Tokens(nn.Module):
    """An encoder of torch.nn ahead of a head that averages over the sequence."""

    def __init__(self, norm_first: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 10, 0.1, batch_first=True, norm_first=norm_first, **options)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def net(forward: Callable[..., Any], **layers: nn.Module) -> nn.Module:
    """A module with these layers and this forward(self, ...)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)

    Net.forward = forward
    return Net()


def texts(model: nn.Module, *inputs: Any) -> list[str]:
    return [str(site) for site in gk.find_sites(model, inputs if len(inputs) > 1 else inputs[0])]


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(8, 7),
        nn.BatchNorm1d(7),
        nn.Tanh(),
        nn.Linear(7, CLASSES),
    )


def vgg() -> nn.Sequential:
    """Padded convolutions with BatchNorm and max pooling; the last map is upsampled ahead of flattening."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.MaxPool2d(2)),
        *(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(45, 9), nn.GELU(), nn.Linear(9, CLASSES)),
    )


def resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=CLASSES)


def vgg11() -> nn.Module:
    """The network of torchvision with a narrow classifier behind its 25088 features."""
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        model = models.vgg11(init_weights=False)
        model.classifier = nn.Sequential(nn.Linear(25088, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, CLASSES))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def vit() -> nn.Module:
    transformer = pytest.importorskip("torchvision").models.vision_transformer.VisionTransformer
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12}
    model = transformer(image_size=16, patch_size=8, num_classes=CLASSES, **sizes)
    nn.init.normal_(model.heads.head.weight)  # it starts at zero, which lets no gradient through
    return model


@dataclass(frozen=True)
class Family:
    """A kind of network: how to build it, the shape of a sample, and where it grows (one site of each kind)."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    sites: tuple[str, ...]

    def batches(self, *sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
        return [(torch.randn(n, *self.sample, dtype=dtype), torch.randint(CLASSES, (n,))) for n in sizes]


FAMILIES = {
    "mlp": Family(mlp, (6,), ("0", "3")),
    "vgg": Family(vgg, (3, 8, 8), ("0", "4", "10")),
    "resnet": Family(lambda: ResNet(False), (3, 8, 8), ("block1.conv1", "block2.conv1")),
    "bottleneck": Family(lambda: ResNet(True), (3, 8, 8), ("block2.conv1", "block2.conv2")),
    "flatten": Family(Flattened, (3, 8, 8), ("conv",)),
    "transformer": Family(Tokens, (5, 8), ("layer.linear1",)),
    "torchvision vit": Family(vit, (3, 16, 16), ("encoder.layers.encoder_layer_1.mlp.0",)),
    "torchvision resnet18": Family(resnet18, (3, 32, 32), ("layer1.0.conv1",)),
    "torchvision vgg11": Family(vgg11, (3, 32, 32), ("features.0",)),
}
SMALL = [name for name in FAMILIES if not name.startswith("torchvision")]
ALL = [
    pytest.param(name, marks=() if name in SMALL else pytest.mark.check("torchvision families")) for name in FAMILIES
]
