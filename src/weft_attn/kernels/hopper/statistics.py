"""Row statistics of a query tile on their way to the products of the backward kernels by keys: one float32 a query.

A thread of a (64 keys, queries) product has the queries 16 i + 8 h + 2 t + b: h and b are 0 or 1, t is its lane modulo 4. In shared memory
a tile's statistics lie by (i, t, h, b), so that a thread reads four at a time, 16 bytes. That is no order that the copy engine could make:
the producer reads them as they lie in global memory, at any row, and writes them so (docs/adr/0026).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from weft_attn.kernels.hopper.tiles import one_a_lane, product_layout

# Queries of one i: t, h and b together.
PERIOD = gl.constexpr(16)


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
