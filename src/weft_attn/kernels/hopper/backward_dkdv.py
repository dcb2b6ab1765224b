"""Backward on Hopper, dK and dV alone: the consumers of hopper/backward.py that compute four products, each for itself.

    P_ij = exp2(s_ij - lse_log2_i),   dV_j = sum_i P_ij dout_i
    dS_ij = P_ij (dout_i.v_j - delta_i),   dK_j = scale * sum_i dS_ij q_i

Deterministic: the order in which a key's gradient is summed is fixed by the plan, the heads and the grid. Keys that nobody sees get
zeros.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from weft_attn.kernels.hopper.by_keys import (
    clean_queries,
    differentiate,
    first_edges,
    multiply_dprobs,
    multiply_scores,
    seen_by,
    weigh,
    write_dk,
    write_dv,
)
from weft_attn.kernels.hopper.tiles import CONSUMERS, ROWS, as_operand, product_layout
from weft_attn.kernels.triton.visibility import interior_of_part, next_edge_tile


@gluon.jit
def _accumulate_tile(p, memory, step, own_slot, dk_acc, dv_acc, first, stop, col, IS_MASKED: gl.constexpr):
    """One query tile of one head into dk_acc and dv_acc, (64 keys, D) float32."""
    acc_layout: gl.constexpr = product_layout(p.HEAD_DIM)
    slot = step % memory.slots.STAGES
    q_tile = memory.q.index(slot)
    dout_tile = memory.dout.index(slot)
    scores = multiply_scores(p, memory, slot, memory.k.tiles.index(own_slot))
    dprobs = multiply_dprobs(p, memory, slot, memory.v.tiles.index(own_slot), dout_tile)
    seen = first
    if IS_MASKED:
        seen = seen_by(p, first, stop, col)
    scores = warpgroup_mma_wait(1, deps=[scores])
    probs, scores = weigh(p, memory, slot, scores, seen, IS_MASKED)
    probs_operand = as_operand(probs, p.q_desc.dtype, acc_layout)
    dv_acc = warpgroup_mma(probs_operand, dout_tile, dv_acc, is_async=True)
    dprobs = warpgroup_mma_wait(1, deps=[dprobs])
    dscores = differentiate(p, memory, slot, probs, scores, dprobs, seen, IS_MASKED)
    dscores_operand = as_operand(dscores, p.q_desc.dtype, acc_layout)
    dk_acc = warpgroup_mma(dscores_operand, q_tile, dk_acc, is_async=True)
    # The operands too: their registers are read until the products are done.
    dk_acc, dv_acc, _, _ = warpgroup_mma_wait(0, deps=[dk_acc, dv_acc, probs_operand, dscores_operand])
    memory.slots.release(step)
    return dk_acc, dv_acc


@gluon.jit
def consume_for_dkdv(p, memory, agreement, CONSUMER: gl.constexpr):
    schedule = memory.schedule
    step = 0
    turn = 0
    cleaned = 0
    # Stays 0, which the compiler cannot know. Where it sees that the tiles of k and v do not change, it takes their descriptors out
    # of the loops, and ptxas 12.8 then leaves them undefined for an item without edge tiles.
    zero = p.zero
    acc_layout: gl.constexpr = product_layout(p.HEAD_DIM)
    row_layout: gl.constexpr = gl.SliceLayout(1, product_layout(p.BLOCK_Q))
    schedule.hear(turn)
    number = schedule.number(turn)
    while schedule.exists(number):
        kv_head = schedule.head(turn)
        direction = schedule.direction(turn)
        first_row, n_rows, edge_run, edge_tiles, _, interior_tiles = schedule.item(turn, CONSUMER)
        rows = first_row + gl.arange(0, ROWS, row_layout)
        dk_acc = gl.zeros([ROWS, p.HEAD_DIM], gl.float32, acc_layout)
        dv_acc = gl.zeros([ROWS, p.HEAD_DIM], gl.float32, acc_layout)
        kv_step = turn * CONSUMERS + CONSUMER
        memory.k.wait(kv_step)
        memory.v.wait(kv_step)

        late = schedule.late_edges(turn)
        for part in range(2):
            run, tiles, col, left, first, stop, col_stop = first_edges(
                p, schedule, turn, part, rows, direction, edge_run, edge_tiles, late
            )
            for tile in range(tiles):
                for _member in range(p.GROUP):
                    memory.slots.wait(step)
                    zero = zero * 3
                    cleaned = clean_queries(p, memory, agreement, step, col_stop - col, cleaned, CONSUMER)
                    dk_acc, dv_acc = _accumulate_tile(p, memory, step, CONSUMER + zero, dk_acc, dv_acc, first, stop, col, True)
                    step += 1
                run, col, left, first, stop, col_stop = next_edge_tile(
                    p.runs_ptr, run, col, left, first, stop, col_stop, rows, direction, tiles - 1 - tile, p.BLOCK_Q
                )
            for _ in range(interior_of_part(part, interior_tiles * p.GROUP)):
                memory.slots.wait(step)
                zero = zero * 3
                dk_acc, dv_acc = _accumulate_tile(p, memory, step, CONSUMER + zero, dk_acc, dv_acc, rows, rows, 0, False)
                step += 1

        memory.k.release(kv_step)
        memory.v.release(kv_step)
        write_dk(p, kv_head, 0, dk_acc, first_row, n_rows)
        write_dv(p, kv_head, 0, dv_acc, first_row, n_rows)
        schedule.heard(turn)
        turn += 1
        schedule.hear(turn)
        number = schedule.number(turn)
