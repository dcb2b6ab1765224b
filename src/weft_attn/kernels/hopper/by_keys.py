"""What the Hopper backward kernels that walk the plan by keys share: their tables and tensors, their shared memory, their producer.

Everything is transposed: rows of a tile are keys, columns queries, items come from the transposed plan (keys of one KV head in tiles of
64). The query heads of a group are walked inside each tile, and tiles in the schedule's direction, edge tiles before or behind interior ones
(`edges_of_part`).
q, dout (Tq, Hq, D), k, v (Tk, Hkv, D): fp16 or bf16; lse_log2 and delta (Hq * Tq) float32 from triton/delta.py or
backward_dq.py; dk, dv (Tk, Hkv, D) in their own dtype.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from weft_attn.kernels.hopper.channel import Ring, Slots, make_ring, make_slots, make_tiles
from weft_attn.kernels.hopper.compat import aggregate, load_box
from weft_attn.kernels.hopper.schedule import EDGES, INTERIOR, Schedule, load_item
from weft_attn.kernels.hopper.statistics import (
    add_delta,
    add_lse,
    load_both,
    load_statistics,
    make_parts,
    make_statistics,
    read_statistics,
    store_parts,
)
from weft_attn.kernels.hopper.tiles import (
    CONSUMERS,
    ROWS,
    ZERO,
    agree,
    clean_half,
    hide,
    product_layout,
    visible_words,
    write_rows,
)
from weft_attn.kernels.triton import layout
from weft_attn.kernels.triton.tiles import cap_scores
from weft_attn.kernels.triton.visibility import (
    begin_of_walk,
    edges_of_part,
    first_tile_of_walk,
    interior_of_part,
    interval_in_slice,
    next_tile_of_walk,
)


@aggregate
class Problem:
    """What every warp role is told: tensors, tables, scalars and the tile sizes.

    FOLDS: products begin with row statistics (statistics.py), which nobody reads then.
    """

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    dout_desc: tma.tensor_descriptor
    lse_log2_ptr: gl.tensor
    delta_ptr: gl.tensor
    dk_ptr: gl.tensor
    dv_ptr: gl.tensor
    items_ptr: gl.tensor
    runs_ptr: gl.tensor
    stride_qh: gl.tensor
    stride_kh: gl.tensor
    stride_vh: gl.tensor
    stride_doh: gl.tensor
    stride_dkt: gl.tensor
    stride_dkh: gl.tensor
    stride_dvt: gl.tensor
    stride_dvh: gl.tensor
    stride_stats_h: gl.tensor
    zero: gl.tensor
    softmax_scale: gl.tensor
    inner_scale: gl.tensor
    outer_scale: gl.tensor
    GROUP: gl.constexpr
    HEAD_DIM: gl.constexpr
    BLOCK_Q: gl.constexpr
    HAS_SOFTCAP: gl.constexpr
    FOLDS: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q_desc, k_desc, v_desc, dout_desc, lse_log2_ptr, delta_ptr, dk_ptr, dv_ptr, items_ptr, runs_ptr,
        stride_qh, stride_kh, stride_vh, stride_doh, stride_dkt, stride_dkh, stride_dvt, stride_dvh,
        stride_stats_h, zero, softmax_scale, inner_scale, outer_scale,
        GROUP, HEAD_DIM, BLOCK_Q, HAS_SOFTCAP, FOLDS,
    ):  # fmt: skip
        self.q_desc, self.k_desc, self.v_desc, self.dout_desc = q_desc, k_desc, v_desc, dout_desc
        self.lse_log2_ptr, self.delta_ptr = lse_log2_ptr, delta_ptr
        self.dk_ptr, self.dv_ptr, self.items_ptr, self.runs_ptr = dk_ptr, dv_ptr, items_ptr, runs_ptr
        self.stride_qh, self.stride_kh, self.stride_vh, self.stride_doh = stride_qh, stride_kh, stride_vh, stride_doh
        self.stride_dkt, self.stride_dkh, self.stride_dvt, self.stride_dvh = stride_dkt, stride_dkh, stride_dvt, stride_dvh
        self.stride_stats_h = stride_stats_h
        self.zero = zero
        self.softmax_scale, self.inner_scale, self.outer_scale = softmax_scale, inner_scale, outer_scale
        self.GROUP = gl.constexpr(GROUP)
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.BLOCK_Q = gl.constexpr(BLOCK_Q)
        self.HAS_SOFTCAP = gl.constexpr(HAS_SOFTCAP)
        self.FOLDS = gl.constexpr(FOLDS)


@aggregate
class Memory:
    """Shared memory of a program.

    Attributes:
        k, v: a slot for each 64 keys of an item.
        slots: for query tiles of one head: q, lse_log2, delta, and dout unless it has slots of its own.
        dout_slots: dout's own slots; otherwise `slots`.
        parts: with FOLDS those of both statistics, and lse_log2 and delta are the same memory; without, the same as lse_log2, and unused.
    """

    schedule: Schedule
    k: Ring
    v: Ring
    slots: Slots
    dout_slots: Slots
    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    lse_log2: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    parts: gl.shared_memory_descriptor
    IS_DOUT_APART: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, schedule, k, v, slots, dout_slots, q, dout, lse_log2, delta, parts, IS_DOUT_APART):
        self.schedule, self.k, self.v, self.slots, self.dout_slots = schedule, k, v, slots, dout_slots
        self.q, self.dout, self.lse_log2, self.delta, self.parts = q, dout, lse_log2, delta, parts
        self.IS_DOUT_APART = gl.constexpr(IS_DOUT_APART)


@gluon.jit
def _load_queries(p, memory, step, kv_head, run, n_tiles, direction):
    """Ask for the query tiles of one stream, each of all heads of the group; the step after them."""
    DOUT_BYTES: gl.constexpr = p.dout_desc.block_type.nbytes
    N_BYTES: gl.constexpr = p.q_desc.block_type.nbytes + (0 if memory.IS_DOUT_APART else DOUT_BYTES)
    # Else nobody waits for where it would begin.
    if n_tiles > 0:
        col, left = first_tile_of_walk(p.runs_ptr, run, direction, p.BLOCK_Q)
        for _ in range(n_tiles):
            for head in range(kv_head * p.GROUP, (kv_head + 1) * p.GROUP):
                # Asked for before the slot is free, so that nobody waits for them.
                if p.FOLDS:
                    added = load_both(
                        p.lse_log2_ptr, p.delta_ptr, head, col, p.stride_stats_h, 1.0 / p.outer_scale,
                        p.BLOCK_Q, memory.schedule.PRODUCER_WARPS,
                    )  # fmt: skip
                else:
                    lse_log2, delta = load_statistics(
                        p.lse_log2_ptr, p.delta_ptr, head, col, p.stride_stats_h, p.BLOCK_Q, memory.schedule.PRODUCER_WARPS
                    )
                slot, full = memory.slots.acquire(step, N_BYTES)
                load_box(p.q_desc, [col, head * p.stride_qh], full, memory.q.index(slot))
                if not memory.IS_DOUT_APART:
                    load_box(p.dout_desc, [col, head * p.stride_doh], full, memory.dout.index(slot))
                if p.FOLDS:
                    store_parts(memory.parts.index(slot), added, p.BLOCK_Q, memory.schedule.PRODUCER_WARPS)
                else:
                    memory.lse_log2.index(slot).store(lse_log2)
                    memory.delta.index(slot).store(delta)
                mbarrier.arrive(full, count=1)
                if memory.IS_DOUT_APART:
                    dout_slot, dout_full = memory.dout_slots.acquire(step, DOUT_BYTES)
                    load_box(p.dout_desc, [col, head * p.stride_doh], dout_full, memory.dout.index(dout_slot))
                step += 1
            run, col, left = next_tile_of_walk(p.runs_ptr, run, col, left, direction, p.BLOCK_Q)
    return step


@gluon.jit
def produce(p, memory, LOOKS_AHEAD: gl.constexpr):
    """The producer: of each item its keys, and its tiles in the order of `edges_of_part`, each with all heads of the group by turns.

    `LOOKS_AHEAD`: steps are so quick that a short item's successor is to be taken when it begins. Where items share much memory traffic it
    is not: items that are neighbours in the list then begin as far apart as their programs' items differ in length (docs/adr/0030).
    """
    KEY_TILES: gl.constexpr = memory.k.slots.STAGES
    schedule = memory.schedule
    step = 0
    turn = 0
    number = schedule.dealer.first()
    schedule.tell(turn, number, p.items_ptr, p.runs_ptr, True)
    while schedule.exists(number):
        item, kv_head, _, _ = schedule.locate(number)
        direction = schedule.direction_of(number, p.items_ptr)
        row, edge_run, edge_tiles, interior_run, interior_tiles = load_item(p.items_ptr, item)
        is_short = schedule.is_short(edge_tiles + interior_tiles)
        is_told = 0
        if LOOKS_AHEAD and is_short:
            number = schedule.dealer.take(turn)
        for tile in gl.static_range(KEY_TILES):
            memory.k.load(turn * KEY_TILES + tile, p.k_desc, row + tile * ROWS, kv_head * p.stride_kh)
            memory.v.load(turn * KEY_TILES + tile, p.v_desc, row + tile * ROWS, kv_head * p.stride_vh)
        late = gl.load(p.items_ptr + item * layout.ITEM_WIDTH + layout.ITEM_LATE_EDGES)
        first_step = step
        for part in range(2):
            run, tiles = edges_of_part(part, direction, edge_run, edge_tiles, late)
            step = _load_queries(p, memory, step, kv_head, run, tiles, direction)
            step = _load_queries(p, memory, step, kv_head, interior_run, interior_of_part(part, interior_tiles), direction)
            # After the tiles that this turn begins with.
            if LOOKS_AHEAD and (is_short & (step > first_step) & (is_told == 0)):
                schedule.tell(turn + 1, number, p.items_ptr, p.runs_ptr, True)
                is_told = 1
        if is_told == 0:
            if not (LOOKS_AHEAD and is_short):
                number = schedule.dealer.take(turn)
            schedule.tell(turn + 1, number, p.items_ptr, p.runs_ptr, True)
        turn += 1
    schedule.finish()


@gluon.jit
def make_memory(
    p, schedule, KEY_TILES: gl.constexpr, KEY_READERS: gl.constexpr, STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr,
    RELEASED_BY_WARPS: gl.constexpr = False,
):  # fmt: skip
    """Shared memory with `STAGES` slots for query tiles, each read by two warp groups.

    Args:
        KEY_TILES: tiles of 64 keys of an item, each tile of k read by `KEY_READERS` warp groups and that of v by one.
        DOUT_STAGES: slots of dout's own; 0: it lies with q.
        RELEASED_BY_WARPS: each warp releases slots for query tiles by itself (barriers.py).
    """
    IS_DOUT_APART: gl.constexpr = DOUT_STAGES > 0
    k = make_ring(p.k_desc, KEY_TILES, KEY_READERS)
    v = make_ring(p.v_desc, KEY_TILES, 1)
    # Filled by the copy engine, and with statistics.
    slots = make_slots(STAGES, CONSUMERS, 2, RELEASED_BY_WARPS=RELEASED_BY_WARPS)
    dout_slots = slots
    if IS_DOUT_APART:
        dout_slots = make_slots(DOUT_STAGES, CONSUMERS)
    q = make_tiles(p.q_desc, STAGES)
    dout = make_tiles(p.dout_desc, dout_slots.STAGES)
    if p.FOLDS:
        parts = make_parts(p.BLOCK_Q, STAGES)
        lse_log2 = parts
        delta = parts
    else:
        lse_log2 = make_statistics(p.BLOCK_Q, STAGES)
        delta = make_statistics(p.BLOCK_Q, STAGES)
        parts = lse_log2
    return Memory(schedule, k, v, slots, dout_slots, q, dout, lse_log2, delta, parts, IS_DOUT_APART)


# ---- what the consumers share -------------------------------------------------------------------------------------------


@gluon.jit
def rows_of_item(p, first_row, n_rows):
    """A consumer's keys, for the masks; -1, which is in no slice, beyond the item: a key there may be inside the slice, its weights, of zeroed
    keys, are not below 1, and an infinite one times a zeroed key is NaN.
    """
    offsets = gl.arange(0, ROWS, gl.SliceLayout(1, product_layout(p.BLOCK_Q)))
    return gl.where(offsets < n_rows, first_row + offsets, -1)


@gluon.jit
def first_edges(p, schedule, turn, part, rows, direction, edge_run, edge_tiles, late):
    """A part's edge tiles (`edges_of_part`): the first one's run, how many, its column, tiles left in its run, and what its `rows` see
    (`interval_in_run`).
    """
    run, n_tiles = edges_of_part(part, direction, edge_run, edge_tiles, late)
    col, left = schedule.run(turn, EDGES + part)
    row_start, row_len, col_start, col_len, lo, hi = schedule.slice_of_run(turn, EDGES + part)
    first, stop, col_stop = interval_in_slice(rows, row_start, row_len, col_start, col_len, lo, hi)
    return run, n_tiles, begin_of_walk(col, left, direction, p.BLOCK_Q), left, first, stop, col_stop


@gluon.jit
def first_interior(p, schedule, turn, direction):
    """The first interior tile: its column, and tiles left in its run."""
    col, left = schedule.run(turn, INTERIOR)
    return begin_of_walk(col, left, direction, p.BLOCK_Q), left


@gluon.jit
def clean_queries(p, memory, agreement, step, n_valid, cleaned, CONSUMER: gl.constexpr):
    """Zero what a query tile holds from its n_valid-th row on, a half each consumer; how often that has happened."""
    if n_valid < p.BLOCK_Q:
        slot = step % memory.slots.STAGES
        clean_half(memory.q.index(slot), n_valid, CONSUMER)
        clean_half(memory.dout.index(slot), n_valid, CONSUMER)
        agree(agreement, cleaned)
        cleaned += 1
    return cleaned


@gluon.jit
def _multiply_queries(p, own, queries):
    """Start the (64 keys, BLOCK_Q queries) product of a consumer's k or v with q or dout."""
    nothing = gl.zeros([ROWS, p.BLOCK_Q], gl.float32, product_layout(p.BLOCK_Q))
    return warpgroup_mma(own, queries.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def multiply_scores(p, memory, slot, keys):
    """Start the product of a consumer's keys and a slot's queries, as `weigh` takes it."""
    if p.FOLDS:
        scores = add_lse(memory.parts.index(slot), p.BLOCK_Q)
        scores = warpgroup_mma(keys, memory.q.index(slot).permute((1, 0)), scores, is_async=True)
    else:
        scores = _multiply_queries(p, keys, memory.q.index(slot))
    return scores


@gluon.jit
def multiply_dprobs(p, memory, slot, values, dout):
    """Start the product of a consumer's values and the dout that belongs to a slot, as `differentiate` takes it."""
    if p.FOLDS:
        dprobs = add_delta(memory.parts.index(slot), p.BLOCK_Q)
        dprobs = warpgroup_mma(values, dout.permute((1, 0)), dprobs, is_async=True)
    else:
        dprobs = _multiply_queries(p, values, dout)
    return dprobs


@gluon.jit
def weigh(p, memory, slot, scores, seen, IS_MASKED: gl.constexpr):
    """P of a tile of products, and the capped scores; zero where not `seen`."""
    if p.FOLDS:
        probs = gl.exp2(scores * p.outer_scale)
    else:
        lse_log2 = read_statistics(memory.lse_log2.index(slot), p.BLOCK_Q)
        if p.HAS_SOFTCAP:
            scores = cap_scores(scores, p.inner_scale)
        probs = gl.exp2(scores * p.outer_scale - lse_log2[None, :])
    if IS_MASKED:
        probs = hide(probs, seen, ZERO)
    return probs, scores


@gluon.jit
def differentiate(p, memory, slot, probs, scores, dprobs, seen, IS_MASKED: gl.constexpr):
    """dS of a tile in the input dtype; zero where not `seen`, whatever dP is there."""
    if p.FOLDS:
        dscores = probs * dprobs
    else:
        delta = read_statistics(memory.delta.index(slot), p.BLOCK_Q)
        dscores = probs * (dprobs - delta[None, :])
    if p.HAS_SOFTCAP:
        dscores = dscores * (1.0 - scores * scores)
    if IS_MASKED:
        dscores = hide(dscores, seen, ZERO)
    return dscores.to(p.q_desc.dtype)


@gluon.jit
def seen_by(p, first, stop, col):
    """Which queries of the tile at `col` see each key, as `hide` takes it: those from `first` up to `stop`."""
    return visible_words(first, stop, col, product_layout(p.BLOCK_Q))


@gluon.jit
def write_dk(p, kv_head, first_column, dk_acc, first_row, n_rows):
    """Write columns of the dK of 64 keys at most, given without its scale."""
    dk_ptr = p.dk_ptr + kv_head.to(gl.int64) * p.stride_dkh + first_column
    write_rows(dk_ptr, p.stride_dkt, dk_acc * p.softmax_scale, first_row, n_rows)


@gluon.jit
def write_dv(p, kv_head, first_column, dv_acc, first_row, n_rows):
    """Write columns of the dV of 64 keys at most."""
    dv_ptr = p.dv_ptr + kv_head.to(gl.int64) * p.stride_dvh + first_column
    write_rows(dv_ptr, p.stride_dvt, dv_acc, first_row, n_rows)
