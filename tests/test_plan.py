"""The plan of the GPU kernels, carried out by einsum, against the reference; and what it saves."""

import collections
import heapq
import math
import types

import pytest
import torch
from cases import Conv2dCase, cases, error
from no_kernels import NoKernels
from torch import Tensor

from growkern.backend import use_backend
from growkern.ops import ConvGeometry
from growkern.ops.moments import Call, Residual, gpu, group, triton
from growkern.ops.moments.plan import ONES, Piece, Plan, Product, conv2d_plan, linear_plan
from growkern.ops.moments.rows import is_far, read_by
from growkern.ops.moments.schedule import Tiles, bucket, schedule
from growkern.ops.moments.tiles import choose


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


def operands(case: Conv2dCase, x: Tensor, h: Tensor, v: Tensor) -> list[Tensor]:
    return [x, read_by(case.consumer, h, v), v]


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
    out = carried_out(planned(case, *maps), operands(case, *maps))
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


@pytest.mark.parametrize("tiles", [Tiles(32, 32, 32), Tiles(64, 16, 32)])
@pytest.mark.parametrize(
    ("images", "draws", "runs"), [((50,), 1, None), ((50, 7), 3, None), ((5,), 2, (1,)), ((50, 7), 3, (1, 3))]
)
@pytest.mark.parametrize("processors", [1, 132])
def test_a_schedule_covers_every_position_of_every_tile_once(images, draws, runs, processors, tiles):
    same = ConvGeometry(3, 1, 1)
    plan = conv2d_plan((40, 20, 70), ((9, 8),) * 3, same, same, False, True, True)
    plans = (plan, linear_plan((33, 3, 17), True, False))[: len(images)]
    table = schedule(plans, images, draws, runs, tiles, processors, 2**40, torch.device("cpu"))
    items_of = collections.defaultdict(list)
    for number, *item in table.items.tolist():
        items_of[number].append(tuple(item))
    products = [
        (each, number, n, run)
        for each, n, run in zip(plans, images, runs or (None,) * len(plans), strict=True)
        for number in range(len(each.products))
    ]
    written = []
    for number, (owner, local, n, run) in enumerate(products * (1 if runs else draws)):
        product, (u, v) = owner.products[local], owner.extent(local)
        row = table.products[number].tolist()
        length, target, stride, draw, symmetric = *row[6:9], *row[17:19]
        area = product.rows.length * product.columns.length
        positions = n * area
        assert run is None or length == run * area
        assert draw == number // len(products)
        splits = -(-positions // length)
        grid = {
            (i, j, split)
            for i in range(-(-u // tiles.block_m))
            for j in range(-(-v // tiles.block_n))
            for split in range(splits)
            if i <= j or not symmetric
        }
        assert not (symmetric and tiles.block_m != tiles.block_n)
        assert len(items_of[number]) == len(grid)
        assert set(items_of[number]) == grid
        written += [(target + split * stride, u * v) for split in range(splits)]
    # Sums of different splits, products and draws never meet, and leave no gap.
    end, first_of_second = 0, sum(math.prod(plan.extent(number)) for number in range(len(plan.products)))
    for _, target, size, _, chunk, owner in table.sums.tolist():
        if not chunk:
            written += [(target + draw * table.slots, size) for draw in range(draws if runs else 1)]
            assert (target % table.slots >= first_of_second) == bool(owner)
    for start, size in sorted(written):
        assert start == end
        end += size
    assert end == table.elements


def test_a_consumer_of_the_whole_map_has_one_product_of_its_patches():
    plan = conv2d_plan((4, 8, 10), ((16, 16), (16, 16), (1, 1)), ConvGeometry(1), ConvGeometry(16), True, True, True)
    assert plan.channels == (4, 8 * 256, 10, 1)
    assert len(plan.products) < 2 * 256 + 10  # x at every pixel with v, and no pairs of pixels


def test_batches_of_about_one_size_share_their_tables():
    sizes = [bucket(images) for images in range(1, 5000)]
    assert all(images <= size <= 1 + images * 17 / 16 for images, size in enumerate(sizes, 1))
    assert sizes[:32] == list(range(1, 33))
    assert len({bucket(images) for images in range(3900, 4100)}) == 3


def test_a_batch_a_little_longer_makes_no_tables_anew():
    engine = NoKernels()
    for rows, made in ((4000, True), (3969, False), (4096, False), (4097, True)):
        x, h, v = (torch.empty(rows, width) for width in (31, 33, 17))
        calls = [Call(x, h, v), Call(h, v, x, x_bias=True)]
        residuals = [Residual(call, torch.empty(call.v.shape[1], call.h.shape[1])) for call in calls]
        for run in (
            lambda: gpu.moments(engine, calls[0]),  # noqa: B023
            lambda: group.grouped_moments(engine, calls),  # noqa: B023
            lambda: group.grouped_residuals(engine, residuals),  # noqa: B023
        ):
            before = schedule.cache_info().misses
            run()
            assert schedule.cache_info().misses == before + made


@pytest.mark.parametrize("precision", ["ieee", "tf32", "half"])
@pytest.mark.parametrize(("channels", "side", "images"), [(16, 32, 256), (64, 32, 128), (128, 16, 128), (256, 8, 128)])
def test_launches_end_on_all_multiprocessors_at_about_the_same_time(channels, side, images, precision):
    """Programs go to places on 132 multiprocessors as these become free, in the order of the table."""
    same = ConvGeometry(3, 1, 1)
    plan = conv2d_plan((channels,) * 3, ((side, side),) * 3, same, same, True, True, True)
    tiles = choose(("", "capability 9"), "map", precision, channels)
    table = schedule((plan,), (images,), 1, None, tiles, 132, 2**40, torch.device("cpu"))
    for launch in table.launches:
        number, _, _, split = launch.items.long().T
        length = table.products[number, 6]
        positions = torch.minimum(length, images * table.products[number, 4] - split * length)
        busy = [0] * (132 * tiles.programs * tiles.warps // launch.warps)
        for taken in positions.tolist():
            heapq.heapreplace(busy, busy[0] + taken)
        assert sum(busy) >= 0.85 * max(busy) * len(busy)


def test_partial_sums_stay_within_their_share_of_memory():
    plan = conv2d_plan((64, 64, 64), ((1, 1),) * 3, ConvGeometry(1), ConvGeometry(1), False, True, True)
    many = schedule((plan,), (10**6,), 1, None, Tiles(64, 64, 32), 132, 2**40, torch.device("cpu"))
    few = schedule((plan,), (10**6,), 1, None, Tiles(64, 64, 32), 132, 2**18, torch.device("cpu"))
    assert few.elements - few.slots <= 2**18 < many.elements - many.slots


@pytest.mark.parametrize("case", cases("conv2d_moments", "linear_moments", size="bench"), ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_copies_and_workspace_stay_below_one_and_a_half_times_inputs_and_results(case, precision, monkeypatch):
    """As on a GPU of 132 multiprocessors; tensors of the meta device have sizes only."""
    workspaces = []
    launches = {name: lambda *arguments: None for name in ("reduce", "assemble")}
    launches["correlate"] = lambda us, vs, out, *rest: workspaces.append((us, out))
    engine = types.SimpleNamespace(tiles=triton.tiles, **launches)
    monkeypatch.setattr(gpu, "processors_of", lambda device: 132)
    (x, h, v), named = case.arguments(torch.float32, device="meta")
    call = Call(x, h, v, **named, precision=precision)
    results = gpu.moments(engine, call)
    ((sides, workspace),) = workspaces
    copies = sum(side.data.nbytes for side, tensor in zip(sides, (x, h, v), strict=False) if tensor.ndim == 4)
    own = sum(tensor.nbytes for tensor in (x, h, v, *results))
    assert copies + workspace.nbytes <= 1.5 * own


@pytest.mark.parametrize(
    ("shape", "dtype", "far"),
    [
        ((256, 3, 1024, 1024), torch.bfloat16, True),  # eight channels once copied
        ((256, 3, 512, 512), torch.bfloat16, False),
        ((1024, 16, 512, 512), torch.float32, True),
        ((2**22, 512), torch.float32, True),
        ((2**22, 128), torch.float32, False),
    ],
)
def test_offsets_are_counted_after_copies(shape, dtype, far):
    assert is_far(torch.empty(shape, dtype=dtype, device="meta")) == far
    if shape[0] == 1024:  # one image, shown many times
        assert is_far(torch.empty(1, *shape[1:], device="meta").expand(shape))
