"""Row statistics of a query tile on their way to the products of the backward kernels by keys: one float32 a query.

They come to a product in one of two ways. Read:

A thread of a (64 keys, queries) product has the queries 16 i + 8 h + 2 t + b: h and b are 0 or 1, t is its lane modulo 4. In shared memory
a tile's statistics lie by (i, t, h, b), so that a thread reads four at a time, 16 bytes. That is no order that the copy engine could make:
the producer reads them as they lie in global memory, at any row, and writes them so (docs/adr/0026).

Or folded (docs/adr/0036): the product begins with them. A float32 is a sum of three bf16, so ones (64 keys, 16) times such parts and zeros
(16, queries) are a query's statistic for all of its keys, and no thread reads it. -lse_log2 / outer_scale goes to the scores, whose
weights are exp2(outer_scale * scores) then, and -delta to dP.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from weft_attn.kernels.hopper.tiles import ROWS, one_a_lane, product_layout

# Queries of one i: t, h and b together.
PERIOD = gl.constexpr(16)

# Parts of a statistic, and columns of a tile of them, a product's least depth: the others are zero.
PARTS = gl.constexpr(3)
PART_COLUMNS = gl.constexpr(16)
# The high half of a float32, which is a bf16.
HIGH_BITS = gl.constexpr(-65536)
# Larger than every lse / scale in use and still finite in all parts: what is subtracted where lse is infinite, so that weights are 0.
ENOUGH = gl.constexpr(3e38)


@gluon.constexpr_function
def _as_read(queries):
    """(i, t, h, b) as the threads of a product hold it."""
    everyone = [0, 0, 0, 0]
    registers = [[0, 0, 0, 1], [0, 0, 1, 0]]
    registers += [[2**bit, 0, 0, 0] for bit in range((queries // PERIOD.value).bit_length() - 1)]
    lanes = [[0, 1, 0, 0], [0, 2, 0, 0], everyone, everyone, everyone]
    return gl.DistributedLinearLayout(registers, lanes, [everyone, everyone], [], [queries // PERIOD.value, 4, 2, 2])


@gluon.jit
def _in_shared_order(values, QUERIES: gl.constexpr):
    """The statistics of queries 0, 1, ... by (i, t, h, b)."""
    return values.reshape([QUERIES // PERIOD, 2, 4, 2]).permute((0, 2, 1, 3))


@gluon.jit
def make_statistics(QUERIES: gl.constexpr, STAGES: gl.constexpr):
    """Room for a statistic of so many query tiles."""
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    return gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES // PERIOD, 4, 2, 2], shared)


@gluon.jit
def load_statistics(lse_log2_ptr, delta_ptr, head, row, total_q, QUERIES: gl.constexpr, WARPS: gl.constexpr):
    """Producer, of so many warps: ask for lse_log2 and delta of a head's query tile that begins at a row, as `make_statistics` holds them.

    Args:
        lse_log2_ptr, delta_ptr: (Hq, total_q) float32, of fewer elements than int32 counts. Beyond the last row of the head are zeros.
    """
    query = gl.arange(0, QUERIES, one_a_lane(WARPS))
    is_row = query < total_q - row
    at = head * total_q + row + query
    lse_log2 = gl.load(lse_log2_ptr + at, mask=is_row, other=0.0)
    delta = gl.load(delta_ptr + at, mask=is_row, other=0.0)
    return _in_shared_order(lse_log2, QUERIES), _in_shared_order(delta, QUERIES)


@gluon.jit
def read_statistics(room, QUERIES: gl.constexpr):
    """Consumer: a tile's statistic, as a row of a (64 keys, queries) product."""
    values = room.load(_as_read(QUERIES)).permute((0, 2, 1, 3)).reshape([QUERIES])
    return gl.convert_layout(values, gl.SliceLayout(0, product_layout(QUERIES)), assert_trivial=True)


# ---- folded ---------------------------------------------------------------------------------------------------------------


@gluon.jit
def make_parts(QUERIES: gl.constexpr, STAGES: gl.constexpr):
    """Room for the parts of so many query tiles: rows of lse, then of delta."""
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * QUERIES, PART_COLUMNS], gl.bfloat16)
    return gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * QUERIES, PART_COLUMNS], shared)


@gluon.constexpr_function
def _a_row_a_lane(warps):
    """How so many warps hold a tile of parts."""
    return gl.BlockedLayout([1, PART_COLUMNS.value], [32, 1], [warps, 1], [1, 0])


@gluon.jit
def load_both(
    lse_log2_ptr, delta_ptr, head, row, total_q, inverse_scale, QUERIES: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Producer: ask, as `load_statistics`, for what is added to scores and dP; inverse_scale: 1 / outer_scale."""
    place = gl.arange(0, 2 * QUERIES, gl.SliceLayout(1, _a_row_a_lane(WARPS)))
    query = place % QUERIES
    is_lse = place < QUERIES
    is_row = query < total_q - row
    at = head * total_q + row + query
    lse_log2 = gl.load(lse_log2_ptr + at, mask=is_row & is_lse, other=0.0)
    delta = gl.load(delta_ptr + at, mask=is_row & (place >= QUERIES), other=0.0)
    added = lse_log2 * -inverse_scale
    # NaN passes every comparison, and stays.
    added = gl.where(added > ENOUGH, ENOUGH, gl.where(added < -ENOUGH, -ENOUGH, added))
    return gl.where(is_lse, added, -delta)


@gluon.jit
def store_parts(room, added, QUERIES: gl.constexpr, WARPS: gl.constexpr):
    """Producer: a tile of what `load_both` gives, in parts."""
    held: gl.constexpr = _a_row_a_lane(WARPS)
    column = gl.arange(0, PART_COLUMNS, gl.SliceLayout(0, held))[None, :]
    tile = gl.zeros([2 * QUERIES, PART_COLUMNS], gl.float32, held)
    for number in gl.static_range(PARTS):
        high = (added.to(gl.int32, bitcast=True) & HIGH_BITS).to(gl.float32, bitcast=True)
        tile = gl.where(column == number, high[:, None], tile)
        # Nothing is left of an infinite one.
        added = gl.where(added == high, 0.0, added - high)
    room.store(tile.to(gl.bfloat16))
    fence_async_shared()


@gluon.jit
def add_lse(room, QUERIES: gl.constexpr):
    """Start a (64 keys, queries) product of scores with a tile's -lse."""
    return _add(room.slice(0, QUERIES), QUERIES)


@gluon.jit
def add_delta(room, QUERIES: gl.constexpr):
    """Start a (64 keys, queries) product dP with a tile's -delta."""
    return _add(room.slice(QUERIES, QUERIES), QUERIES)


@gluon.jit
def _add(parts, QUERIES: gl.constexpr):
    product: gl.constexpr = product_layout(QUERIES)
    # Unlike other operands in registers it is not kept through the wait: nothing writes another value to a constant.
    ones = gl.full([ROWS, PART_COLUMNS], 1.0, gl.bfloat16, gl.DotOperandLayout(0, product, 2))
    nothing = gl.zeros([ROWS, QUERIES], gl.float32, product)
    return warpgroup_mma(ones, parts.permute((1, 0)), nothing, use_acc=False, is_async=True)
