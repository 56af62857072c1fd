"""The one table of inputs: correctness tests, registration tests and benchmarks all read it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from growkern import ops
from growkern.backend import DEVICES
from growkern.ops import ConvGeometry

# Largest ‖out − ref‖/‖ref‖ of any result, ref being the float64 reference on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-6,  # products of bfloat16 and float16 numbers are exact in float32
    torch.float16: 2e-6,
}
SINGLE_DOUBLE = (torch.float32, torch.float64)
ALL = (*SINGLE_DOUBLE, torch.bfloat16, torch.float16)
BENCH = (torch.float32, torch.bfloat16, torch.float16)

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """Arguments of one call of `ops.<op>`."""

    op: str
    name: str
    size: str = "test"  # "test" | "bench" | "scaling": one axis of a convolution at a time
    dtypes: tuple[torch.dtype, ...] = SINGLE_DOUBLE
    layout: str = "contiguous"  # | "strided" | "channels_last" | "rows first"

    @property
    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        return getattr(ops, self.op)

    def arguments(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Call:
        """Positional and keyword arguments, drawn on the CPU for tests, so that they are the same on every device."""
        positional, named = self._draw(_Source(dtype, seed, self.layout, device, small=self.size == "test"))
        return tuple(positional), named

    @abstractmethod
    def _draw(self, source: "_Source") -> tuple[list[Any], dict[str, Any]]:
        """Draw positional and keyword arguments."""

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


@dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """x, h and v of `rows` rows and the given widths; `draws` of signs for the residual."""

    rows: int
    widths: tuple[int, int, int]
    x_bias: bool = True
    h_bias: bool = True
    draws: int = 3
    rows_per_sign: int = 1

    def _draw(self, source: "_Source") -> tuple[list[Any], dict[str, Any]]:
        tensors = [source.normal(self.rows, width) for width in self.widths]
        named: dict[str, Any] = {"x_bias": self.x_bias, "h_bias": self.h_bias}
        if self.op == "linear_residual":
            tensors.append(source.update(self.widths[2], self.widths[1] + self.h_bias))
            named["signs"] = source.signs(self.draws, -(-self.rows // self.rows_per_sign))
            named["rows_per_sign"] = self.rows_per_sign
        return tensors, named


@dataclass(frozen=True, kw_only=True)
class Conv2dCase(Case):
    """x of `channels[0]` channels and `maps` size, and h and v of the sizes that follow."""

    batch: int = 3
    channels: tuple[int, int, int] = (3, 4, 2)
    maps: tuple[int, int] = (7, 6)
    producer: ConvGeometry = field(default_factory=lambda: ConvGeometry(3, padding=1))
    consumer: ConvGeometry = field(default_factory=lambda: ConvGeometry(3, padding=1))
    trailing: tuple[int, int] = (0, 0)  # zeros after the last row and column beyond those before the first
    kernel: str = "full"
    x_bias: bool = True
    h_bias: bool = True
    draws: int = 3

    @property
    def hidden(self) -> tuple[int, int]:
        return _output(self.producer, self.maps, self.trailing[0])

    @property
    def outputs(self) -> tuple[int, int]:
        return _output(self.consumer, self.hidden, self.trailing[1])

    def _draw(self, source: "_Source") -> tuple[list[Any], dict[str, Any]]:
        sizes = zip(self.channels, (self.maps, self.hidden, self.outputs), strict=True)
        tensors = [source.normal(self.batch, channels, *size) for channels, size in sizes]
        named: dict[str, Any] = {
            "producer": self.producer,
            "consumer": self.consumer,
            "kernel": self.kernel,
            "x_bias": self.x_bias,
            "h_bias": self.h_bias,
        }
        if self.op == "conv2d_residual":
            tensors.append(source.update(self.channels[2], self.channels[1] * self.consumer.taps + self.h_bias))
            named["signs"] = source.signs(self.draws, self.batch)
        return tensors, named


@dataclass(frozen=True, kw_only=True)
class MatrixCase(Case):
    """A batch of matrices for `eigh` (symmetric) or `svd`, with the given singular values."""

    shape: tuple[int, ...]
    values: str = "random"  # | "gram" | "repeated" | "rank one" | "zero"
    scale: float = 1.0

    def _draw(self, source: "_Source") -> tuple[list[Any], dict[str, Any]]:
        return [source.matrices(self.shape, self.values, self.scale, symmetric=self.op == "eigh")], {}


class _Source:
    def __init__(self, dtype: torch.dtype, seed: int, layout: str, device: str, small: bool) -> None:
        self.dtype, self.layout, self.device = dtype, layout, device
        # A CPU would draw for seconds what is large, and what has no memory needs no values.
        self.place = "cpu" if small and device != "meta" else device
        self.generator = None if self.place == "meta" else torch.Generator(self.place).manual_seed(seed)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device=self.place)

    def normal(self, *shape: int) -> Tensor:
        """Activations and their gradients, with a mean that a bias would see."""
        values = (self._randn(*shape) + 0.3).to(self.device, self.dtype)
        if self.layout == "channels_last":
            return values.contiguous(memory_format=torch.channels_last)
        if self.layout == "rows first":  # of maps: memory runs as (images, columns, channels, rows)
            return values.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        if self.layout == "strided":
            return torch.stack([values, torch.full_like(values, torch.nan)], -1)[..., 0]
        return values

    def update(self, r: int, q: int) -> Tensor:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return (self._randn(r, q) / max(q, 1) ** 0.5).to(self.device, wide)

    def signs(self, draws: int, samples: int) -> Tensor:
        return self._randn(draws, samples).sign().to(self.device, torch.float32)

    def matrices(self, shape: tuple[int, ...], values: str, scale: float, *, symmetric: bool) -> Tensor:
        *batch, m, n = shape
        k = min(m, n)
        u, v = torch.linalg.qr(self._randn(*batch, m, k))[0], torch.linalg.qr(self._randn(*batch, n, k))[0]
        s = {
            "random": self._randn(*batch, k),
            "gram": torch.logspace(0, -6, k, dtype=torch.float64),
            "repeated": torch.arange(k).div(3, rounding_mode="floor").double() + 1,
            "rank one": torch.eye(1, k, dtype=torch.float64)[0] if k else self._randn(0),
            "zero": torch.zeros(k, dtype=torch.float64),
        }[values].to(self.place)
        product = (u * s[..., None, :]) @ (u if symmetric else v).mT * scale
        if symmetric:
            product = (product + product.mT) / 2
        return product.to(self.device, self.dtype)


def _output(geometry: ConvGeometry, size: tuple[int, int], trailing: int) -> tuple[int, int]:
    height, width = (geometry.output_length(axis, size[axis], trailing) for axis in (0, 1))
    return height, width


def _linear(name: str, rows: int, widths: tuple[int, int, int], **options: Any) -> list[Case]:
    case = LinearCase(op="linear_moments", name=name, rows=rows, widths=widths, **options)
    return [case, replace(case, op="linear_residual")]


def _runs(name: str, rows: int, rows_per_sign: int, widths: tuple[int, int, int], **options: Any) -> list[Case]:
    options |= {"rows": rows, "rows_per_sign": rows_per_sign, "widths": widths}
    return [LinearCase(op="linear_residual", name=name, **options)]


def _conv2d(name: str, *, kernels: tuple[str, ...] = ("full", "center"), **options: Any) -> list[Case]:
    cases: list[Case] = []
    for kernel in kernels:
        case = Conv2dCase(op="conv2d_moments", name=f"{name}-{kernel}", kernel=kernel, **options)
        cases += [case, replace(case, op="conv2d_residual")]
    return cases


def _matrices(op: str, name: str, *shape: int, **options: Any) -> list[Case]:
    return [MatrixCase(op=op, name=name, shape=shape, **options)]


def _bench_conv2d(channels: int, side: int, batch: int) -> list[Case]:
    name, widths = f"{channels}ch {side}² B={batch}", (channels, channels, channels)
    options: dict[str, Any] = {
        "size": "bench",
        "dtypes": BENCH,
        "batch": batch,
        "channels": widths,
        "maps": (side, side),
    }
    alone = Conv2dCase(op="conv2d_residual", name=f"{name} one draw-full", draws=1, **options)  # as `collect` calls it
    return [*_conv2d(name, draws=16, **options), alone]


def _scaling(axis: str, value: int, **option: Any) -> Case:
    options: dict[str, Any] = {"batch": 64, "channels": (32, 32, 32), "maps": (16, 16), **option}
    name = f"{axis} = {value}"
    return Conv2dCase(op="conv2d_moments", name=name, size="scaling", dtypes=(torch.float32,), **options)


CASES: list[Case] = [
    *_linear("1 row", 1, (5, 4, 3)),
    *_linear("33 rows", 33, (63, 33, 1), x_bias=False),
    *_linear("63 rows", 63, (1, 64, 33), h_bias=False),
    *_linear("1000 rows", 1000, (33, 17, 10), dtypes=ALL),
    *_linear("no bias", 100, (16, 32, 8), x_bias=False, h_bias=False, dtypes=ALL),
    *_linear("strided", 65, (7, 9, 5), layout="strided", dtypes=ALL),
    *_linear("no rows", 0, (5, 4, 3)),
    *_linear("no columns of x", 9, (0, 4, 3)),
    *_linear("no columns of h", 9, (5, 0, 3), h_bias=False),
    *_linear("no columns of v", 9, (5, 4, 0)),
    *_linear("no draws", 33, (5, 4, 3), draws=0),
    *_runs("runs", 91, 7, (33, 17, 18), dtypes=ALL),
    *_runs("strided runs", 100, 8, (5, 4, 3), layout="strided", h_bias=False, draws=9),
    *_runs("a run that ends early", 200, 64, (17, 33, 10), draws=17),
    *_runs("a run beyond the rows", 5, 8, (5, 4, 3), x_bias=False),
    *_runs("no rows in runs", 0, 3, (5, 4, 3)),
    *_runs("runs without draws", 9, 3, (5, 4, 3), draws=0),
    *_conv2d("3×3", dtypes=ALL),
    *_conv2d("3×3 no bias", x_bias=False, h_bias=False),
    *_conv2d("3×3 x bias", h_bias=False),
    *_conv2d("3×3 channels_last", layout="channels_last", dtypes=ALL),
    *_conv2d("3×3 strided", layout="strided"),
    *_conv2d("1×1 rows first", producer=ConvGeometry(1), consumer=ConvGeometry(1), layout="rows first"),
    *_conv2d("valid", producer=ConvGeometry(3), consumer=ConvGeometry(3)),
    *_conv2d("5×5", producer=ConvGeometry(5, 1, 2), consumer=ConvGeometry(5, 1, 2)),
    *_conv2d("1×1", producer=ConvGeometry(1), consumer=ConvGeometry(1)),
    *_conv2d("3×3 then 1×1", consumer=ConvGeometry(1)),
    *_conv2d("stride 2", producer=ConvGeometry(3, 2, 1), consumer=ConvGeometry(3, 2, 1), maps=(13, 14)),
    *_conv2d("consumer stride 2", consumer=ConvGeometry(3, 2, 1), dtypes=ALL),
    *_conv2d("stride beyond kernel", producer=ConvGeometry(2, 3), consumer=ConvGeometry(1, 2), maps=(17, 11)),
    *_conv2d("1×1 stride 3 padding 2", producer=ConvGeometry(1, 3, 2), consumer=ConvGeometry(1, 3, 2)),
    *_conv2d("1×1 map", maps=(1, 1), producer=ConvGeometry(1, 10, 2), consumer=ConvGeometry(3, 5, 2)),
    *_conv2d("dilation 2", producer=ConvGeometry(3, 1, 2, 2), consumer=ConvGeometry(3, 1, 2, 2)),
    *_conv2d("stride, dilation", producer=ConvGeometry(2, 2, 1, 3), consumer=ConvGeometry(3, 2, 3, 2), maps=(11, 9)),
    *_conv2d("2×2 same", producer=ConvGeometry(2), consumer=ConvGeometry(2), trailing=(1, 1)),
    *_conv2d("4×4 same", producer=ConvGeometry(4, 1, 1), consumer=ConvGeometry(4, 1, 1), trailing=(1, 1)),
    *_conv2d("4×4", producer=ConvGeometry(4, 1, 1), consumer=ConvGeometry(4, 2, 1)),
    *_conv2d(
        "nothing square",
        producer=ConvGeometry((3, 2), (1, 2), (1, 0), (2, 1)),
        consumer=ConvGeometry((1, 4), (2, 1), (0, 2), (1, 2)),
        maps=(9, 15),
        channels=(2, 3, 4),
    ),
    *_conv2d("wide padding", producer=ConvGeometry(3, 1, 4), consumer=ConvGeometry(3, 1, 5), maps=(3, 2)),
    *_conv2d("taps beyond the map", producer=ConvGeometry(1), consumer=ConvGeometry(9, 1, 5), maps=(2, 1)),
    *_conv2d("whole map", consumer=ConvGeometry((7, 6)), kernels=("full",)),
    *_conv2d("centre beyond x", producer=ConvGeometry(1, 1, 3), consumer=ConvGeometry(2, 1, 0, 7), maps=(2, 2)),
    *_conv2d("one image", batch=1, channels=(1, 1, 1)),
    *_conv2d("no images", batch=0),
    *_conv2d("no channels of x", channels=(0, 4, 2)),
    *_conv2d("no channels of h", channels=(3, 0, 2), h_bias=False),
    *_conv2d("no channels of v", channels=(3, 4, 0)),
    *_conv2d("no draws", draws=0),
    Conv2dCase(op="conv2d_residual", name="one draw-full", draws=1),
    Conv2dCase(op="conv2d_residual", name="one draw-center", draws=1, kernel="center"),
    LinearCase(op="linear_residual", name="one draw", rows=65, widths=(33, 17, 10), draws=1),
    LinearCase(op="linear_residual", name="one draw of runs", rows=91, widths=(16, 17, 18), draws=1, rows_per_sign=7),
    *_linear("FFN 768", 8192, (768, 3072, 768), size="bench", dtypes=BENCH, draws=16),
    *_linear("FFN 1024", 16384, (1024, 4096, 1024), size="bench", dtypes=BENCH, draws=16),
    *(
        case
        for width in (16, 32, 64, 128, 256)
        for case in _linear(f"width {width}", 4096, (width, width, width), size="bench", dtypes=BENCH, draws=16)
    ),
    *_runs("FFN 768 in runs of 16", 8192, 16, (768, 3072, 768), size="bench", dtypes=BENCH, draws=16),
    *_runs("width 256 in runs of 8", 4096, 8, (256, 256, 256), size="bench", dtypes=BENCH, draws=16),
    *_bench_conv2d(8, 32, 256),
    *_bench_conv2d(16, 32, 256),
    *_bench_conv2d(64, 32, 128),
    *_bench_conv2d(128, 16, 128),
    *_bench_conv2d(256, 8, 128),
    *_bench_conv2d(512, 4, 128),
    *(
        case
        for name, producer, consumer in (
            ("3×3 stride 2 then 3×3", ConvGeometry(3, 2, 1), ConvGeometry(3, 1, 1)),
            ("3×3 then 3×3 stride 2", ConvGeometry(3, 1, 1), ConvGeometry(3, 2, 1)),
            ("5×5", ConvGeometry(5, 1, 2), ConvGeometry(5, 1, 2)),
            ("1×1", ConvGeometry(1), ConvGeometry(1)),
            ("dilation 2", ConvGeometry(3, 1, 2, 2), ConvGeometry(3, 1, 2, 2)),
        )
        for case in _conv2d(
            f"{name} 32ch 32² B=64",
            kernels=("full",),
            size="bench",
            dtypes=BENCH,
            batch=64,
            channels=(32, 32, 32),
            maps=(32, 32),
            producer=producer,
            consumer=consumer,
            draws=16,
        )
    ),
    *(_scaling("images", n, batch=n) for n in (4, 16, 64, 256, 1024)),
    *(_scaling("channels", n, channels=(n, n, n)) for n in (4, 8, 16, 32, 64, 128)),
    *(_scaling("side", n, maps=(n, n)) for n in (4, 8, 16, 32, 64)),
    *_matrices("eigh", "1×1", 4, 1, 1),
    *_matrices("eigh", "2×2", 2, 2),
    *_matrices("eigh", "33", 5, 33, 33),
    *_matrices("eigh", "63 batched twice", 2, 3, 63, 63),
    *_matrices("eigh", "100", 2, 100, 100),
    *_matrices("eigh", "gram", 3, 33, 33, values="gram"),
    *_matrices("eigh", "repeated", 3, 32, 32, values="repeated"),
    *_matrices("eigh", "rank one", 3, 17, 17, values="rank one"),
    *_matrices("eigh", "zero", 2, 8, 8, values="zero"),
    *_matrices("eigh", "tiny", 3, 16, 16, scale=1e-15),
    *_matrices("eigh", "huge", 3, 16, 16, scale=1e15),
    *_matrices("eigh", "0×0", 3, 0, 0),
    *_matrices("eigh", "no matrices", 0, 5, 5),
    *_matrices("svd", "1×1", 4, 1, 1),
    *_matrices("svd", "tall", 3, 63, 33),
    *_matrices("svd", "wide", 2, 2, 17, 40),
    *_matrices("svd", "square", 33, 33),
    *_matrices("svd", "gram", 3, 33, 20, values="gram"),
    *_matrices("svd", "repeated", 3, 32, 40, values="repeated"),
    *_matrices("svd", "rank one", 3, 17, 9, values="rank one"),
    *_matrices("svd", "zero", 2, 8, 5, values="zero"),
    *_matrices("svd", "tiny", 3, 16, 12, scale=1e-15),
    *_matrices("svd", "huge", 3, 12, 16, scale=1e15),
    *_matrices("svd", "no columns", 3, 5, 0),
    *_matrices("svd", "no matrices", 0, 5, 4),
    *_matrices("eigh", "1000×8²", 1000, 8, 8, size="bench"),
    *_matrices("eigh", "1000×16²", 1000, 16, 16, size="bench"),
    *_matrices("eigh", "128×33²", 128, 33, 33, size="bench"),
    *_matrices("eigh", "128×64²", 128, 64, 64, size="bench"),
    *_matrices("eigh", "500×100²", 500, 100, 100, size="bench"),
    *_matrices("eigh", "128×128²", 128, 128, 128, size="bench"),
    *_matrices("svd", "1000×16×8", 1000, 16, 8, size="bench"),
    *_matrices("svd", "128×64×33", 128, 64, 33, size="bench"),
    *_matrices("svd", "128×100×64", 128, 100, 64, size="bench"),
]


def cases(*names: str, size: str = "test") -> list[Case]:
    """Rows of the table for the given ops."""
    return [case for case in CASES if case.op in names and case.size == size]


def device_of(backend: str) -> str:
    """Where tests run a backend: on the CPU if it can."""
    return "cpu" if "cpu" in DEVICES.get(backend, ("cpu",)) else "cuda"


def to_double(call: Call) -> Call:
    """The same arguments in float64."""

    def convert(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) else value

    positional, named = call
    return tuple(map(convert, positional)), {name: convert(value) for name, value in named.items()}


def error(out: Tensor, ref: Tensor) -> float:
    """‖out − ref‖/‖ref‖; infinite where out is not finite or of another shape, absolute where ref is zero."""
    if out.shape != ref.shape or not torch.isfinite(out).all():
        return float("inf")
    norm = ref.norm().item() if ref.numel() else 0.0
    return (out.double() - ref).norm().item() / (norm or 1.0)
