"""Triton kernels of the second moments; `triton` launches them."""

import triton
import triton.language as tl


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
def correlate_kernel(
    ux, uh, uv, u_ones, vx, vh, vv, v_ones,
    x_pitch, h_pitch, v_pitch, x_channels, h_channels, v_channels,
    out, products, items, signs, samples, sources,
    ALIGN: tl.constexpr, GROUPED: tl.constexpr, MATRIX: tl.constexpr, WIDE: tl.constexpr, SIGNED: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, CHAIN: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum u(k) v(k)ᵀ over k for one tile of a product over one range of positions."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    item = items + 4 * tl.program_id(0)
    product = products + tl.load(item) * FIELDS
    tile_m, tile_n, split = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    u, v = tl.load(product), tl.load(product + 1)
    m_size, n_size = tl.load(product + 2).to(tl.int32), tl.load(product + 3).to(tl.int32)
    area, columns = tl.load(product + 4).to(index), tl.load(product + 5).to(index)
    length = tl.load(product + 7).to(index)
    first = split.to(index) * length
    last = tl.minimum(tl.load(product + 6).to(index), first + length)
    u_base, u_row = tl.load(product + 10).to(index), tl.load(product + 11).to(index)
    u_column, u_pixels = tl.load(product + 12).to(index), tl.load(product + 13).to(index)
    v_base, v_row = tl.load(product + 14).to(index), tl.load(product + 15).to(index)
    v_column, v_pixels = tl.load(product + 16).to(index), tl.load(product + 17).to(index)
    sign = signs + tl.load(product + 18) * samples

    # Pitches and channels come in units of ALIGN, so that the compiler knows which loads are 16 bytes wide.
    if GROUPED:
        u_pointer = tl.multiple_of(tl.load(sources + 3 * u).to(ux.dtype), 16 if ALIGN > 1 else 1)
        v_pointer = tl.multiple_of(tl.load(sources + 3 * v).to(vx.dtype), 16 if ALIGN > 1 else 1)
        u_pitch = tl.load(sources + 3 * u + 1).to(index) * ALIGN
        v_pitch = tl.load(sources + 3 * v + 1).to(index) * ALIGN
        u_channels = tl.load(sources + 3 * u + 2).to(tl.int32) * ALIGN
        v_channels = tl.load(sources + 3 * v + 2).to(tl.int32) * ALIGN
    else:
        u_pointer, v_pointer = _pick(u, ux, uh, uv, u_ones), _pick(v, vx, vh, vv, v_ones)
        u_pitch = _pick(u, x_pitch, h_pitch, v_pitch, 1).to(index) * ALIGN
        v_pitch = _pick(v, x_pitch, h_pitch, v_pitch, 1).to(index) * ALIGN
        u_channels = _pick(u, x_channels, h_channels, v_channels, 1) * ALIGN
        v_channels = _pick(v, x_channels, h_channels, v_channels, 1) * ALIGN

    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Tensor cores drop low bits when they add up: sums restart after every chain.
    reach = BLOCK_K * CHAIN if CHAIN else last - first
    for chain in range(first, last, reach):
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
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

    target = out + tl.load(product + 8) + split.to(tl.int64) * tl.load(product + 9)
    inside = (m < m_size)[:, None] & (n < n_size)[None, :]
    tl.store(target + m.to(tl.int64)[:, None] * n_size + n[None, :], total, mask=inside)
    if (tl.load(product + 19) != 0) & (tile_m != tile_n):  # a symmetric product has no tiles below the diagonal
        below = (n < n_size)[:, None] & (m < m_size)[None, :]
        tl.store(target + n.to(tl.int64)[:, None] * n_size + m[None, :], tl.trans(total), mask=below)


@triton.jit
def reduce_kernel(buffer, sums, BLOCK: tl.constexpr):
    """Add up the splits of a product, always in the same order."""
    task = sums + 5 * tl.program_id(0)
    source, target, size = tl.load(task), tl.load(task + 1), tl.load(task + 2)
    splits, chunk = tl.load(task + 3), tl.load(task + 4)
    element = chunk * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(buffer + source + split * size + element, mask=element < size, other=0.0)
    tl.store(buffer + target + element, total, mask=element < size)


@triton.jit
def assemble_kernel(
    slots, slots_size, out0, out1, out2, out3, out4, out5, results, regions, starts, terms, weights, count,
    GROUPED: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of a region of a result: every element is a weighted sum over the terms of its pair of taps."""
    program, draw = tl.program_id(0), tl.program_id(1).to(tl.int64)
    region = regions
    for number in range(1, count):
        candidate = regions + number * FIELDS
        region = tl.where(tl.load(candidate) <= program, candidate, region)
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


@triton.jit
def pack_kernel(
    copies, count, anchor, FIELDS: tl.constexpr, COUNT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Copy one tile of some map to rows of channels, zeros up to whole 16 bytes; types are those of the anchor."""
    program = tl.program_id(0)
    every = tl.arange(0, COUNT)
    firsts = tl.load(copies + every * FIELDS, mask=every < count, other=2**31 - 1)
    copy = copies + (tl.sum((firsts <= program).to(tl.int32)) - 1) * FIELDS
    tile = program - tl.load(copy)
    source, target = tl.load(copy + 1).to(anchor.dtype), tl.load(copy + 2).to(anchor.dtype)
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
    tl.store(target + pixel[:, None] * pitch + channel[None, :], tl.trans(values), mask=inside)


@triton.jit
def subtract_kernel(
    h, h_pitch, v, v_pitch, weight, bias, out, out_pitch,
    positions, area, columns, channels, targets, map_rows, map_columns,
    kernel_columns, row_stride, column_stride, row_padding, column_padding, row_step, column_step, taps,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Form v − (weights ∗ h + bias) at a tile of positions and channels of v."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    across = tl.cdiv(targets, BLOCK_N)
    position = (tl.program_id(0) // across).to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = position < positions
    image = position // area
    rest = position - image * area
    row = rest // columns
    column = rest - row * columns
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h_channels = channels * ALIGN
    for tap in range(taps):
        y = row * row_stride - row_padding + tap // kernel_columns * row_step
        x = column * column_stride - column_padding + tap % kernel_columns * column_step
        read = valid & (y >= 0) & (y < map_rows) & (x >= 0) & (x < map_columns)
        pixel = (image * map_rows + y) * map_columns + x
        for start in range(0, h_channels, BLOCK_K):
            channel = start + tl.arange(0, BLOCK_K)
            a = _rows(h, pixel, h_pitch * ALIGN, channel, h_channels, read)
            w_mask = (channel < h_channels)[:, None] & (target < targets)[None, :]
            w_row = (tap * h_channels + channel)[:, None] * targets
            w = tl.load(weight + w_row + target[None, :], mask=w_mask, other=0.0)
            total = tl.dot(a.to(w.dtype), w, total, input_precision=PRECISION)
    mask = valid[:, None] & (target < targets)[None, :]
    v_pointer = v + position[:, None] * (v_pitch * ALIGN) + target[None, :]
    left = tl.load(v_pointer, mask=mask, other=0.0).to(tl.float32)
    left -= tl.load(bias + target, mask=target < targets, other=0.0)[None, :]
    tl.store(out + position[:, None] * (out_pitch * ALIGN) + target[None, :], left - total, mask=mask)
