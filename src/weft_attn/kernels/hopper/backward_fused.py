"""Backward on Hopper, all gradients: the consumers of hopper/backward.py that compute five products.

    P_ij = exp2(s_ij - lse_log2_i),   dV_j = sum_i P_ij dout_i
    dS_ij = P_ij (dout_i.v_j - delta_i),   dK_j = scale * sum_i dS_ij q_i,   dQ_i = scale * sum_j dS_ij k_j

The consumers exchange dS through shared memory, and each computes half of a query tile's dQ over all 128 keys, in the step of its dS or in
the step after (`Exchange.IS_LATE`). The copy engine adds it to dq_sum (Hq, Tq, D) float32, unscaled, in whatever order items come: not
deterministic; or a warp of its own has it added in turn (add_in_turn.py). What a query tile holds beyond its slice gets zeros added. An
item with fewer than 128 keys must come without interior tiles (`Tiling.masks_ragged`): a key that is not of the item would reach dQ.
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
    multiply_queries,
    seen_by,
    weigh,
    write_dk,
    write_dv,
)
from weft_attn.kernels.hopper.channel import make_tiles
from weft_attn.kernels.hopper.compat import add_box, aggregate
from weft_attn.kernels.hopper.tiles import CONSUMERS, ROWS, as_operand, clean_rows, product_layout, zero_rows
from weft_attn.kernels.triton.finish_dq import exchange_pairs
from weft_attn.kernels.triton.visibility import interior_of_part, next_edge_tile, next_tile_of_walk

# No row: nothing is added. No box may be sent there: the copy engine takes no rows below zero.
NOWHERE = gl.constexpr(-1)


@aggregate
class Exchange:
    """How the consumers make dQ of what each has a half of.

    Attributes:
        dq_sum_desc: boxes of a consumer's half of a query tile's dQ.
        dscores: (2 * CONSUMERS, ROWS, BLOCK_Q) dS of a step, a tile of each consumer, twice in turn.
        there: barrier: both tiles of a step are written; where dQ is late also: and those of the step before are read.
        dq: (CONSUMERS, rows, columns) float32, each consumer's half on its way out.
        full, empty: (CONSUMERS, 1) barriers: where programs add in turn, a half is there, and has left (add_in_turn.py).
        IS_LATE: a step multiplies dQ of the step before. No consumer waits for the other one's dS then, and the weights of one are made
            while the products of the other run (docs/adr/0025).
    """

    dq_sum_desc: tma.tensor_descriptor
    dscores: gl.shared_memory_descriptor
    there: gl.shared_memory_descriptor
    dq: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    IN_TURN: gl.constexpr
    IS_LATE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, dq_sum_desc, dscores, there, dq, full, empty, IN_TURN, IS_LATE):
        self.dq_sum_desc, self.dscores, self.there, self.dq = dq_sum_desc, dscores, there, dq
        self.full, self.empty = full, empty
        self.IN_TURN = gl.constexpr(IN_TURN)
        self.IS_LATE = gl.constexpr(IS_LATE)


@gluon.constexpr_function
def dq_columns(block_q, head_dim):
    """Columns of a consumer's half of a query tile's dQ, 64 rows: half of the columns, but of a tile of 128 queries half of the rows."""
    return head_dim if block_q > ROWS.value else head_dim // CONSUMERS.value


@gluon.jit
def make_exchange(p, dq_sum_desc, IN_TURN: gl.constexpr):
    dscores_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, p.BLOCK_Q], p.q_desc.dtype)
    dscores = gl.allocate_shared_memory(p.q_desc.dtype, [2 * CONSUMERS, ROWS, p.BLOCK_Q], dscores_layout)
    there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(there, count=CONSUMERS)
    full = there
    empty = there
    if IN_TURN:
        full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.init(full.index(consumer), count=1)
            mbarrier.init(empty.index(consumer), count=1)
    dq = make_tiles(dq_sum_desc, CONSUMERS)
    return Exchange(dq_sum_desc, dscores, there, dq, full, empty, IN_TURN, p.BLOCK_Q > ROWS)


@gluon.jit
def _multiply_dq(p, exchange, step, k_tiles, zero, CONSUMER: gl.constexpr):
    """Start this consumer's half of a step's dQ."""
    COLUMNS: gl.constexpr = dq_columns(p.BLOCK_Q, p.HEAD_DIM)
    dq = gl.zeros([ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
    for owner in gl.static_range(CONSUMERS):
        dscores = exchange.dscores.index((step & 1) * CONSUMERS + owner)
        keys = k_tiles.index(owner + zero)
        if p.BLOCK_Q > ROWS:
            dscores = dscores.slice(CONSUMER * ROWS, ROWS, dim=1)
        else:
            keys = keys.slice(CONSUMER * COLUMNS, COLUMNS, dim=1)
        dq = warpgroup_mma(dscores.permute((1, 0)), keys, dq, use_acc=owner > 0, is_async=True)
    return dq


@gluon.jit
def _add_dq(p, exchange, dq, step, row, n_valid, IS_MASKED: gl.constexpr, CONSUMER: gl.constexpr):
    """Send this consumer's half of a step's dQ to be added, and zeros from the tile's n_valid-th row on.

    To NOWHERE nothing is sent: it was sent before, or there is none.
    """
    if IS_MASKED:
        FIRST: gl.constexpr = CONSUMER * ROWS if p.BLOCK_Q > ROWS else 0
        dq = zero_rows(dq, n_valid - FIRST, product_layout(dq.shape[1]))
    smem = exchange.dq.index(CONSUMER)
    # The last one that was sent must have left before this one comes.
    if exchange.IN_TURN:
        phase = (step & 1) ^ 1
        if exchange.IS_LATE:
            # Nothing is sent now: until `step`'s own, which `_add_last` sent, has left.
            phase = gl.where(row >= 0, phase, phase ^ 1)
        mbarrier.wait(exchange.empty.index(CONSUMER), phase)
    else:
        tma.store_wait(pendings=0)
    smem.store(exchange_pairs(dq))
    fence_async_shared()
    if exchange.IN_TURN:
        mbarrier.arrive(exchange.full.index(CONSUMER), count=1, pred=row >= 0)
    elif row >= 0 or not exchange.IS_LATE:
        if p.BLOCK_Q > ROWS:
            add_box(exchange.dq_sum_desc, [row + CONSUMER * ROWS, 0], smem)
        else:
            add_box(exchange.dq_sum_desc, [row, CONSUMER * dq_columns(p.BLOCK_Q, p.HEAD_DIM)], smem)


@gluon.jit
def _add_last(p, memory, exchange, step, zero, row, n_valid, IS_MASKED: gl.constexpr, CONSUMER: gl.constexpr):
    """Where dQ is late: send that of a loop's last step, the one before `step`; NOWHERE: the loop had no step."""
    if row >= 0:
        mbarrier.wait(exchange.there, (step - 1) & 1)
        dq = _multiply_dq(p, exchange, step - 1, memory.k.tiles, zero, CONSUMER)
        dq = warpgroup_mma_wait(0, deps=[dq])
        _add_dq(p, exchange, dq, step - 1, row, n_valid, IS_MASKED, CONSUMER)


@gluon.jit
def _multiply_scores(p, memory, step, zero, CONSUMER: gl.constexpr):
    """Start the product of the keys and a step's queries, once they are there."""
    memory.slots.wait(step)
    return multiply_queries(p, memory.k.tiles.index(CONSUMER + zero), memory.q.index(step % memory.slots.STAGES))


@gluon.jit
def _accumulate_tile(
    p, memory, exchange, step, last_step, zero, scores, dk_acc, dv_acc, first, stop, col, n_valid, row,
    IS_MASKED: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """One query tile of one head into dk_acc and dv_acc, (64 keys, D) float32, and into dq_sum; the next step's scores with them.

    n_valid, row: of the dQ that is added, that of the step before where it is late.
    """
    acc_layout: gl.constexpr = product_layout(p.HEAD_DIM)
    slot = step % memory.slots.STAGES
    q_tile = memory.q.index(slot)
    dout_tile = memory.dout.index(slot)
    dprobs = multiply_queries(p, memory.v.tiles.index(CONSUMER + zero), dout_tile)
    seen = first
    if IS_MASKED:
        seen = seen_by(p, first, stop, col)
    probs, scores = weigh(p, memory, slot, scores, seen, IS_MASKED)
    probs_operand = as_operand(probs, p.q_desc.dtype, acc_layout)
    dprobs = warpgroup_mma_wait(0, deps=[dprobs])
    dscores = differentiate(p, memory, slot, probs, scores, dprobs, seen, IS_MASKED)
    dscores_operand = as_operand(dscores, p.q_desc.dtype, acc_layout)
    # Parities by `& 1`: the step before the first is -1, and its remainder would be negative.
    dq_step = step
    if exchange.IS_LATE:
        dq_step = step - 1
        mbarrier.wait(exchange.there, dq_step & 1)
    # What lay here two steps ago was read before the other consumer came to the last step's barrier.
    exchange.dscores.index((step & 1) * CONSUMERS + CONSUMER).store(dscores)
    # A product with a register operand holds its warps until it runs, and a fence until what they stored is there. Where the other
    # consumer waits for dS, dV runs meanwhile, which leaves shared memory the time to take it (docs/adr/0028).
    if exchange.IS_LATE:
        fence_async_shared()
    dv_acc = warpgroup_mma(probs_operand, dout_tile, dv_acc, is_async=True)
    if not exchange.IS_LATE:
        fence_async_shared()
        mbarrier.arrive(exchange.there, count=1)
        mbarrier.wait(exchange.there, dq_step & 1)
    # In a loop's first step once more that of the last one, for nothing: a branch here would keep products from overlapping.
    dq = _multiply_dq(p, exchange, dq_step, memory.k.tiles, zero, CONSUMER)
    # Behind dQ, which leaves while this product and the next step's first one run.
    dk_acc = warpgroup_mma(dscores_operand, q_tile, dk_acc, is_async=True)
    # The operands too: their registers are read until the products are done.
    dq, dv_acc, _ = warpgroup_mma_wait(1, deps=[dq, dv_acc, probs_operand])
    if exchange.IS_LATE:
        mbarrier.arrive(exchange.there, count=1)
    # After the item's last step its own once more, for nothing, as above.
    next_step = gl.minimum(step + 1, last_step)
    # Before dQ is staged only where that is late: elsewhere it is slower, with a third slot of queries too (docs/adr/0025).
    if exchange.IS_LATE:
        next_scores = _multiply_scores(p, memory, next_step, zero, CONSUMER)
    _add_dq(p, exchange, dq, dq_step, row, n_valid, IS_MASKED, CONSUMER)
    if not exchange.IS_LATE:
        next_scores = _multiply_scores(p, memory, next_step, zero, CONSUMER)
    dk_acc, next_scores, _ = warpgroup_mma_wait(0, deps=[dk_acc, next_scores, dscores_operand])
    memory.slots.release(step)
    return next_scores, dk_acc, dv_acc


@gluon.jit
def _walk_edges(
    p, memory, agreement, exchange, step, last_step, cleaned, zero, scores, dk_acc, dv_acc, rows, first_head,
    turn, part, direction, edge_run, edge_tiles, late, CONSUMER: gl.constexpr,
):  # fmt: skip
    """The edge tiles of a part."""
    run, n_tiles, col, left, first, stop, col_stop = first_edges(
        p, memory.schedule, turn, part, rows, direction, edge_run, edge_tiles, late
    )
    late_row = NOWHERE
    late_valid = 0
    for tile in range(n_tiles):
        for member in range(p.GROUP):
            zero = zero * 3
            row = (first_head + member) * p.stride_stats_h + col
            cleaned = clean_queries(p, memory, agreement, step, col_stop - col, cleaned, CONSUMER)
            n_valid = col_stop - col
            scores, dk_acc, dv_acc = _accumulate_tile(
                p, memory, exchange, step, last_step, zero, scores, dk_acc, dv_acc, first, stop, col,
                late_valid if exchange.IS_LATE else n_valid, late_row if exchange.IS_LATE else row, True, CONSUMER,
            )  # fmt: skip
            late_row = row
            late_valid = n_valid
            step += 1
        run, col, left, first, stop, col_stop = next_edge_tile(
            p.runs_ptr, run, col, left, first, stop, col_stop, rows, direction, n_tiles - 1 - tile, p.BLOCK_Q
        )
    if exchange.IS_LATE:
        _add_last(p, memory, exchange, step, zero, late_row, late_valid, True, CONSUMER)
    return step, cleaned, zero, scores, dk_acc, dv_acc


@gluon.jit
def _walk_interior(
    p, memory, exchange, step, last_step, zero, scores, dk_acc, dv_acc, rows, first_head,
    turn, run, n_tiles, direction, CONSUMER: gl.constexpr,
):  # fmt: skip
    """So many interior tiles, each run from its one end or the other."""
    col, left = first_interior(p, memory.schedule, turn, direction)
    late_row = NOWHERE
    for _ in range(n_tiles):
        for member in range(p.GROUP):
            zero = zero * 3
            row = (first_head + member) * p.stride_stats_h + col
            scores, dk_acc, dv_acc = _accumulate_tile(
                p, memory, exchange, step, last_step, zero, scores, dk_acc, dv_acc, rows, rows, col, p.BLOCK_Q,
                late_row if exchange.IS_LATE else row, False, CONSUMER,
            )  # fmt: skip
            late_row = row
            step += 1
        run, col, left = next_tile_of_walk(p.runs_ptr, run, col, left, direction, p.BLOCK_Q)
    if exchange.IS_LATE:
        _add_last(p, memory, exchange, step, zero, late_row, p.BLOCK_Q, False, CONSUMER)
    return step, zero, scores, dk_acc, dv_acc


@gluon.jit
def consume_for_all(p, memory, agreement, exchange, CONSUMER: gl.constexpr):
    schedule = memory.schedule
    step = 0
    turn = 0
    cleaned = 0
    # As in backward_dkdv.py.
    zero = p.zero
    acc_layout: gl.constexpr = product_layout(p.HEAD_DIM)
    row_layout: gl.constexpr = gl.SliceLayout(1, product_layout(p.BLOCK_Q))
    schedule.hear(turn)
    number = schedule.number(turn)
    while schedule.exists(number):
        kv_head = schedule.head(turn)
        direction = schedule.direction(turn)
        first_row, n_rows, edge_run, edge_tiles, interior_run, interior_tiles = schedule.item(turn, CONSUMER)
        offsets = gl.arange(0, ROWS, row_layout)
        # A key beyond the item may be inside the slice; in row -1 nobody is. Its weights, of zeroed keys, are not below 1, and an
        # infinite one times a zeroed key is NaN.
        rows = gl.where(offsets < n_rows, first_row + offsets, -1)
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
                p, memory, agreement, exchange, step, last_step, cleaned, zero, scores, dk_acc, dv_acc, rows,
                first_head, turn, part, direction, edge_run, edge_tiles, late, CONSUMER,
            )  # fmt: skip
            step, zero, scores, dk_acc, dv_acc = _walk_interior(
                p, memory, exchange, step, last_step, zero, scores, dk_acc, dv_acc, rows, first_head,
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
