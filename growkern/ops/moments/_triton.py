"""Triton kernels of the second moments; `triton` launches them."""

import triton
import triton.language as tl

# Sizes that vary from site to site, and need no kernel each.
SIZES = ("x_pitch", "h_pitch", "v_pitch", "x_channels", "h_channels", "v_channels", "images")
SUBTRACT_SIZES = (
    *("h_pitch", "v_pitch", "weight_pitch", "out_pitch", "positions", "area", "columns", "channels", "targets"),
    *("map_rows", "map_columns", "kernel_columns", "row_stride", "column_stride", "row_padding", "column_padding"),
    *("row_step", "column_step", "taps"),
)


@triton.jit
def _pick(index, x, h, v, ones):
    chosen = ones
    if index == 0:
        chosen = x
    if index == 1:
        chosen = h
    if index == 2:
        chosen = v
    return chosen


@triton.jit
def _rows(pointer, pixel, pitch, channel, channels, valid):
    """Load a tile of activations, (positions, channels), with zeros outside."""
    mask = valid[:, None] & (channel < channels)[None, :]
    return tl.load(pointer + pixel[:, None] * pitch + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _columns(pointer, pixel, pitch, channel, channels, valid):
    """Load the same as (channels, positions): with `tl.trans` Triton would copy 4 bytes at a time, not 16."""
    mask = valid[None, :] & (channel < channels)[:, None]
    return tl.load(pointer + pixel[None, :] * pitch + channel[:, None], mask=mask, other=0.0)


@triton.jit
def _row_of(table, count, program, FIELDS: tl.constexpr):
    """Find the row of a table that a program belongs to: the last one whose first program is not after it."""
    row, after = 0, count
    while after - row > 1:
        middle = (row + after) // 2
        if tl.load(table + middle * FIELDS) <= program:
            row = middle
        else:
            after = middle
    return table + row * FIELDS


@triton.jit
def _source(table, like, ALIGN: tl.constexpr):
    """Read where a source lies, its pitch, its channels and how many images it has."""
    pointer = tl.multiple_of(tl.load(table).to(like.dtype), 16 if ALIGN > 1 else 1)
    return pointer, tl.load(table + 1) * ALIGN, tl.load(table + 2).to(tl.int32) * ALIGN, tl.load(table + 3)


@triton.jit(do_not_specialize=SIZES)
def correlate_kernel(
    ux, uh, uv, u_ones, vx, vh, vv, v_ones,
    x_pitch, h_pitch, v_pitch, x_channels, h_channels, v_channels, images,
    out, products, signs, samples, sources, draws, items,
    ALIGN: tl.constexpr, GROUPED: tl.constexpr, MATRIX: tl.constexpr, WIDE: tl.constexpr, SIGNED: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, CHAIN: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHIFTS: tl.constexpr,
):  # fmt: skip
    """Sum u(k) v(k)ᵀ over k for one tile of a product over one range of positions; or of products at several shifts.

    Then the tiles of v lie side by side, each one pixel further, and those of u are read once for all.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    item = items + 4 * tl.program_id(0)
    product = products + tl.load(item) * FIELDS
    tile_m, tile_n, split = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    u, v = tl.load(product), tl.load(product + 1)
    m_size, n_size = tl.load(product + 2).to(tl.int32), tl.load(product + 3).to(tl.int32)
    area, columns = tl.load(product + 4).to(index), tl.load(product + 5).to(index)
    length = tl.load(product + 6).to(index)
    u_base, u_row = tl.load(product + 9).to(index), tl.load(product + 10).to(index)
    u_column, u_pixels = tl.load(product + 11).to(index), tl.load(product + 12).to(index)
    v_base, v_row = tl.load(product + 13).to(index), tl.load(product + 14).to(index)
    v_column, v_pixels = tl.load(product + 15).to(index), tl.load(product + 16).to(index)
    draw = tl.load(product + 17)

    # Pitches and channels come in units of ALIGN, so that the compiler knows which loads are 16 bytes wide.
    if GROUPED:
        u_pointer, u_pitch, u_channels, images = _source(sources + 4 * u, ux, ALIGN)
        v_pointer, v_pitch, v_channels, _ = _source(sources + 4 * v, vx, ALIGN)
        u_pitch, v_pitch = u_pitch.to(index), v_pitch.to(index)
        drawn = draws + u // 4 * 3  # four sources for each site
        if SIGNED:
            sign = tl.load(drawn).to(signs.dtype) + (draw - 1) * tl.load(drawn + 1)
    else:
        sign = signs + (draw - 1) * samples
        u_pointer, v_pointer = _pick(u, ux, uh, uv, u_ones), _pick(v, vx, vh, vv, v_ones)
        u_pitch = _pick(u, x_pitch, h_pitch, v_pitch, 1).to(index) * ALIGN
        v_pitch = _pick(v, x_pitch, h_pitch, v_pitch, 1).to(index) * ALIGN
        u_channels = _pick(u, x_channels, h_channels, v_channels, 1) * ALIGN
        v_channels = _pick(v, x_channels, h_channels, v_channels, 1) * ALIGN

    first = split.to(index) * length
    last = tl.minimum(images.to(index) * area, first + length)
    across = tl.arange(0, BLOCK_N * SHIFTS)
    shift, n = across // BLOCK_N, tile_n * BLOCK_N + across % BLOCK_N
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column, last_column = tl.load(product + 19).to(index), tl.load(product + 20).to(index)
    total = tl.zeros((BLOCK_M, BLOCK_N * SHIFTS), tl.float32)
    # Tensor cores drop low bits when they add up: sums restart after every chain.
    reach = BLOCK_K * CHAIN if CHAIN else tl.maximum(last - first, 1)  # no step of nothing
    for chain in range(first, last, reach):
        part = tl.zeros((BLOCK_M, BLOCK_N * SHIFTS), tl.float32)
        for start in range(chain, tl.minimum(last, chain + reach), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            valid = k < last
            if MATRIX:
                image = k
                u_pixel, v_pixel = u_base + k * u_pixels, v_base + k * v_pixels
            else:
                image = k // area
                rest = k - image * area
                row = rest // columns
                column = rest - row * columns
                u_pixel = u_base + image * u_pixels + row * u_row + column * u_column
                v_pixel = v_base + image * v_pixels + row * v_row + column * v_column
            a = _columns(u_pointer, u_pixel, u_pitch, m, u_channels, valid).to(OPERAND)
            if SHIFTS > 1:
                place = first_column + column[:, None] + shift[None, :]
                there = valid[:, None] & (place >= 0) & (place < last_column) & (n < v_channels)[None, :]
                pixels = v_pixel[:, None] + shift[None, :]
                b = tl.load(v_pointer + pixels * v_pitch + n[None, :], mask=there, other=0.0).to(OPERAND)
            else:
                b = _rows(v_pointer, v_pixel, v_pitch, n, v_channels, valid).to(OPERAND)
            if SIGNED:
                b *= tl.load(sign + image, mask=valid, other=0.0)[:, None].to(OPERAND)
            if PRECISION == "tf32" and OPERAND == tl.float32:
                # Tensor cores take float32 along positions only. Through registers the tiles are turned in shared
                # memory; straight into it they would come 4 bytes at a time.
                a += 0.0
                b += 0.0
            if CHAIN:
                part = tl.dot(a, b, part, input_precision=PRECISION)
            else:
                total = tl.dot(a, b, total, input_precision=PRECISION)
        total += part

    target = out + tl.load(product + 7) + split.to(tl.int64) * tl.load(product + 8)
    inside = (m < m_size)[:, None] & (n < n_size)[None, :]
    if SHIFTS > 1:
        targets = target + (shift.to(tl.int64) * tl.load(product + 21) + n)[None, :]
        tl.store(targets + m.to(tl.int64)[:, None] * n_size, total, mask=inside)
    else:
        tl.store(target + m.to(tl.int64)[:, None] * n_size + n[None, :], total, mask=inside)
        if (tl.load(product + 18) != 0) & (tile_m != tile_n):  # a symmetric product has no tiles below the diagonal
            below = (n < n_size)[:, None] & (m < m_size)[None, :]
            tl.store(target + n.to(tl.int64)[:, None] * n_size + m[None, :], tl.trans(total), mask=below)


@triton.jit
def reduce_kernel(buffer, sums, BLOCK: tl.constexpr):
    """Add up the splits of a product, always in the same order."""
    task = sums + 6 * tl.program_id(0)
    source, target, size = tl.load(task), tl.load(task + 1), tl.load(task + 2)
    splits, chunk = tl.load(task + 3), tl.load(task + 4)
    element = chunk * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(buffer + source + split * size + element, mask=element < size, other=0.0)
    tl.store(buffer + target + element, total, mask=element < size)


@triton.jit(do_not_specialize=("stride", "samples", "draws", "slots"))
def combine_kernel(
    buffer, sums, signs, stride, samples, table, draws, slots,
    GROUPED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, DRAWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the splits of a product as they are, draw 0, and under every draw of their signs."""
    task = sums + 6 * tl.program_id(0)
    source, target, size, chunk = tl.load(task), tl.load(task + 1), tl.load(task + 2), tl.load(task + 4)
    sign = signs
    if GROUPED:
        row = table + 3 * tl.load(task + 5)
        sign, stride, samples = tl.load(row).to(signs.dtype), tl.load(row + 1), tl.load(row + 2).to(tl.int32)
    draw = tl.program_id(1) * DRAWS + tl.arange(0, DRAWS)
    element = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = (element < size)[None, :]
    total = tl.zeros((DRAWS, BLOCK), tl.float32)
    for start in range(0, samples, 32):
        split = start + tl.arange(0, 32)
        drawn = ((draw > 0) & (draw < draws))[:, None] & (split < samples)[None, :]
        factor = tl.load(sign + (draw - 1)[:, None] * stride + split[None, :], mask=drawn, other=1.0)
        live = (split < samples)[:, None] & inside
        values = tl.load(buffer + source + split[:, None] * size + element[None, :], mask=live, other=0.0)
        total = tl.dot(factor, values, total, input_precision=PRECISION)
    targets = buffer + target + draw[:, None].to(tl.int64) * slots + element[None, :]
    mask = (draw < draws)[:, None] & inside
    if ADD:
        total += tl.load(targets, mask=mask, other=0.0)
    tl.store(targets, total, mask=mask)


@triton.jit(do_not_specialize=("slots_size", "count"))
def assemble_kernel(
    slots, slots_size, out0, out1, out2, out3, out4, out5, results, regions, starts, terms, weights, count,
    GROUPED: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of a region of a result: every element is a weighted sum over the terms of its pair of taps."""
    program, draw = tl.program_id(0), tl.program_id(1).to(tl.int64)
    region = _row_of(regions, count, program, FIELDS)
    tile = program - tl.load(region)
    result, corner, pitch = tl.load(region + 1), tl.load(region + 2), tl.load(region + 3)
    height, u_taps = tl.load(region + 4), tl.load(region + 5)
    width, v_taps = tl.load(region + 6), tl.load(region + 7)
    first_block, most = tl.load(region + 8), tl.load(region + 9)
    across = tl.cdiv(width, COLUMNS)
    i = tile // across * ROWS + tl.arange(0, ROWS)
    j = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < height)[:, None] & (j < width)[None, :]
    block = first_block + (i % u_taps)[:, None] * v_taps + (j % v_taps)[None, :]
    channel_u, channel_v = (i // u_taps)[:, None], (j // v_taps)[None, :]
    begin = tl.load(starts + block, mask=inside, other=0)
    end = tl.load(starts + block + 1, mask=inside, other=0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for number in range(most):
        term = begin + number
        live = term < end
        slot = tl.load(terms + 3 * term, mask=live, other=0)
        u_step = tl.load(terms + 3 * term + 1, mask=live, other=0)
        v_step = tl.load(terms + 3 * term + 2, mask=live, other=0)
        weight = tl.load(weights + term, mask=live, other=0.0)
        address = slots + draw * slots_size + slot + channel_u * u_step + channel_v * v_step
        total += weight * tl.load(address, mask=live, other=0.0)
    if GROUPED:
        target = tl.load(results + result).to(out0.dtype)
    else:
        target = _result(result, out0, out1, out2, out3, out4, out5)
    target += draw * tl.load(region + 10) + corner
    tl.store(target + i.to(tl.int64)[:, None] * pitch + j[None, :], total, mask=inside)


@triton.jit
def _result(index, out0, out1, out2, out3, out4, out5):
    chosen = out0
    if index == 1:
        chosen = out1
    if index == 2:
        chosen = out2
    if index == 3:
        chosen = out3
    if index == 4:
        chosen = out4
    if index == 5:
        chosen = out5
    return chosen


@triton.jit(do_not_specialize=("count",))
def pack_kernel(
    copies, count, source_like, target_like,
    FIELDS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Copy one tile of some map to rows of channels, zeros up to whole 16 bytes; types are those of two anchors."""
    program = tl.program_id(0)
    copy = _row_of(copies, count, program, FIELDS)
    tile = program - tl.load(copy)
    source, target = tl.load(copy + 1).to(source_like.dtype), tl.load(copy + 2).to(target_like.dtype)
    pixels, channels, pitch = tl.load(copy + 3), tl.load(copy + 4), tl.load(copy + 5)
    area, width = tl.load(copy + 6), tl.load(copy + 7)
    across = tl.cdiv(pitch, CHANNELS)
    pixel = tile // across * PIXELS + tl.arange(0, PIXELS)
    channel = tile % across * CHANNELS + tl.arange(0, CHANNELS)
    image, rest = pixel // area, pixel % area
    place = image * tl.load(copy + 8) + rest // width * tl.load(copy + 10) + rest % width * tl.load(copy + 11)
    inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    values = tl.load(source + channel[:, None] * tl.load(copy + 9) + place[None, :], mask=inside, other=0.0)
    inside = (pixel < pixels)[:, None] & (channel < pitch)[None, :]
    values = tl.trans(values.to(target_like.dtype.element_ty))
    tl.store(target + pixel[:, None] * pitch + channel[None, :], values, mask=inside)


@triton.jit(do_not_specialize=SUBTRACT_SIZES)
def subtract_kernel(
    h, h_pitch, v, v_pitch, weight, weight_pitch, out, out_pitch,
    positions, area, columns, channels, targets, map_rows, map_columns,
    kernel_columns, row_stride, column_stride, row_padding, column_padding, row_step, column_step, taps,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Form v − (weights ∗ h + bias) at a tile of positions and channels of v."""
    _subtract(
        tl.program_id(0), h, h_pitch, v, v_pitch, weight, weight_pitch, out, out_pitch,
        positions, area, columns, channels, targets, map_rows, map_columns,
        kernel_columns, row_stride, column_stride, row_padding, column_padding, row_step, column_step, taps,
        ALIGN, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=("count",))
def subtract_group_kernel(
    table, count, like, out_like,
    FIELDS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Do the same for several sites, whose arguments are rows of a table after their first program."""
    program = tl.program_id(0)
    row = _row_of(table, count, program, FIELDS)
    whole: tl.constexpr = 16 if ALIGN > 1 else 1
    h = tl.multiple_of(tl.load(row + 1).to(like.dtype), whole)
    v = tl.multiple_of(tl.load(row + 3).to(like.dtype), whole)
    weight = tl.multiple_of(tl.load(row + 5).to(out_like.dtype), 16)
    out = tl.multiple_of(tl.load(row + 7).to(out_like.dtype), 16)
    _subtract(
        program - tl.load(row).to(tl.int32), h, _size(row, 2), v, _size(row, 4), weight, _size(row, 6), out,
        _size(row, 8), _size(row, 9), _size(row, 10), _size(row, 11), _size(row, 12), _size(row, 13), _size(row, 14),
        _size(row, 15), _size(row, 16), _size(row, 17), _size(row, 18), _size(row, 19), _size(row, 20), _size(row, 21),
        _size(row, 22), _size(row, 23), ALIGN, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _size(row, number: tl.constexpr):
    return tl.load(row + number).to(tl.int32)


@triton.jit
def _subtract(
    program, h, h_pitch, v, v_pitch, weight, weight_pitch, out, out_pitch,
    positions, area, columns, channels, targets, map_rows, map_columns,
    kernel_columns, row_stride, column_stride, row_padding, column_padding, row_step, column_step, taps,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    across = tl.cdiv(targets, BLOCK_N)
    position = (program // across).to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = program % across * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = position < positions
    image = position // area
    rest = position - image * area
    row = rest // columns
    column = rest - row * columns
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h_channels = tl.cdiv(channels, ALIGN) * ALIGN  # rows of h end in zeros
    within = (target < weight_pitch * 4)[None, :]
    for tap in range(taps):
        y = row * row_stride - row_padding + tap // kernel_columns * row_step
        x = column * column_stride - column_padding + tap % kernel_columns * column_step
        read = valid & (y >= 0) & (y < map_rows) & (x >= 0) & (x < map_columns)
        pixel = (image * map_rows + y) * map_columns + x
        for start in range(0, h_channels, BLOCK_K):
            channel = start + tl.arange(0, BLOCK_K)
            a = _rows(h, pixel, h_pitch * ALIGN, channel, h_channels, read)
            w_row = (tap * channels + channel)[:, None] * (weight_pitch * 4)
            w = tl.load(weight + w_row + target[None, :], mask=(channel < channels)[:, None] & within, other=0.0)
            total = tl.dot(a.to(w.dtype), w, total, input_precision=PRECISION)
    mask = valid[:, None] & (target < targets)[None, :]
    v_pointer = v + position[:, None] * (v_pitch * ALIGN) + target[None, :]
    left = tl.load(v_pointer, mask=mask, other=0.0).to(tl.float32)
    bias = weight + taps * channels * (weight_pitch * 4)  # its last row
    left -= tl.load(bias + target, mask=target < targets, other=0.0)[None, :]
    filled = valid[:, None] & (target < out_pitch * ALIGN)[None, :]  # with zeros
    tl.store(out + position[:, None] * (out_pitch * ALIGN) + target[None, :], left - total, mask=filled)
