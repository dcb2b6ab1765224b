"""What the Triton kernels share: which item a program works on, how a tile is read, how raw products become scores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from weft_attn.kernels.triton import layout


@triton.jit
def program_item_and_head(n_items, n_heads, heads_per_wave):
    """Which item and head this program works on.

    Waves of `heads_per_wave` heads, whose keys and values fit the L2 cache together; inside a wave longest items first, and
    for each item the wave's heads next to each other, so that heads that share a KV head read its tiles at the same time.
    """
    pid = tl.program_id(0)
    wave = pid // (n_items * heads_per_wave)
    first_head = wave * heads_per_wave
    heads = tl.minimum(heads_per_wave, n_heads - first_head)
    within = pid - wave * n_items * heads_per_wave
    return within // heads, first_head + within % heads


@triton.jit
def place_in_list(number, n_items, n_heads, heads_per_wave, last_heads, programs):
    """What a number of a persistent grid's list stands for: item, head, wave and round.

    The list is in the order of `program_item_and_head`, but the last wave has `last_heads` heads or more, so that it lasts as long as its
    longest item. A wave's numbers are cut into equal rounds, as many as programs go into them, rounded; rounds count over the whole list.
    Of a wave with more numbers than programs squared the last round may be missing, which costs a step's rhythm and nothing else.
    """
    full_waves = (n_heads - last_heads) // heads_per_wave
    full = n_items * heads_per_wave
    wave = tl.minimum(number // full, full_waves)
    first_head = wave * heads_per_wave
    heads = tl.where(wave < full_waves, heads_per_wave, n_heads - first_head)
    within = number - wave * full
    numbers = n_items * heads
    rounds = _rounds(numbers, programs)
    round_length = (numbers + rounds - 1) // rounds
    return within // heads, first_head + within % heads, wave, wave * _rounds(full, programs) + within // round_length


@triton.jit
def _rounds(numbers, programs):
    return tl.maximum((numbers + programs // 2) // programs, 1)


@triton.jit
def direction_of_round(round_number):
    """Which way the programs of a round walk tiles that others walk too: -1 from the last, 1 from the first.

    Programs that begin a round together, longest items first, end it one by one. They begin the next one so, its longest items first,
    and end it together. So those of an even round meet at the same tiles from the last one down, for all causal items share it; and
    those of an odd round from the first one up, for each begins at its diagonal when the others come by. What programs share they then
    read from memory once, however much longer than the L2 cache the sequence is.
    """
    return tl.where(round_number % 2 == 0, -1, 1)


@triton.jit
def direction_of_walk(walk, wave, round_number):
    """Which way an item is walked: its round's, or its own in even and odd waves (plan/in_step.py)."""
    own = tl.where((walk & (layout.WALK_UP_IN_EVEN << (wave % 2))) != 0, 1, -1)
    return tl.where((walk & layout.WALK_BY_ITEM) != 0, own, direction_of_round(round_number))


def row_strides(**tensors: torch.Tensor) -> dict[str, int]:
    """The arguments stride_NAMEt and stride_NAMEh of a kernel, token and head strides in elements, of (tokens, heads, dim) tensors."""
    return {
        f"stride_{name}{axis}": stride for name, x in tensors.items() for axis, stride in zip("th", x.stride(), strict=False)
    }


def stride_unit(strides: Mapping[str, int]) -> int:
    """STRIDE_UNIT of a kernel that passes all of these `row_strides` through `in_units`, and no others.

    Triton finds out by itself whether an integer is a multiple of 16. It moves 16 bytes at a time only where it knows of a multiple of
    8 (of 16-bit elements), and two where it does not. Heads of 72 or 200 dims have strides that are one but not the other.
    """
    in_eights = all(stride % 8 == 0 for stride in strides.values())
    return 8 if in_eights and any(stride % 16 for stride in strides.values()) else 1


@triton.jit
def in_units(stride, UNIT: tl.constexpr):
    """A stride that is a multiple of UNIT, written so that the compiler sees it; another one would be cut off."""
    if UNIT == 1:
        return stride
    return stride // UNIT * UNIT


@triton.jit
def load_rows(
    ptr,
    offsets,
    row_mask,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    IS_MASKED: tl.constexpr,
    CACHE: tl.constexpr,
):
    """A (rows, HEAD_DIM_PADDED) tile whose row r begins at ptr + offsets[r]; masked rows and padded columns read as zero.

    Columns of a row are contiguous.
    """
    dims = tl.arange(0, HEAD_DIM_PADDED)
    ptrs = ptr + offsets[:, None] + dims[None, :]
    if HEAD_DIM != HEAD_DIM_PADDED:
        if IS_MASKED:
            return tl.load(ptrs, mask=row_mask[:, None] & (dims < HEAD_DIM)[None, :], other=0.0, cache_modifier=CACHE)
        return tl.load(ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0, cache_modifier=CACHE)
    if IS_MASKED:
        return tl.load(ptrs, mask=row_mask[:, None], other=0.0, cache_modifier=CACHE)
    return tl.load(ptrs, cache_modifier=CACHE)


@triton.jit
def load_stream_tile(
    ptr,
    desc,
    head,
    col,
    col_stop,
    stride_row,
    stride_head,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    IS_MASKED: tl.constexpr,
    USE_TMA: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Rows [col, col + BLOCK) of one head of a (tokens, heads, dim) tensor.

    Interior tiles may come through a tensor descriptor over [tokens, heads * dim]. Edge tiles never do: rows from `col_stop` on
    are another slice's, or a gather buffer's padding, and must read as zero, because zero times NaN is NaN.
    """
    if USE_TMA and not IS_MASKED:
        return desc.load([col, (head * stride_head).to(tl.int32)])
    rows = tl.arange(0, BLOCK)
    base = ptr + col.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
    return load_rows(base, rows * stride_row, col + rows < col_stop, HEAD_DIM, HEAD_DIM_PADDED, IS_MASKED, CACHE)


@triton.jit
def store_rows(ptr, offsets, row_mask, tile, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr):
    """Write a (rows, HEAD_DIM_PADDED) tile in the dtype of `ptr`; the twin of `load_rows`."""
    dims = tl.arange(0, HEAD_DIM_PADDED)
    mask = row_mask[:, None]
    if HEAD_DIM != HEAD_DIM_PADDED:
        mask = mask & (dims < HEAD_DIM)[None, :]
    tl.store(ptr + offsets[:, None] + dims[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b accumulated in float32."""
    if layout.IS_INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a @ b in float32."""
    if layout.IS_INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """Hyperbolic tangent to float32 precision, on any target: a series near zero, where the quotient would cancel."""
    magnitude = tl.abs(x)
    decay = tl.exp2(magnitude * (-2.0 * layout.LOG2_E))
    quotient = (1.0 - decay) / (1.0 + decay)
    far = tl.where(x < 0, -quotient, quotient)
    square = x * x
    series = 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    near = x + x * square * series
    return tl.where(magnitude < 0.25, near, far)


@triton.jit
def cap_scores(products, inner_scale):
    """tanh of the scaled products: what softcap multiplies. Its slope is 1 minus its square."""
    return tanh(products * inner_scale)
