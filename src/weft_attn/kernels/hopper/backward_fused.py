"""Backward on Hopper, all gradients at head dim 128: the consumers of hopper/backward.py that compute five products each.

    P_ij = exp2(s_ij - lse_log2_i),   dV_j = sum_i P_ij dout_i
    dS_ij = P_ij (dout_i.v_j - delta_i),   dK_j = scale * sum_i dS_ij q_i,   dQ_i = scale * sum_j dS_ij k_j

The consumers exchange dS through shared memory, and each computes half of a query tile's dQ over all 128 keys. The copy engine adds it to
dq_sum (Hq, Tq, D) float32, unscaled, in whatever order items come: not deterministic; or a warp of its own has it added in turn
(add_in_turn.py). What a query tile holds beyond its slice gets zeros added. An item with fewer than 128 keys must come without interior
tiles (`Tiling.masks_ragged`): a key that is not of the item would reach dQ.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from weft_attn.kernels.hopper.by_keys import (
    clean_queries,
    differentiate,
    first_edges,
    first_interior,
    multiply_dprobs,
    multiply_scores,
    rows_of_item,
    seen_by,
    weigh,
    write_dk,
    write_dv,
)
from weft_attn.kernels.hopper.compat import aggregate
from weft_attn.kernels.hopper.outbox import BOX_COLUMNS
from weft_attn.kernels.hopper.tiles import CONSUMERS, ROWS, as_operand, clean_rows, product_layout, zero_rows
from weft_attn.kernels.triton.visibility import interior_of_part, next_edge_tile, next_tile_of_walk


@aggregate
class Exchange:
    """How the consumers make dQ of what each has a half of.

    Attributes:
        dscores: (2 * CONSUMERS, ROWS, BLOCK_Q) dS of a step, a tile of each consumer, twice in turn.
        there: barrier: both tiles of a step are written.
    """

    dscores: gl.shared_memory_descriptor
    there: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, dscores, there):
        self.dscores, self.there = dscores, there


@gluon.jit
def make_exchange(p):
    dscores_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, p.BLOCK_Q], p.q_desc.dtype)
    dscores = gl.allocate_shared_memory(p.q_desc.dtype, [2 * CONSUMERS, ROWS, p.BLOCK_Q], dscores_layout)
    there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(there, count=CONSUMERS)
    return Exchange(dscores, there)


@gluon.jit
def _multiply_dq(p, exchange, step, k_tiles, zero, CONSUMER: gl.constexpr):
    """Start this consumer's half of a step's dQ."""
    gl.static_assert(p.HEAD_DIM == CONSUMERS * BOX_COLUMNS, "a consumer's half of dQ is a box")
    dq = gl.zeros([ROWS, BOX_COLUMNS], gl.float32, product_layout(BOX_COLUMNS))
    for owner in gl.static_range(CONSUMERS):
        dscores = exchange.dscores.index((step & 1) * CONSUMERS + owner)
        keys = k_tiles.index(owner + zero).slice(CONSUMER * BOX_COLUMNS, BOX_COLUMNS, dim=1)
        dq = warpgroup_mma(dscores.permute((1, 0)), keys, dq, use_acc=owner > 0, is_async=True)
    return dq


@gluon.jit
def _multiply_scores(p, memory, step, zero, CONSUMER: gl.constexpr):
    """Start the product of the keys and a step's queries, once they are there."""
    memory.slots.wait(step)
    return multiply_scores(p, memory, step % memory.slots.STAGES, memory.k.tiles.index(CONSUMER + zero))


@gluon.jit
def _accumulate_tile(
    p, memory, exchange, outbox, step, last_step, zero, scores, dk_acc, dv_acc, first, stop, col, n_valid, row,
    IS_MASKED: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """One query tile of one head into dk_acc and dv_acc, (64 keys, D) float32, and into dq_sum; the next step's scores with them."""
    acc_layout: gl.constexpr = product_layout(p.HEAD_DIM)
    slot = step % memory.slots.STAGES
    q_tile = memory.q.index(slot)
    dout_tile = memory.dout.index(slot)
    dprobs = multiply_dprobs(p, memory, slot, memory.v.tiles.index(CONSUMER + zero), dout_tile)
    seen = first
    if IS_MASKED:
        seen = seen_by(p, first, stop, col)
    probs, scores = weigh(p, memory, slot, scores, seen, IS_MASKED)
    probs_operand = as_operand(probs, p.q_desc.dtype, acc_layout)
    dprobs = warpgroup_mma_wait(0, deps=[dprobs])
    dscores = differentiate(p, memory, slot, probs, scores, dprobs, seen, IS_MASKED)
    dscores_operand = as_operand(dscores, p.q_desc.dtype, acc_layout)
    # What lay here two steps ago was read before the other consumer came to the last step's barrier.
    exchange.dscores.index((step & 1) * CONSUMERS + CONSUMER).store(dscores)
    # A product with a register operand holds its warps until it runs, and a fence until what they stored is there. The other consumer waits
    # for dS: dV runs meanwhile, which leaves shared memory the time to take it (docs/adr/0028).
    dv_acc = warpgroup_mma(probs_operand, dout_tile, dv_acc, is_async=True)
    fence_async_shared()
    mbarrier.arrive(exchange.there, count=1)
    mbarrier.wait(exchange.there, step & 1)
    dq = _multiply_dq(p, exchange, step, memory.k.tiles, zero, CONSUMER)
    # Behind dQ, which leaves while this product and the next step's first one run.
    dk_acc = warpgroup_mma(dscores_operand, q_tile, dk_acc, is_async=True)
    # The operands too: their registers are read until the products are done.
    dq, dv_acc, _ = warpgroup_mma_wait(1, deps=[dq, dv_acc, probs_operand])
    if IS_MASKED:
        dq = zero_rows(dq, n_valid, product_layout(BOX_COLUMNS))
    outbox.send(step, dq, row, CONSUMER * BOX_COLUMNS)
    # Not before dQ is staged, which would be slower, with a third slot of queries too (docs/adr/0025). After the item's last step its own once
    # more, for nothing: a branch here would keep products from overlapping.
    next_scores = _multiply_scores(p, memory, gl.minimum(step + 1, last_step), zero, CONSUMER)
    dk_acc, next_scores, _ = warpgroup_mma_wait(0, deps=[dk_acc, next_scores, dscores_operand])
    memory.slots.release(step)
    return next_scores, dk_acc, dv_acc


@gluon.jit
def _walk_edges(
    p, memory, agreement, exchange, outbox, step, last_step, cleaned, zero, scores, dk_acc, dv_acc, rows, first_head,
    turn, part, direction, edge_run, edge_tiles, late, CONSUMER: gl.constexpr,
):  # fmt: skip
    """The edge tiles of a part."""
    run, n_tiles, col, left, first, stop, col_stop = first_edges(
        p, memory.schedule, turn, part, rows, direction, edge_run, edge_tiles, late
    )
    for tile in range(n_tiles):
        for member in range(p.GROUP):
            zero = zero * 3
            row = (first_head + member) * p.stride_stats_h + col
            cleaned = clean_queries(p, memory, agreement, step, col_stop - col, cleaned, CONSUMER)
            scores, dk_acc, dv_acc = _accumulate_tile(
                p, memory, exchange, outbox, step, last_step, zero, scores, dk_acc, dv_acc, first, stop, col,
                col_stop - col, row, True, CONSUMER,
            )  # fmt: skip
            step += 1
        run, col, left, first, stop, col_stop = next_edge_tile(
            p.runs_ptr, run, col, left, first, stop, col_stop, rows, direction, n_tiles - 1 - tile, p.BLOCK_Q
        )
    return step, cleaned, zero, scores, dk_acc, dv_acc


@gluon.jit
def _walk_interior(
    p, memory, exchange, outbox, step, last_step, zero, scores, dk_acc, dv_acc, rows, first_head,
    turn, run, n_tiles, direction, CONSUMER: gl.constexpr,
):  # fmt: skip
    """So many interior tiles, each run from its one end or the other."""
    col, left = first_interior(p, memory.schedule, turn, direction)
    for _ in range(n_tiles):
        for member in range(p.GROUP):
            zero = zero * 3
            row = (first_head + member) * p.stride_stats_h + col
            scores, dk_acc, dv_acc = _accumulate_tile(
                p, memory, exchange, outbox, step, last_step, zero, scores, dk_acc, dv_acc, rows, rows, col, p.BLOCK_Q,
                row, False, CONSUMER,
            )  # fmt: skip
            step += 1
        run, col, left = next_tile_of_walk(p.runs_ptr, run, col, left, direction, p.BLOCK_Q)
    return step, zero, scores, dk_acc, dv_acc


@gluon.jit
def consume_for_all(p, memory, agreement, exchange, outbox, CONSUMER: gl.constexpr):
    schedule = memory.schedule
    step = 0
    turn = 0
    cleaned = 0
    # As in backward_dkdv.py.
    zero = p.zero
    acc_layout: gl.constexpr = product_layout(p.HEAD_DIM)
    schedule.hear(turn)
    number = schedule.number(turn)
    while schedule.exists(number):
        kv_head = schedule.head(turn)
        direction = schedule.direction(turn)
        first_row, n_rows, edge_run, edge_tiles, interior_run, interior_tiles = schedule.item(turn, CONSUMER)
        rows = rows_of_item(p, first_row, n_rows)
        dk_acc = gl.zeros([ROWS, p.HEAD_DIM], gl.float32, acc_layout)
        dv_acc = gl.zeros([ROWS, p.HEAD_DIM], gl.float32, acc_layout)
        kv_step = turn * CONSUMERS + CONSUMER
        other_step = turn * CONSUMERS + 1 - CONSUMER
        memory.k.wait(kv_step)
        memory.v.wait(kv_step)
        memory.k.wait(other_step)
        if n_rows < ROWS:
            # Others' keys, times dS that is zero there.
            clean_rows(memory.k.tiles.index(CONSUMER), n_rows)
            fence_async_shared()
        first_head = kv_head * p.GROUP
        last_step = step + (edge_tiles + interior_tiles) * p.GROUP - 1
        scores = gl.zeros([ROWS, p.BLOCK_Q], gl.float32, product_layout(p.BLOCK_Q))
        if step <= last_step:
            scores = _multiply_scores(p, memory, step, zero, CONSUMER)
            scores = warpgroup_mma_wait(0, deps=[scores])

        late = schedule.late_edges(turn)
        for part in range(2):
            step, cleaned, zero, scores, dk_acc, dv_acc = _walk_edges(
                p, memory, agreement, exchange, outbox, step, last_step, cleaned, zero, scores, dk_acc, dv_acc, rows,
                first_head, turn, part, direction, edge_run, edge_tiles, late, CONSUMER,
            )  # fmt: skip
            step, zero, scores, dk_acc, dv_acc = _walk_interior(
                p, memory, exchange, outbox, step, last_step, zero, scores, dk_acc, dv_acc, rows, first_head,
                turn, interior_run, interior_of_part(part, interior_tiles), direction, CONSUMER,
            )  # fmt: skip

        memory.k.release(kv_step)
        memory.k.release(other_step)
        memory.v.release(kv_step)
        write_dk(p, kv_head, 0, dk_acc, first_row, n_rows)
        write_dv(p, kv_head, 0, dv_acc, first_row, n_rows)
        schedule.heard(turn)
        turn += 1
        schedule.hear(turn)
        number = schedule.number(turn)
    tma.store_wait(pendings=0)
