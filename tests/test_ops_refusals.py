"""What the moment ops and `ConvGeometry` refuse, and the geometry itself."""

import pytest
import torch

from growkern import ops
from growkern.ops import ConvGeometry

X, H, V = torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4, 1)
MAPS = {"x": torch.zeros(4, 3, 8, 8), "h": torch.zeros(4, 2, 8, 8), "v": torch.zeros(4, 1, 4, 4)}
GEOMETRY = {"producer": ConvGeometry(3, 1, 1), "consumer": ConvGeometry(3, 2, 1)}


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({"x": torch.zeros(4, 3, 1)}, ValueError, r"x: expected a \(n, features\) tensor, got \(4, 3, 1\)"),
        ({"h": torch.zeros(5, 2)}, ValueError, r"h: expected a \(4, features\) tensor, got \(5, 2\)"),
        ({"v": torch.zeros(4)}, ValueError, r"v: expected a \(4, features\) tensor, got \(4,\)"),
        ({"x": X.long()}, TypeError, "x: expected float16, bfloat16, float32 or float64, got torch.int64"),
        ({"h": H.double()}, TypeError, "h: expected torch.float32 like x, got torch.float64"),
        ({"v": V.bfloat16()}, TypeError, "v: expected torch.float32 like x, got torch.bfloat16"),
        ({"v": V.to("meta")}, ValueError, "v: expected a tensor on cpu like x, got one on meta"),
        ({"precision": "fp32"}, ValueError, "precision: expected 'ieee' or 'tf32', got 'fp32'"),
    ],
)
def test_linear_refusals(change, error_type, message):
    arguments = {"x": X, "h": H, "v": V, **change}
    with pytest.raises(error_type, match=message):
        ops.linear_moments(**arguments)
    with pytest.raises(error_type, match=message):
        ops.linear_residual(**arguments, update=torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({"x": MAPS["x"][0]}, ValueError, r"x: expected a \(n, C, H, W\) tensor, got \(3, 8, 8\)"),
        ({"h": torch.zeros(3, 2, 8, 8)}, ValueError, r"h: expected a \(4, C, H, W\) tensor, got \(3, 2, 8, 8\)"),
        (
            {"h": torch.zeros(4, 2, 7, 8)},
            ValueError,
            r"h: expected as many rows as producer makes of 8 \(8 or 9\), got \(4, 2, 7, 8\)",
        ),
        (
            {"v": torch.zeros(4, 1, 4, 6)},
            ValueError,
            r"v: expected as many columns as consumer makes of 8 \(4 or 5\), got \(4, 1, 4, 6\)",
        ),
        ({"consumer": ConvGeometry(9), "v": torch.zeros(4, 1, 0, 0)}, ValueError, r"makes of 8 \(1\), got"),
        ({"consumer": ConvGeometry(12)}, ValueError, r"v: .* consumer makes of 8 \(none: too few\)"),
        ({"h": MAPS["h"].half()}, TypeError, "h: expected torch.float32 like x, got torch.float16"),
        ({"h": MAPS["h"].to("meta")}, ValueError, "h: expected a tensor on cpu like x, got one on meta"),
        ({"kernel": "centre"}, ValueError, "kernel: expected 'full' or 'center', got 'centre'"),
        ({"precision": "high"}, ValueError, "precision: expected 'ieee' or 'tf32', got 'high'"),
        ({"producer": (3, 1, 1, 1)}, TypeError, "producer: expected a ConvGeometry, got tuple"),
        ({"consumer": 3}, TypeError, "consumer: expected a ConvGeometry, got int"),
    ],
)
def test_conv2d_refusals(change, error_type, message):
    arguments = {**MAPS, **GEOMETRY, **change}
    with pytest.raises(error_type, match=message):
        ops.conv2d_moments(**arguments)
    with pytest.raises(error_type, match=message):
        ops.conv2d_residual(**arguments, update=torch.zeros(1, 18))


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({"update": torch.zeros(1, 18)}, ValueError, r"update: expected a \(1, 19\) tensor, got \(1, 18\)"),
        ({"update": torch.zeros(19)}, ValueError, r"update: expected a \(1, 19\) tensor, got \(19,\)"),
        ({"update": torch.zeros(1, 19).half()}, TypeError, "update: expected float32 or float64, got torch.float16"),
        ({"update": torch.zeros(1, 19, device="meta")}, ValueError, "update: expected a tensor on cpu like x"),
        ({"signs": torch.ones(4)}, ValueError, r"signs: expected a \(draws, 4\) tensor, got \(4,\)"),
        ({"signs": torch.ones(4, 3)}, ValueError, r"signs: expected a \(draws, 4\) tensor, got \(4, 3\)"),
        ({"signs": torch.ones(3, 4).long()}, TypeError, "signs: expected a floating-point dtype, got torch.int64"),
        ({"signs": torch.ones(3, 4, device="meta")}, ValueError, "signs: expected a tensor on cpu like x"),
    ],
)
def test_residual_refusals(change, error_type, message):
    with pytest.raises(error_type, match=message):
        ops.conv2d_residual(**{**MAPS, **GEOMETRY, "update": torch.zeros(1, 19), **change}, h_bias=True)
    linear = {"x": X, "h": torch.zeros(4, 18), "v": V, "update": torch.zeros(1, 19), **change}
    with pytest.raises(error_type, match=message):
        ops.linear_residual(**linear, h_bias=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_per_sign": 0}, "rows_per_sign: expected an integer of at least 1, got 0"),
        ({"rows_per_sign": 3}, r"signs: expected a \(draws, 2\) tensor, got \(3, 4\)"),
    ],
)
def test_refusals_of_runs(change, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_residual(X, V, V, torch.zeros(1, 1), **{"signs": torch.ones(3, 4), **change})


def test_geometry_keeps_pairs():
    geometry = ConvGeometry(3, (1, 2), padding=[0, 1])
    assert geometry == ConvGeometry((3, 3), (1, 2), (0, 1), 1)
    assert (geometry.kernel_size, geometry.stride) == ((3, 3), (1, 2))
    assert (geometry.padding, geometry.dilation) == ((0, 1), (1, 1))
    assert geometry.taps == 9
    assert len({geometry, ConvGeometry((3, 3), (1, 2), (0, 1), 1)}) == 1
    with pytest.raises(AttributeError):
        geometry.stride = (1, 1)


@pytest.mark.parametrize("arguments", [(3, 1, 1), ((2, 5), (3, 1), (0, 4), (2, 3)), (1, 4, 3), ((7, 13),)])
def test_output_size_is_that_of_conv2d(arguments):
    geometry = ConvGeometry(*arguments)
    out = torch.nn.Conv2d(1, 1, *(list(getattr(geometry, n)) for n in ("kernel_size", "stride", "padding", "dilation")))
    assert geometry.output_size(7, 13) == tuple(out(torch.zeros(1, 1, 7, 13)).shape[2:])


@pytest.mark.parametrize(
    ("arguments", "error_type", "message"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size: expected at least 1, got 0"),
        ({"kernel_size": 3, "stride": (1, 0)}, ValueError, r"stride: expected at least 1, got \(1, 0\)"),
        ({"kernel_size": 3, "dilation": -1}, ValueError, "dilation: expected at least 1, got -1"),
        ({"kernel_size": 3, "padding": -1}, ValueError, "padding: expected at least 0, got -1"),
        ({"kernel_size": 3, "padding": "same"}, TypeError, "padding: expected an int or a pair of ints, got 'same'"),
        ({"kernel_size": (3, 3, 3)}, TypeError, r"kernel_size: expected an int or a pair of ints, got \(3, 3, 3\)"),
        ({"kernel_size": 2.0}, TypeError, "kernel_size: expected an int or a pair of ints, got 2.0"),
    ],
)
def test_geometry_refuses_nonsense(arguments, error_type, message):
    with pytest.raises(error_type, match=message):
        ConvGeometry(**arguments)
