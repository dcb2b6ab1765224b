"""Backward on Hopper, all gradients at head dim 64: the consumers of hopper/backward.py, two for keys and one for queries.

    P_ij = exp2(s_ij - lse_log2_i),   dV_j = sum_i P_ij dout_i
    dS_ij = P_ij (dout_i.v_j - delta_i),   dK_j = scale * sum_i dS_ij q_i,   dQ_i = scale * sum_j dS_ij k_j

Two own 64 keys each, keep them in registers as operands, compute S and dP, sum dK and dV, and hand dS on through shared memory. The third
multiplies it with all 128 keys, which is a query tile's dQ, and has the copy engine add that to dq_sum (Hq, Tq, D) float32, unscaled. Neither
of the first two waits for the other one, or for dQ while that is less than three steps behind (docs/adr/0034). In whatever order items come,
so not deterministic; or in turn (add_in_turn.py). What a query tile holds beyond its slice gets zeros added. An item with fewer than 128 keys
must come without interior tiles (`Tiling.masks_ragged`): a key that is not of the item would reach dQ.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
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
from weft_attn.kernels.hopper.channel import Ring, make_slots
from weft_attn.kernels.hopper.tiles import CONSUMERS, ROWS, as_operand, clean_rows, product_layout, zero_rows
from weft_attn.kernels.triton.visibility import interior_of_part, next_edge_tile, next_tile_of_walk

# Steps whose dS is on its way, and boxes of dQ that are: with two of each, the consumers of keys would wait (docs/adr/0034).
DSCORES_STAGES = gl.constexpr(3)
NARROW_PLACES = gl.constexpr(3)


@gluon.jit
def make_dscores(p):
    """The way of dS from the keys' consumers to dQ's: of each step a tile of each consumer."""
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, p.BLOCK_Q], p.q_desc.dtype)
    tiles = gl.allocate_shared_memory(p.q_desc.dtype, [DSCORES_STAGES * CONSUMERS, ROWS, p.BLOCK_Q], tile_layout)
    return Ring(tiles, make_slots(DSCORES_STAGES, 1, CONSUMERS, FILLED_BY_WARPS=True, RELEASED_BY_WARPS=True))


# ---- keys: dK, dV and dS ------------------------------------------------------------------------------------------------


@gluon.jit
def _multiply_scores(p, memory, step, keys):
    """Start the product of the keys and a step's queries, once they are there."""
    slot = memory.slots.wait(step)
    return multiply_scores(p, memory, slot, keys)


@gluon.jit
def _accumulate_tile(
    p, memory, dscores_ring, step, last_step, keys, values, scores, dk_acc, dv_acc, first, stop, col,
    IS_MASKED: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """One query tile of one head into dk_acc and dv_acc, (64 keys, D) float32, its dS handed on; the next step's scores with them."""
    acc_layout: gl.constexpr = product_layout(p.HEAD_DIM)
    slot = step % memory.slots.STAGES
    q_tile = memory.q.index(slot)
    dout_tile = memory.dout.index(slot)
    dprobs = multiply_dprobs(p, memory, slot, values, dout_tile)
    seen = first
    if IS_MASKED:
        seen = seen_by(p, first, stop, col)
    probs, scores = weigh(p, memory, slot, scores, seen, IS_MASKED)
    probs_operand = as_operand(probs, p.q_desc.dtype, acc_layout)
    dprobs = warpgroup_mma_wait(0, deps=[dprobs])
    dscores = differentiate(p, memory, slot, probs, scores, dprobs, seen, IS_MASKED)
    dscores_operand = as_operand(dscores, p.q_desc.dtype, acc_layout)
    place = dscores_ring.slots.wait_empty(step)
    dscores_ring.tiles.index(place * CONSUMERS + CONSUMER).store(dscores)
    # Runs while shared memory takes what was stored (docs/adr/0028).
    dv_acc = warpgroup_mma(probs_operand, dout_tile, dv_acc, is_async=True)
    fence_async_shared()
    dscores_ring.slots.fill(step)
    dk_acc = warpgroup_mma(dscores_operand, q_tile, dk_acc, is_async=True)
    # After the item's last step its own once more, for nothing: a branch here would keep products from overlapping.
    next_scores = _multiply_scores(p, memory, gl.minimum(step + 1, last_step), keys)
    # The operands too: their registers are read until the products are done.
    dk_acc, dv_acc, next_scores, _, _ = warpgroup_mma_wait(
        0, deps=[dk_acc, dv_acc, next_scores, probs_operand, dscores_operand]
    )
    memory.slots.release(step)
    return next_scores, dk_acc, dv_acc


@gluon.jit
def consume_for_keys(p, memory, agreement, dscores_ring, CONSUMER: gl.constexpr):
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, product_layout(p.BLOCK_Q), 2)
    schedule = memory.schedule
    step = 0
    turn = 0
    cleaned = 0
    acc_layout: gl.constexpr = product_layout(p.HEAD_DIM)
    schedule.hear(turn)
    number = schedule.number(turn)
    while schedule.exists(number):
        kv_head = schedule.head(turn)
        direction = schedule.direction(turn)
        first_row, n_rows, edge_run, edge_tiles, _, interior_tiles = schedule.item(turn, CONSUMER)
        rows = rows_of_item(p, first_row, n_rows)
        dk_acc = gl.zeros([ROWS, p.HEAD_DIM], gl.float32, acc_layout)
        dv_acc = gl.zeros([ROWS, p.HEAD_DIM], gl.float32, acc_layout)
        kv_step = turn * CONSUMERS + CONSUMER
        memory.k.wait(kv_step)
        memory.v.wait(kv_step)
        if n_rows < ROWS:
            # Others' keys, times dS that is zero there.
            clean_rows(memory.k.tiles.index(CONSUMER), n_rows)
            fence_async_shared()
        keys = memory.k.tiles.index(CONSUMER).load(OPERAND)
        values = memory.v.tiles.index(CONSUMER).load(OPERAND)
        last_step = step + (edge_tiles + interior_tiles) * p.GROUP - 1
        scores = gl.zeros([ROWS, p.BLOCK_Q], gl.float32, product_layout(p.BLOCK_Q))
        if step <= last_step:
            scores = _multiply_scores(p, memory, step, keys)
            scores = warpgroup_mma_wait(0, deps=[scores])

        late = schedule.late_edges(turn)
        for part in range(2):
            run, tiles, col, left, first, stop, col_stop = first_edges(
                p, schedule, turn, part, rows, direction, edge_run, edge_tiles, late
            )
            for tile in range(tiles):
                for _member in range(p.GROUP):
                    cleaned = clean_queries(p, memory, agreement, step, col_stop - col, cleaned, CONSUMER)
                    scores, dk_acc, dv_acc = _accumulate_tile(
                        p, memory, dscores_ring, step, last_step, keys, values, scores, dk_acc, dv_acc, first, stop, col,
                        True, CONSUMER,
                    )  # fmt: skip
                    step += 1
                run, col, left, first, stop, col_stop = next_edge_tile(
                    p.runs_ptr, run, col, left, first, stop, col_stop, rows, direction, tiles - 1 - tile, p.BLOCK_Q
                )
            for _ in range(interior_of_part(part, interior_tiles * p.GROUP)):
                scores, dk_acc, dv_acc = _accumulate_tile(
                    p, memory, dscores_ring, step, last_step, keys, values, scores, dk_acc, dv_acc, rows, rows, 0,
                    False, CONSUMER,
                )  # fmt: skip
                step += 1

        memory.k.release(kv_step)
        memory.v.release(kv_step)
        write_dk(p, kv_head, 0, dk_acc, first_row, n_rows)
        write_dv(p, kv_head, 0, dv_acc, first_row, n_rows)
        schedule.heard(turn)
        turn += 1
        schedule.hear(turn)
        number = schedule.number(turn)


# ---- queries: dQ ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _send_dq(p, memory, dscores_ring, outbox, step, zero, row, n_valid, IS_MASKED: gl.constexpr):
    """Multiply a step's dQ and send it, with zeros from the tile's n_valid-th row on."""
    product: gl.constexpr = product_layout(p.HEAD_DIM)
    place = dscores_ring.slots.wait(step)
    dq = gl.zeros([ROWS, p.HEAD_DIM], gl.float32, product)
    for owner in gl.static_range(CONSUMERS):
        dscores = dscores_ring.tiles.index(place * CONSUMERS + owner)
        dq = warpgroup_mma(dscores.permute((1, 0)), memory.k.tiles.index(owner + zero), dq, use_acc=owner > 0, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    dscores_ring.release(step)
    if IS_MASKED:
        dq = zero_rows(dq, n_valid, product)
    outbox.send(step, dq, row, 0)


@gluon.jit
def consume_for_queries(p, memory, dscores_ring, outbox):
    schedule = memory.schedule
    step = 0
    turn = 0
    # As in backward_dkdv.py.
    zero = p.zero
    schedule.hear(turn)
    number = schedule.number(turn)
    while schedule.exists(number):
        first_head = schedule.head(turn) * p.GROUP
        direction = schedule.direction(turn)
        first_row, n_rows, edge_run, edge_tiles, interior_run, interior_tiles = schedule.item(turn, 0)
        rows = rows_of_item(p, first_row, n_rows)
        for owner in gl.static_range(CONSUMERS):
            memory.k.wait(turn * CONSUMERS + owner)

        late = schedule.late_edges(turn)
        for part in range(2):
            run, tiles, col, left, first, stop, col_stop = first_edges(
                p, schedule, turn, part, rows, direction, edge_run, edge_tiles, late
            )
            for tile in range(tiles):
                for member in range(p.GROUP):
                    zero = zero * 3
                    row = (first_head + member) * p.stride_stats_h + col
                    _send_dq(p, memory, dscores_ring, outbox, step, zero, row, col_stop - col, True)
                    step += 1
                run, col, left, first, stop, col_stop = next_edge_tile(
                    p.runs_ptr, run, col, left, first, stop, col_stop, rows, direction, tiles - 1 - tile, p.BLOCK_Q
                )
            run = interior_run
            col, left = first_interior(p, schedule, turn, direction)
            for _ in range(interior_of_part(part, interior_tiles)):
                for member in range(p.GROUP):
                    zero = zero * 3
                    row = (first_head + member) * p.stride_stats_h + col
                    _send_dq(p, memory, dscores_ring, outbox, step, zero, row, p.BLOCK_Q, False)
                    step += 1
                run, col, left = next_tile_of_walk(p.runs_ptr, run, col, left, direction, p.BLOCK_Q)

        for owner in gl.static_range(CONSUMERS):
            memory.k.release(turn * CONSUMERS + owner)
        schedule.heard(turn)
        turn += 1
        schedule.hear(turn)
        number = schedule.number(turn)
    tma.store_wait(pendings=0)
