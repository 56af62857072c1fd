"""The plan of the GPU kernels, carried out by einsum, against the reference; and what it saves."""

import collections
import types

import pytest
import torch
from cases import Conv2dCase, cases, error
from torch import Tensor

from growkern.backend import use_backend
from growkern.ops import ConvGeometry
from growkern.ops.moments import Call, gpu, triton
from growkern.ops.moments.plan import ONES, Piece, Plan, Product, conv2d_plan
from growkern.ops.moments.schedule import Tiles, schedule


def carried_out(plan: Plan, maps: list[Tensor]) -> list[Tensor]:
    """Every product, then every region as its blocks' terms say."""
    images = [tensor.permute(0, 2, 3, 1) for tensor in maps]

    def read(product: Product, side: int) -> Tensor:
        rows, columns = product.rows, product.columns
        if product[side] == ONES:
            return images[0].new_ones(len(images[0]), rows.length, columns.length, 1)

        def positions(piece: Piece) -> list[int]:
            return [piece[side] + i * piece[2 + side] for i in range(piece.length)]

        return images[product[side]][:, positions(rows)][:, :, positions(columns)]

    products = [torch.einsum("brcm,brcn->mn", read(each, 0), read(each, 1)) for each in plan.products]
    results = [torch.full(shape, torch.nan, dtype=torch.float64) for shape in plan.shapes]
    for region in plan.regions:
        block = torch.zeros(region.u_channels, region.u_taps, region.v_channels, region.v_taps, dtype=torch.float64)
        for number, terms in enumerate(region.blocks):
            a, b = divmod(number, region.v_taps)
            for term in terms:
                product = products[term.product]
                block[:, a, :, b] += term.weight * (product.T if term.transposed else product)
        flat = block.flatten(2).flatten(0, 1)
        corner = (region.first_row, region.first_column)
        where = [slice(start, start + size) for start, size in zip(corner, flat.shape, strict=True)]
        results[region.result][where[0], where[1]] = flat
    return results


def planned(case: Conv2dCase, x: Tensor, h: Tensor, v: Tensor) -> Plan:
    channels, sizes = ([list(t.shape[part]) for t in (x, h, v)] for part in (slice(1, 2), slice(2, 4)))
    return conv2d_plan(
        tuple(c for (c,) in channels),
        tuple(map(tuple, sizes)),
        case.producer,
        case.consumer,
        case.kernel == "full",
        case.x_bias,
        case.h_bias,
    )


@pytest.mark.parametrize("case", cases("conv2d_moments"), ids=str)
def test_a_plan_carried_out_gives_the_moments(case):
    maps, named = case.arguments(torch.float64)
    with use_backend("reference"):
        expected = list(case.function(*maps, **named))
    out = carried_out(planned(case, *maps), maps)
    if case.kernel == "full":
        del expected[1]  # no xh
    assert len(out) == len(expected)
    for one, other in zip(out, expected, strict=True):
        assert error(one, other) < 1e-13


def test_taps_at_the_same_distance_share_their_correlation():
    """A 3×3 kernel at stride 1 takes 61 correlations over the map instead of 253; border strips add little."""
    same = ConvGeometry(3, 1, 1)
    plan = conv2d_plan((64, 64, 64), ((32, 32),) * 3, same, same, True, True, True)
    areas = [p.rows.length * p.columns.length for p in plan.products if ONES not in (p.u, p.v)]
    assert sum(area > 32 * 32 / 2 for area in areas) == 61
    assert sum(areas) < 61 * 32 * 32


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("processors", [1, 132])
def test_a_schedule_covers_every_position_of_every_tile_once(per_image, processors):
    same = ConvGeometry(3, 1, 1)
    plan = conv2d_plan((40, 20, 70), ((9, 8),) * 3, same, same, False, True, True)
    tiles = Tiles(32, 32, 32)
    table = schedule((plan,), (50,), 1, per_image, tiles, processors, 2**40, torch.device("cpu"))
    items_of = collections.defaultdict(list)
    for number, *item in table.items.tolist():
        items_of[number].append(tuple(item))
    for number, product in enumerate(plan.products):
        u, v = plan.extent(number)
        items = items_of[number]
        row = table.products[number].tolist()
        positions, length = row[6], row[7]
        assert positions == 50 * product.rows.length * product.columns.length
        splits = -(-positions // length)
        symmetric = row[19]
        grid = {
            (m, n, split)
            for m in range(-(-u // 32))
            for n in range(-(-v // 32))
            for split in range(splits)
            if m <= n or not symmetric
        }
        assert len(items) == len(grid)
        assert set(items) == grid
        # Sums of different splits and products never meet.
        assert row[8] + (splits - 1) * row[9] + u * v <= table.elements
        if not per_image and splits > 1:
            assert row[9] == u * v


def test_partial_sums_stay_within_their_share_of_memory():
    plan = conv2d_plan((64, 64, 64), ((1, 1),) * 3, ConvGeometry(1), ConvGeometry(1), False, True, True)
    many = schedule((plan,), (10**6,), 1, False, Tiles(64, 64, 32), 132, 2**40, torch.device("cpu"))
    few = schedule((plan,), (10**6,), 1, False, Tiles(64, 64, 32), 132, 2**18, torch.device("cpu"))
    assert few.elements - few.slots <= 2**18 < many.elements - many.slots


@pytest.mark.parametrize("case", cases("conv2d_moments", "linear_moments", size="bench"), ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_copies_and_workspace_stay_below_one_and_a_half_times_inputs_and_results(case, precision, monkeypatch):
    """As on a GPU of 132 multiprocessors; tensors of the meta device have sizes only."""
    workspaces = []
    launches = {name: lambda *arguments: None for name in ("reduce", "assemble")}
    launches["correlate"] = lambda us, vs, out, *rest: workspaces.append((us, out))
    engine = types.SimpleNamespace(tiles=triton.tiles, **launches)
    monkeypatch.setattr(gpu, "_processors", lambda device: 132)
    (x, h, v), named = case.arguments(torch.float32, device="meta")
    call = Call(x, h, v, **named, precision=precision)
    results = call.alone(engine)
    ((sides, workspace),) = workspaces
    copies = sum(side.data.nbytes for side, tensor in zip(sides, (x, h, v), strict=False) if tensor.ndim == 4)
    own = sum(tensor.nbytes for tensor in (x, h, v, *results))
    assert copies + workspace.nbytes <= 1.5 * own
