"""Backward on Hopper, all gradients at head dim 256: the consumers of hopper/backward.py that divide the five products among three.

    P_ij = exp2(s_ij - lse_log2_i),   dV_j = sum_i P_ij dout_i
    dS_ij = P_ij (dout_i.v_j - delta_i),   dK_j = scale * sum_i dS_ij q_i,   dQ_i = scale * sum_j dS_ij k_j

dK and dV of 64 keys fill half of the register file, so an item has 64 keys and each of them a warp group of its own, which does
nothing else: every product is as wide as there is, which is what spares shared memory, the bound of this kernel. The third warp
group computes S and dP, hands P and dS to the other two through shared memory, and computes dQ, which the copy engine adds to dq_sum
(Hq, Tq, D) float32, unscaled, in whatever order items come: not deterministic. What a query tile holds beyond its slice gets zeros
added. An item with fewer than 64 keys must come without interior tiles, as in backward_fused.py.
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
from weft_attn.kernels.hopper.compat import aggregate
from weft_attn.kernels.hopper.outbox import BOX_COLUMNS, Outbox, make_outbox
from weft_attn.kernels.hopper.tiles import ROWS, clean_rows, product_layout, zero_rows
from weft_attn.kernels.triton.visibility import interior_of_part, next_edge_tile, next_tile_of_walk

# dout is read early in a step and at once, q from the step before to the step's end: one slot is enough, and makes room for dQ.
DOUT_STAGES = gl.constexpr(1)
# Room for boxes of dQ. A step sends four: turns go on from step to step.
PLACES = gl.constexpr(2)


@aggregate
class Exchange:
    """What the warp group of S and dP hands on.

    Attributes:
        probs, dscores: P for dV and dS for dK, (64 keys, BLOCK_Q) in the input dtype.
        outbox: of the boxes of a query tile's dQ.
    """

    probs: Ring
    dscores: Ring
    outbox: Outbox

    @gluon.constexpr_function
    def __init__(self, probs, dscores, outbox):
        self.probs, self.dscores, self.outbox = probs, dscores, outbox


@gluon.jit
def _make_handover(p):
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, p.BLOCK_Q], p.q_desc.dtype)
    return Ring(gl.allocate_shared_memory(p.q_desc.dtype, [1, ROWS, p.BLOCK_Q], tile_layout), make_slots(1, 1))


@gluon.jit
def make_wide_exchange(p, memory, dq_sum_desc):
    outbox = make_outbox(dq_sum_desc, memory.slots, PLACES, False)
    return Exchange(_make_handover(p), _make_handover(p), outbox)


# ---- dV and dK ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _add_product(weights, queries, slots, step, zero, acc_left, acc_right):
    """Wait for the step's two factors, add their product to the halves of the columns, (64 keys, D // 2) float32, release them."""
    COLUMNS: gl.constexpr = acc_left.shape[1]
    weights.slots.wait(step)
    weights_tile = weights.tiles.index(zero)
    queries_tile = queries.index(slots.wait(step) + zero)
    acc_left = warpgroup_mma(weights_tile, queries_tile.slice(0, COLUMNS, dim=1), acc_left, is_async=True)
    acc_right = warpgroup_mma(weights_tile, queries_tile.slice(COLUMNS, COLUMNS, dim=1), acc_right, is_async=True)
    acc_left, acc_right = warpgroup_mma_wait(0, deps=[acc_left, acc_right])
    weights.release(step)
    slots.release(step)
    return acc_left, acc_right


@gluon.jit
def sum_products(p, memory, exchange, IS_DV: gl.constexpr):
    """The consumer that sums dV, or the one that sums dK."""
    COLUMNS: gl.constexpr = p.HEAD_DIM // 2
    schedule = memory.schedule
    step = 0
    turn = 0
    # As in backward_dkdv.py.
    zero = p.zero
    schedule.hear(turn)
    number = schedule.number(turn)
    while schedule.exists(number):
        kv_head = schedule.head(turn)
        first_row, n_rows, _, edge_tiles, _, interior_tiles = schedule.item(turn, 0)
        # In halves: under ptxas 12.8 a kernel of four warp groups takes no wider product.
        acc_left = gl.zeros([ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
        acc_right = gl.zeros([ROWS, COLUMNS], gl.float32, product_layout(COLUMNS))
        for _ in range((edge_tiles + interior_tiles) * p.GROUP):
            zero = zero * 3
            if IS_DV:
                acc_left, acc_right = _add_product(
                    exchange.probs, memory.dout, memory.dout_slots, step, zero, acc_left, acc_right
                )
            else:
                acc_left, acc_right = _add_product(exchange.dscores, memory.q, memory.slots, step, zero, acc_left, acc_right)
            step += 1
        if IS_DV:
            write_dv(p, kv_head, 0, acc_left, first_row, n_rows)
            write_dv(p, kv_head, COLUMNS, acc_right, first_row, n_rows)
        else:
            write_dk(p, kv_head, 0, acc_left, first_row, n_rows)
            write_dk(p, kv_head, COLUMNS, acc_right, first_row, n_rows)
        schedule.heard(turn)
        turn += 1
        schedule.hear(turn)
        number = schedule.number(turn)


# ---- S, dP and dQ -------------------------------------------------------------------------------------------------------


@gluon.jit
def _multiply_scores(p, memory, step, zero):
    """Start the product of the keys and a step's queries, once they are there."""
    slot = memory.slots.wait(step)
    return multiply_scores(p, memory, slot, memory.k.tiles.index(zero))


@gluon.jit
def _multiply_dq(p, memory, exchange, zero, HALF: gl.constexpr):
    """Start one half of the columns of the step's dQ."""
    COLUMNS: gl.constexpr = 2 * BOX_COLUMNS
    keys = memory.k.tiles.index(zero).slice(HALF * COLUMNS, COLUMNS, dim=1)
    nothing = gl.zeros([p.BLOCK_Q, COLUMNS], gl.float32, product_layout(COLUMNS))
    dscores = exchange.dscores.tiles.index(zero).permute((1, 0))
    return warpgroup_mma(dscores, keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def _send_half(exchange, dq, row, HALF: gl.constexpr):
    """Send a half of a query tile's dQ to be added."""
    boxes = dq.reshape([dq.shape[0], 2, BOX_COLUMNS]).permute((0, 2, 1)).split()
    for i in gl.static_range(2):
        box = 2 * HALF + i
        exchange.outbox.send(box, gl.convert_layout(boxes[i], product_layout(BOX_COLUMNS)), row, box * BOX_COLUMNS)


@gluon.jit
def _clean_queries(p, memory, step, n_valid):
    """Zero what a query tile holds from its n_valid-th row on, before the other consumers are handed what they multiply it with."""
    if n_valid < p.BLOCK_Q:
        clean_rows(memory.q.index(step % memory.slots.STAGES), n_valid)
        clean_rows(memory.dout.index(memory.dout_slots.wait(step)), n_valid)
        fence_async_shared()


@gluon.jit
def _weigh_tile(p, memory, exchange, step, last_step, zero, scores, first, stop, col, n_valid, head, IS_MASKED: gl.constexpr):
    """Hand on P and dS of one query tile of one head, and send its dQ; the next step's scores."""
    slot = step % memory.slots.STAGES
    dout_slot = memory.dout_slots.wait(step)
    dprobs = multiply_dprobs(p, memory, slot, memory.v.tiles.index(zero), memory.dout.index(dout_slot + zero))
    seen = first
    if IS_MASKED:
        seen = seen_by(p, first, stop, col)
    probs, scores = weigh(p, memory, slot, scores, seen, IS_MASKED)
    exchange.probs.put(step, probs.to(p.q_desc.dtype), zero)
    dprobs = warpgroup_mma_wait(0, deps=[dprobs])
    memory.dout_slots.release(step)
    exchange.dscores.put(step, differentiate(p, memory, slot, probs, scores, dprobs, seen, IS_MASKED), zero)
    dq_left = _multiply_dq(p, memory, exchange, zero, 0)
    dq_right = _multiply_dq(p, memory, exchange, zero, 1)
    row = head * p.stride_stats_h + col
    dq_left = warpgroup_mma_wait(1, deps=[dq_left])
    if IS_MASKED:
        dq_left = zero_rows(dq_left, n_valid, product_layout(2 * BOX_COLUMNS))
    _send_half(exchange, dq_left, row, 0)
    # Runs while the other half leaves; not before, for want of registers. After the item's last step its own once more, for nothing: a
    # branch here would keep products from overlapping.
    next_scores = _multiply_scores(p, memory, gl.minimum(step + 1, last_step), zero)
    dq_right = warpgroup_mma_wait(1, deps=[dq_right])
    if IS_MASKED:
        dq_right = zero_rows(dq_right, n_valid, product_layout(2 * BOX_COLUMNS))
    _send_half(exchange, dq_right, row, 1)
    next_scores = warpgroup_mma_wait(0, deps=[next_scores])
    memory.slots.release(step)
    return next_scores


@gluon.jit
def weigh_and_differentiate(p, memory, exchange):
    """The consumer of S and dP, which makes P, dS and dQ of them."""
    schedule = memory.schedule
    step = 0
    turn = 0
    # As in backward_dkdv.py.
    zero = p.zero
    schedule.hear(turn)
    number = schedule.number(turn)
    while schedule.exists(number):
        kv_head = schedule.head(turn)
        direction = schedule.direction(turn)
        first_row, n_rows, edge_run, edge_tiles, interior_run, interior_tiles = schedule.item(turn, 0)
        rows = rows_of_item(p, first_row, n_rows)
        memory.k.wait(turn)
        memory.v.wait(turn)
        if n_rows < ROWS:
            # Others' keys, times dS that is zero there.
            clean_rows(memory.k.tiles.index(0), n_rows)
            fence_async_shared()
        last_step = step + (edge_tiles + interior_tiles) * p.GROUP - 1
        scores = gl.zeros([ROWS, p.BLOCK_Q], gl.float32, product_layout(p.BLOCK_Q))
        if step <= last_step:
            scores = _multiply_scores(p, memory, step, zero)
            scores = warpgroup_mma_wait(0, deps=[scores])

        first_head = kv_head * p.GROUP
        late = schedule.late_edges(turn)
        for part in range(2):
            run, tiles, col, left, first, stop, col_stop = first_edges(
                p, schedule, turn, part, rows, direction, edge_run, edge_tiles, late
            )
            for tile in range(tiles):
                for member in range(p.GROUP):
                    zero = zero * 3
                    _clean_queries(p, memory, step, col_stop - col)
                    scores = _weigh_tile(
                        p, memory, exchange, step, last_step, zero, scores, first, stop, col, col_stop - col,
                        first_head + member, True,
                    )  # fmt: skip
                    step += 1
                run, col, left, first, stop, col_stop = next_edge_tile(
                    p.runs_ptr, run, col, left, first, stop, col_stop, rows, direction, tiles - 1 - tile, p.BLOCK_Q
                )
            run = interior_run
            col, left = first_interior(p, schedule, turn, direction)
            for _ in range(interior_of_part(part, interior_tiles)):
                for member in range(p.GROUP):
                    zero = zero * 3
                    scores = _weigh_tile(
                        p, memory, exchange, step, last_step, zero, scores, rows, rows, col, p.BLOCK_Q,
                        first_head + member, False,
                    )  # fmt: skip
                    step += 1
                run, col, left = next_tile_of_walk(p.runs_ptr, run, col, left, direction, p.BLOCK_Q)

        memory.k.release(turn)
        memory.v.release(turn)
        schedule.heard(turn)
        turn += 1
        schedule.hear(turn)
        number = schedule.number(turn)
    tma.store_wait(pendings=0)
