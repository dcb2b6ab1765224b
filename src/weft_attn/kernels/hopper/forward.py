"""Forward on Hopper: a producer warp feeds two or three consumer warp groups that attend 64 query rows each.

    out_i = sum_j exp(s_ij - lse_i) v_j,   lse_i = log(sum_j exp(s_ij) + exp(sink))

q (Tq, Hq, D), k, v (Tk, Hkv, D): fp16 or bf16, D 64, 128 or 256; out (Tq, Hq, D) like q; lse (Hq, Tq) float32, natural log.
The grid is persistent (schedule.py): an item (plan/stream.py, the rows of all consumers) of one head at a time, longest first.
An item's edge tiles come first, so that the hot loop over interior tiles has no mask. Deterministic. Rows that see no key: out 0,
lse -inf (the sink, where there is one).
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from weft_attn.kernels.call import KernelCall
from weft_attn.kernels.hopper.by_rows import make_dealer, make_key_rings, start
from weft_attn.kernels.hopper.channel import Ring, make_ring
from weft_attn.kernels.hopper.compat import aggregate, store_box
from weft_attn.kernels.hopper.hold import hold
from weft_attn.kernels.hopper.pair import SharedRing
from weft_attn.kernels.hopper.schedule import EDGES, Schedule, grid_of, load_item, make_schedule
from weft_attn.kernels.hopper.tiles import (
    BY_ROWS,
    MINUS_INFINITY,
    ROWS,
    agree,
    clean_half,
    head_box,
    hide,
    load_keys_and_values,
    make_agreement,
    pack_operand,
    product_layout,
    unpack_operand,
    visible_words,
)
from weft_attn.kernels.hopper.turns import await_turn, begin_turns, end_turns, pass_turn
from weft_attn.kernels.hopper.votes import BALLOT, COLUMNS, any_exceeds, begin_votes
from weft_attn.kernels.triton import layout
from weft_attn.kernels.triton.forward import score_scales
from weft_attn.kernels.triton.tiles import cap_scores
from weft_attn.kernels.triton.visibility import interval_in_run, interval_in_slice, next_tile

# float32's least normal number, rounded up.
MIN_SCALE = 1.2e-38
# A row's shift is what its scores are lowered by: the largest one of a tile that it has seen, in powers of two. Before the first, this:
# the first score that the row sees has an infinite weight then.
LOWEST = gl.constexpr(-3.4028234663852886e38)
# The shift of what is no row of the item: its weights are 0 unless its scores are infinite or NaN, so that no vote is lost for it.
HIGHEST = gl.constexpr(3.4028234663852886e38)
# The shift serves while what a thread adds up of a tile is up to this, 2 ** 12, as bits of float32 and as PTX has it: 16-bit floats hold such
# weights, with the rounding that they have at 1. The row's largest score is never below the shift, so that its weight is 1 or more.
LIMIT_BITS = gl.constexpr(0x45800000)
LIMIT = gl.constexpr(f"0f{LIMIT_BITS.value:08X}")


@aggregate
class Problem:
    """What every warp role is told: tensors, tables, scalars and the tile sizes."""

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    out_desc: tma.tensor_descriptor
    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    sinks_ptr: gl.tensor
    items_ptr: gl.tensor
    runs_ptr: gl.tensor
    stride_qh: gl.tensor
    stride_kh: gl.tensor
    stride_vh: gl.tensor
    stride_ot: gl.tensor
    stride_oh: gl.tensor
    stride_lse_h: gl.tensor
    inner_scale: gl.tensor
    outer_scale: gl.tensor
    GROUP: gl.constexpr
    HEAD_DIM: gl.constexpr
    BLOCK_K: gl.constexpr
    CONSUMERS: gl.constexpr
    Q_IN_REGISTERS: gl.constexpr
    HAS_SOFTCAP: gl.constexpr
    HAS_SINKS: gl.constexpr
    scores_layout: gl.constexpr
    acc_layout: gl.constexpr
    IN_TURN: gl.constexpr
    PARTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, sinks_ptr, items_ptr, runs_ptr,
        stride_qh, stride_kh, stride_vh, stride_ot, stride_oh, stride_lse_h,
        inner_scale, outer_scale, GROUP, HEAD_DIM, BLOCK_K, CONSUMERS, Q_IN_REGISTERS, HAS_SOFTCAP, HAS_SINKS,
    ):  # fmt: skip
        self.q_desc, self.k_desc, self.v_desc, self.out_desc = q_desc, k_desc, v_desc, out_desc
        self.out_ptr, self.lse_ptr, self.sinks_ptr, self.items_ptr, self.runs_ptr = (
            out_ptr,
            lse_ptr,
            sinks_ptr,
            items_ptr,
            runs_ptr,
        )
        self.stride_qh, self.stride_kh, self.stride_vh = stride_qh, stride_kh, stride_vh
        self.stride_ot, self.stride_oh, self.stride_lse_h = stride_ot, stride_oh, stride_lse_h
        self.inner_scale, self.outer_scale = inner_scale, outer_scale
        self.GROUP = gl.constexpr(GROUP)
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.BLOCK_K = gl.constexpr(BLOCK_K)
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.Q_IN_REGISTERS = gl.constexpr(Q_IN_REGISTERS)
        self.HAS_SOFTCAP = gl.constexpr(HAS_SOFTCAP)
        self.HAS_SINKS = gl.constexpr(HAS_SINKS)
        self.scores_layout = gl.constexpr(product_layout(BLOCK_K))
        self.acc_layout = gl.constexpr(product_layout(HEAD_DIM))
        # Two consumers find opposite phases by themselves.
        self.IN_TURN = gl.constexpr(CONSUMERS > 2)
        # Parts of a tile that are weighed, and multiplied with V, one after the other. Of narrow heads, the product with V is over before
        # half the weights of the next tile are made; two consumers lose by halves all the same (docs/adr/0037).
        self.PARTS = gl.constexpr(2 if HEAD_DIM < 128 and CONSUMERS > 2 else 1)


@aggregate
class Memory:
    """Shared memory of a program."""

    schedule: Schedule
    q: Ring
    k: Ring | SharedRing
    v: Ring | SharedRing
    out: gl.shared_memory_descriptor
    v_cleaned: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, schedule, q, k, v, out, v_cleaned):
        self.schedule, self.q, self.k, self.v, self.out, self.v_cleaned = schedule, q, k, v, out, v_cleaned


# ---- producer -------------------------------------------------------------------------------------------------------------


@gluon.jit
def _produce(p, memory):
    schedule = memory.schedule
    schedule.dealer.meet()
    step = 0
    turn = 0
    number = schedule.dealer.first()
    schedule.tell(turn, number, p.items_ptr, p.runs_ptr, False)
    while schedule.exists(number):
        item, head, _, _ = schedule.locate(number)
        row, edge_run, edge_tiles, interior_run, interior_tiles = load_item(p.items_ptr, item)
        is_short = schedule.is_short(edge_tiles + interior_tiles)
        if is_short:
            number = schedule.dealer.take(turn)
        for consumer in gl.static_range(p.CONSUMERS):
            memory.q.load(turn * p.CONSUMERS + consumer, p.q_desc, row + consumer * ROWS, head * p.stride_qh)
        kv_head = head // p.GROUP
        step = load_keys_and_values(p, memory, step, kv_head, edge_run, edge_tiles)
        if is_short:
            # After the tiles that this turn begins with.
            schedule.tell(turn + 1, number, p.items_ptr, p.runs_ptr, False)
        step = load_keys_and_values(p, memory, step, kv_head, interior_run, interior_tiles)
        if not is_short:
            number = schedule.dealer.take(turn)
            schedule.tell(turn + 1, number, p.items_ptr, p.runs_ptr, False)
        turn += 1
    schedule.finish()
    schedule.dealer.meet()


# ---- consumers ------------------------------------------------------------------------------------------------------------


@gluon.jit
def _multiply(p, q_operand, k_tile):
    """Begin the raw products of the rows with a tile of keys."""
    no_scores = gl.zeros([ROWS, p.BLOCK_K], gl.float32, p.scores_layout)
    return warpgroup_mma(q_operand, k_tile.permute((1, 0)), no_scores, use_acc=False, is_async=True)


@gluon.jit
def _as_seen(p, scores, words, IS_MASKED: gl.constexpr):
    """Raw products capped, and -inf where `words` (`visible_words`) hide them."""
    if p.HAS_SOFTCAP:
        scores = cap_scores(scores, p.inner_scale)
    if IS_MASKED:
        scores = hide(scores, words, MINUS_INFINITY)
    return scores


@gluon.jit
def _largest(p, scores):
    # The scale is positive: a hidden score stays -inf, and its weight is 0.
    return gl.max(scores, 1) * p.outer_scale


@gluon.jit
def _parts(p, scores):
    """The columns of a tile that are weighed one after the other."""
    if p.PARTS > 1:
        HALF: gl.constexpr = p.BLOCK_K // 2
        layout_of_half: gl.constexpr = product_layout(HALF)
        first, second = gl.split(scores.reshape([ROWS, 2, HALF]).permute((0, 2, 1)))
        first = gl.convert_layout(first, layout_of_half, assert_trivial=True)
        return first, gl.convert_layout(second, layout_of_half, assert_trivial=True)
    else:
        return (scores,)


@gluon.jit
def _weigh(p, scores, shift):
    """Weights of a part, 2 ** (score - shift), and their sums by rows, what each thread adds up: it asks no other before the item's end."""
    part_shift = gl.convert_layout(shift, gl.SliceLayout(1, scores.type.layout), assert_trivial=True)
    weights = gl.exp2(scores * p.outer_scale - part_shift[:, None])
    # A thread has the neighbours 8 j + {0, 1} from its first column on.
    sums = gl.sum(gl.sum(weights.reshape([weights.shape[0], weights.shape[1] // (2 * COLUMNS), COLUMNS, 2]), 3), 1)
    return weights, gl.convert_layout(sums, BALLOT)


@gluon.jit
def _weigh_all(p, scores, shift):
    """A tile's weights by parts, and their sums."""
    parts = _parts(p, scores)
    first, sums = _weigh(p, parts[0], shift)
    if p.PARTS > 1:
        second, second_sums = _weigh(p, parts[1], shift)
        return (first, second), sums + second_sums
    else:
        return (first,), sums


@gluon.jit
def _pack(p, weights):
    """Weights by parts, as a loop carries them on."""
    first = pack_operand(weights[0], p.v_desc.dtype)
    if p.PARTS > 1:
        return first, pack_operand(weights[1], p.v_desc.dtype)
    else:
        return (first,)


@gluon.jit
def _add_values(p, weights, v_tile, acc):
    """Begin to add a tile's values, times their weights: as many products as parts."""
    KEYS: gl.constexpr = p.BLOCK_K // p.PARTS
    for part in gl.static_range(p.PARTS):
        operand = unpack_operand(weights[part], p.v_desc.dtype, p.acc_layout)
        acc = warpgroup_mma(operand, v_tile.slice(part * KEYS, KEYS, dim=0), acc, is_async=True)
    return acc


@gluon.jit
def _rescale_rows(tile, factor):
    """A tile times a factor for each row."""
    return tile * gl.convert_layout(factor, gl.SliceLayout(1, tile.type.layout))[:, None]


@gluon.jit
def _clean_values(memory, step, n_valid, cleaned, CONSUMER: gl.constexpr):
    """Zero what a value tile holds beyond its slice."""
    clean_half(memory.v.wait(step), n_valid, CONSUMER)
    agree(memory.v_cleaned, cleaned)


@gluon.jit
def _attend_stream(
    p, memory, step, q_operand, weights, acc, shift, row_sum, rows, run, col, left, n_tiles, cleaned,
    IS_MASKED: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """The tiles of one stream after the item's first: each product with K runs while the last one's with V does.

    Nobody looks for the largest score of a tile: whether the rows' shifts still serve is asked of the sums that they make (docs/adr/0033).
    """
    for _ in range(n_tiles):
        k_tile = memory.k.wait(step)
        if p.IN_TURN:
            await_turn(CONSUMER, p.CONSUMERS)
        scores = _multiply(p, q_operand, k_tile)
        acc = _add_values(p, weights, memory.v.wait(step - 1), acc)
        if p.IN_TURN:
            pass_turn(CONSUMER, p.CONSUMERS)
        words = rows  # Never read where nothing is hidden; a name needs a value.
        if IS_MASKED:
            first, stop, col_stop = interval_in_run(p.runs_ptr + run * layout.RUN_WIDTH, rows)
            words = visible_words(first, stop, col, p.scores_layout)
        scores = warpgroup_mma_wait(p.PARTS, deps=[scores])
        parts = _parts(p, _as_seen(p, scores, words, IS_MASKED))
        first_weights, sums = _weigh(p, parts[0], shift)
        if p.PARTS > 1:
            # Behind the first half: until then this consumer's product with V runs beside its weights, and then leaves its registers to
            # the packed ones, which cost least among exponentials.
            sums = hold(sums, p.CONSUMERS)
            acc = warpgroup_mma_wait(0, deps=[acc])
            memory.v.release(step - 1)
            second_weights, second_sums = _weigh(p, parts[1], shift)
            weights = _pack(p, (first_weights, second_weights))
            exceeds, sums = any_exceeds(sums + second_sums, LIMIT, CONSUMER, p.CONSUMERS)
        else:
            exceeds, sums = any_exceeds(sums, LIMIT, CONSUMER, p.CONSUMERS)
            # Not before the vote: until then this consumer's product with V runs beside its weights.
            acc = warpgroup_mma_wait(0, deps=[acc])
            memory.v.release(step - 1)
            weights = _pack(p, (first_weights,))
        if exceeds:
            # Rarely. The scores' registers hold their weights by now: multiply again. A row whose own sums are small keeps its shift, so
            # that its result is the same whatever its neighbours are.
            scores = _as_seen(p, warpgroup_mma_wait(0, deps=[_multiply(p, q_operand, k_tile)]), words, IS_MASKED)
            # The bits of what is not negative have its order, and those of NaN, which no comparison finds, come last.
            largest_sum = gl.convert_layout(gl.max(sums.to(gl.int32, bitcast=True), 1), shift.type.layout)
            new_shift = gl.where(largest_sum > LIMIT_BITS, gl.maximum(shift, _largest(p, scores)), shift)
            new_weights, sums = _weigh_all(p, scores, new_shift)
            rescale = gl.exp2(shift - new_shift)
            shift = new_shift
            row_sum = _rescale_rows(row_sum, rescale) + sums
            acc = _rescale_rows(acc, rescale)
            weights = _pack(p, new_weights)
        else:
            row_sum += sums
        memory.k.release(step)
        if IS_MASKED:
            if col_stop - col < p.BLOCK_K:
                _clean_values(memory, step, col_stop - col, cleaned, CONSUMER)
                cleaned += 1
            run, col, left = next_tile(p.runs_ptr, run, col, left, p.BLOCK_K)
        step += 1
    return step, weights, acc, shift, row_sum, cleaned


@gluon.jit
def _consume(p, memory, CONSUMER: gl.constexpr):
    schedule = memory.schedule
    begin_votes(CONSUMER)
    step = 0
    cleaned = 0
    row_layout: gl.constexpr = gl.SliceLayout(1, p.scores_layout)
    turn = 0
    schedule.dealer.meet()
    if p.IN_TURN:
        begin_turns(CONSUMER, p.CONSUMERS)
    schedule.hear(turn)
    number = schedule.number(turn)
    while schedule.exists(number):
        first_row, n_rows, edge_run, edge_tiles, _interior_run, interior_tiles = schedule.item(turn, CONSUMER)
        col, left = schedule.run(turn, EDGES)
        row_start, row_len, col_start, col_len, lo, hi = schedule.slice_of_run(turn, EDGES)
        rows = first_row + gl.arange(0, ROWS, row_layout)
        shift = gl.where(rows < first_row + n_rows, LOWEST, HIGHEST)
        row_sum = gl.zeros([ROWS, COLUMNS], gl.float32, BALLOT)
        acc = gl.zeros([ROWS, p.HEAD_DIM], gl.float32, p.acc_layout)
        q_step = turn * p.CONSUMERS + CONSUMER
        q_tile = memory.q.wait(q_step)
        q_operand = q_tile.load(gl.DotOperandLayout(0, p.scores_layout, 2)) if p.Q_IN_REGISTERS else q_tile
        if edge_tiles + interior_tiles > 0:
            # The item's first tile, with nothing before it. In an interior tile every row sees every column.
            scores = warpgroup_mma_wait(0, deps=[_multiply(p, q_operand, memory.k.wait(step))])
            if p.Q_IN_REGISTERS:
                # Not before: only a product that has used the registers says that what was read from shared memory has come.
                memory.q.release(q_step)
            memory.k.release(step)
            is_edge = edge_tiles > 0
            first, stop, col_stop = interval_in_slice(rows, row_start, row_len, col_start, col_len, lo, hi)
            first = gl.where(is_edge, first, col)
            stop = gl.where(is_edge, stop, col + p.BLOCK_K)
            scores = _as_seen(p, scores, visible_words(first, stop, col, p.scores_layout), True)
            shift = gl.maximum(shift, _largest(p, scores))
            new_weights, row_sum = _weigh_all(p, scores, shift)
            weights = _pack(p, new_weights)
            if is_edge & (col_stop - col < p.BLOCK_K):
                _clean_values(memory, step, col_stop - col, cleaned, CONSUMER)
                cleaned += 1
            step += 1

            run, col, left = next_tile(p.runs_ptr, edge_run, col, left, p.BLOCK_K)
            step, weights, acc, shift, row_sum, cleaned = _attend_stream(
                p, memory, step, q_operand, weights, acc, shift, row_sum, rows, run, col, left,
                gl.maximum(edge_tiles - 1, 0), cleaned, True, CONSUMER,
            )  # fmt: skip
            step, weights, acc, shift, row_sum, cleaned = _attend_stream(
                p, memory, step, q_operand, weights, acc, shift, row_sum, rows, run, col, left,
                gl.where(is_edge, interior_tiles, interior_tiles - 1), cleaned, False, CONSUMER,
            )  # fmt: skip
            acc = _add_values(p, weights, memory.v.wait(step - 1), acc)
            acc = warpgroup_mma_wait(0, deps=[acc])
            memory.v.release(step - 1)
        elif p.Q_IN_REGISTERS:
            memory.q.release(q_step)
        row_sum = gl.convert_layout(gl.sum(row_sum, 1), row_layout)
        # Read once more: the loops have a use for the registers.
        head = schedule.head(turn)
        first_row, n_rows, _edge_run, _edge_tiles, _interior_run, _interior_tiles = schedule.item(turn, CONSUMER)
        rows = first_row + gl.arange(0, ROWS, row_layout)
        _write(p, memory, acc, shift, row_sum, rows, first_row, n_rows, head, CONSUMER)
        if not p.Q_IN_REGISTERS:
            # The result left through q's memory, which a ragged tile is read back from.
            tma.store_wait(pendings=0)
            fence_async_shared()
            memory.q.release(q_step)
        schedule.heard(turn)
        turn += 1
        schedule.hear(turn)
        number = schedule.number(turn)
    if p.IN_TURN:
        end_turns(CONSUMER, p.CONSUMERS)
    tma.store_wait(pendings=0)
    schedule.dealer.meet()


@gluon.jit
def _write(p, memory, acc, shift, row_sum, rows, first_row, n_rows, head, CONSUMER: gl.constexpr):
    """Normalise and write 64 rows of out and lse: through the copy engine, or by rows where the tile is ragged."""
    if p.HAS_SINKS:
        sink_log2 = gl.load(p.sinks_ptr + head) * layout.LOG2_E
        new_shift = gl.maximum(shift, sink_log2)
        rescale = gl.exp2(shift - new_shift)
        row_sum = row_sum * rescale + gl.exp2(sink_log2 - new_shift)
        acc = _rescale_rows(acc, rescale)
        shift = new_shift
    sees_nothing = row_sum == 0
    share = 1.0 / gl.where(sees_nothing, 1.0, row_sum)
    lse = gl.where(sees_nothing, float("-inf"), (shift + gl.log2(row_sum)) * layout.LN_2)
    is_row = rows < first_row + n_rows
    gl.store(p.lse_ptr + head.to(gl.int64) * p.stride_lse_h + rows, lse, mask=is_row)

    out_tile = _rescale_rows(acc, share).to(p.out_desc.dtype)
    out_smem = memory.out.index(CONSUMER)
    # The last item's tile must have left before this one comes.
    tma.store_wait(pendings=0)
    out_smem.store(out_tile)
    if n_rows >= ROWS:
        fence_async_shared()
        store_box(p.out_desc, [first_row, head * p.stride_oh], out_smem)
    else:
        # A full box would write over the next document's rows.
        out_rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, BY_ROWS))
        dims = gl.arange(0, p.HEAD_DIM, gl.SliceLayout(0, BY_ROWS))
        offsets = out_rows.to(gl.int64)[:, None] * p.stride_ot + dims[None, :]
        ptrs = p.out_ptr + head.to(gl.int64) * p.stride_oh + offsets
        gl.store(ptrs, out_smem.load(BY_ROWS), mask=(out_rows < first_row + n_rows)[:, None])


@gluon.jit(do_not_specialize=layout.OF_THE_BATCH)
def hopper_forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    items_ptr,
    runs_ptr,
    stride_qh,
    stride_kh,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_lse_h,
    n_items,
    n_heads,
    heads_per_wave,
    counter_ptr,
    inner_scale,
    outer_scale,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_K: gl.constexpr,
    CONSUMERS: gl.constexpr,
    K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    IN_PAIRS: gl.constexpr,
    LAYOUT_DIGEST: gl.constexpr,
):
    # An integer that is 1 comes as a constant.
    p = Problem(
        q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, sinks_ptr, items_ptr, runs_ptr,
        gl.to_tensor(stride_qh), gl.to_tensor(stride_kh), gl.to_tensor(stride_vh),
        gl.to_tensor(stride_ot), gl.to_tensor(stride_oh), gl.to_tensor(stride_lse_h),
        inner_scale, outer_scale, GROUP, HEAD_DIM, BLOCK_K, CONSUMERS, Q_IN_REGISTERS, HAS_SOFTCAP, HAS_SINKS,
    )  # fmt: skip
    dealer = make_dealer(counter_ptr, IN_PAIRS)
    schedule = make_schedule(
        dealer, gl.to_tensor(n_items), gl.to_tensor(n_heads), gl.to_tensor(heads_per_wave), gl.to_tensor(0), CONSUMERS,
        PRODUCER_WARPS=1,
    )  # fmt: skip
    # A slot of q for each consumer, which only that consumer releases.
    q = make_ring(q_desc, CONSUMERS, 1)
    k, v = make_key_rings(k_desc, v_desc, dealer, "hopper_forward_kernel", 1, K_STAGES, V_STAGES, CONSUMERS, IN_PAIRS)
    # Where q stays in shared memory until the item's end, the result takes its place.
    out = q.tiles
    if Q_IN_REGISTERS:
        out = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, ROWS, HEAD_DIM], out_desc.layout)
    memory = Memory(schedule, q, k, v, out, make_agreement(CONSUMERS))
    fence_async_shared()
    start(_produce, _consume, p, memory, CONSUMERS, CONSUMER_REGISTERS, IN_PAIRS)


def hopper_forward_call(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    items: torch.Tensor,
    runs: torch.Tensor,
    n_items: int,
    heads_per_wave: int,
    counter: torch.Tensor,
    softmax_scale: float,
    softcap: float,
    multiprocessors: int,
    config: Any,
) -> KernelCall:
    """The Hopper forward's launch.

    Args:
        q, k, v, out, lse: as in the module's text; the last dimension of q, k, v, out is contiguous, strides in whole 16 bytes.
        sinks: (Hq,) float32 or None.
        items, runs: tables of plan/stream.py, cut as config.cut says, not split.
        heads_per_wave: heads whose items run together.
        counter: (COUNTER_SIZE,) int32, zero; zero again afterwards.
        multiprocessors: programs of the persistent grid at most.
        config: a launch `HopperForwardConfig`.
    """
    heads, head_dim = q.shape[1], q.shape[2]
    inner_scale, outer_scale = score_scales(softmax_scale, softcap)
    return KernelCall(
        kernel=hopper_forward_kernel,
        grid=grid_of(multiprocessors, n_items, heads, heads // k.shape[1], config.cluster),
        arguments=dict(
            q_desc=head_box(q, ROWS.value),
            k_desc=head_box(k, config.block_k // config.cluster),
            v_desc=head_box(v, config.block_k // config.cluster),
            out_desc=head_box(out, ROWS.value),
            out_ptr=out,
            lse_ptr=lse,
            # Never read without sinks; an argument has to be a pointer.
            sinks_ptr=lse if sinks is None else sinks,
            items_ptr=items,
            runs_ptr=runs,
            stride_qh=q.stride(1),
            stride_kh=k.stride(1),
            stride_vh=v.stride(1),
            stride_ot=out.stride(0),
            stride_oh=out.stride(1),
            stride_lse_h=lse.stride(0),
            n_items=n_items,
            n_heads=heads // config.cluster,
            heads_per_wave=max(1, heads_per_wave // config.cluster),
            counter_ptr=counter,
            inner_scale=inner_scale,
            # A scale of zero makes all that is seen equal, but not what is hidden: 0 times -inf is NaN.
            outer_scale=max(outer_scale, MIN_SCALE),
        ),
        constants=dict(
            LAYOUT_DIGEST=layout.DIGEST,
            GROUP=heads // k.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_K=config.block_k,
            CONSUMERS=config.consumers,
            K_STAGES=config.num_stages,
            V_STAGES=config.value_stages or config.num_stages,
            Q_IN_REGISTERS=config.q_in_registers,
            HAS_SOFTCAP=softcap > 0,
            HAS_SINKS=sinks is not None,
            CONSUMER_REGISTERS=config.consumer_registers,
            IN_PAIRS=config.cluster > 1,
        ),
        num_warps=config.num_warps,
        num_stages=1,
        max_registers=config.max_registers,
        cluster=config.cluster,
    )
