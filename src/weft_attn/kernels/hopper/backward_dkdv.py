"""Backward on Hopper, dK and dV: a producer warp group feeds two consumers that own 64 keys of one KV head each.

    P_ij = exp2(s_ij - lse_log2_i),   dV_j = sum_i P_ij dout_i
    dS_ij = P_ij (dout_i.v_j - delta_i),   dK_j = scale * sum_i dS_ij q_i

Everything is transposed: rows of a tile are keys, columns queries, items come from the transposed plan (128 keys). q, dout
(Tq, Hq, D), k, v (Tk, Hkv, D): fp16 or bf16, D 64 or 128; lse_log2 and delta in shifted copies (triton/delta.py); dk, dv (Tk, Hkv, D) in
their own dtype. The query heads of a group are walked inside each tile. No atomics but the schedule's: deterministic. Keys that
nobody sees get zeros.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from weft_attn.kernels.call import KernelCall
from weft_attn.kernels.hopper.channel import Ring, Slots, make_ring, make_slots, make_tiles
from weft_attn.kernels.hopper.compat import aggregate, load_box
from weft_attn.kernels.hopper.schedule import Schedule, make_schedule
from weft_attn.kernels.hopper.tiles import (
    CONSUMERS,
    ROWS,
    agree,
    as_operand,
    clean_half,
    head_box,
    product_layout,
    vector_box,
    write_rows,
)
from weft_attn.kernels.triton import layout
from weft_attn.kernels.triton.forward import score_scales
from weft_attn.kernels.triton.tiles import cap_scores
from weft_attn.kernels.triton.visibility import first_tile, interval_in_run, next_tile


@aggregate
class Problem:
    """What every warp role is told: tensors, tables, scalars and the tile sizes."""

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    dout_desc: tma.tensor_descriptor
    lse_log2_desc: tma.tensor_descriptor
    delta_desc: tma.tensor_descriptor
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
    stride_stats_copy: gl.tensor
    stride_stats_h: gl.tensor
    zero: gl.tensor
    softmax_scale: gl.tensor
    inner_scale: gl.tensor
    outer_scale: gl.tensor
    GROUP: gl.constexpr
    HEAD_DIM: gl.constexpr
    BLOCK_Q: gl.constexpr
    HAS_SOFTCAP: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q_desc, k_desc, v_desc, dout_desc, lse_log2_desc, delta_desc, dk_ptr, dv_ptr, items_ptr, runs_ptr,
        stride_qh, stride_kh, stride_vh, stride_doh, stride_dkt, stride_dkh, stride_dvt, stride_dvh,
        stride_stats_copy, stride_stats_h, zero, softmax_scale, inner_scale, outer_scale,
        GROUP, HEAD_DIM, BLOCK_Q, HAS_SOFTCAP,
    ):  # fmt: skip
        self.q_desc, self.k_desc, self.v_desc, self.dout_desc = q_desc, k_desc, v_desc, dout_desc
        self.lse_log2_desc, self.delta_desc = lse_log2_desc, delta_desc
        self.dk_ptr, self.dv_ptr, self.items_ptr, self.runs_ptr = dk_ptr, dv_ptr, items_ptr, runs_ptr
        self.stride_qh, self.stride_kh, self.stride_vh, self.stride_doh = stride_qh, stride_kh, stride_vh, stride_doh
        self.stride_dkt, self.stride_dkh, self.stride_dvt, self.stride_dvh = stride_dkt, stride_dkh, stride_dvt, stride_dvh
        self.stride_stats_copy, self.stride_stats_h = stride_stats_copy, stride_stats_h
        self.zero = zero
        self.softmax_scale, self.inner_scale, self.outer_scale = softmax_scale, inner_scale, outer_scale
        self.GROUP = gl.constexpr(GROUP)
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.BLOCK_Q = gl.constexpr(BLOCK_Q)
        self.HAS_SOFTCAP = gl.constexpr(HAS_SOFTCAP)


@aggregate
class Memory:
    """Shared memory of a program. The slots hold a query tile of one head: q, dout, lse_log2 and delta."""

    schedule: Schedule
    k: Ring
    v: Ring
    slots: Slots
    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    lse_log2: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    cleaned: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, schedule, k, v, slots, q, dout, lse_log2, delta, cleaned):
        self.schedule, self.k, self.v, self.slots = schedule, k, v, slots
        self.q, self.dout, self.lse_log2, self.delta, self.cleaned = q, dout, lse_log2, delta, cleaned


@gluon.jit
def _load_stream(p, memory, step, first_head, run, n_tiles):
    """Ask for the query tiles of one stream, those of each head of the group."""
    N_BYTES: gl.constexpr = p.q_desc.block_type.nbytes + p.dout_desc.block_type.nbytes + 8 * p.BLOCK_Q
    col, left = first_tile(p.runs_ptr, run)
    for _ in range(n_tiles):
        for member in range(p.GROUP):
            head = first_head + member
            slot, full = memory.slots.acquire(step, N_BYTES)
            load_box(p.q_desc, [col, head * p.stride_qh], full, memory.q.index(slot))
            load_box(p.dout_desc, [col, head * p.stride_doh], full, memory.dout.index(slot))
            # The shifted copy in which this element is 16-byte aligned, see triton/delta.py.
            element = head * p.stride_stats_h + col
            copy = element % 4
            start = copy * p.stride_stats_copy + element - copy
            load_box(p.lse_log2_desc, [start], full, memory.lse_log2.index(slot))
            load_box(p.delta_desc, [start], full, memory.delta.index(slot))
            step += 1
        run, col, left = next_tile(p.runs_ptr, run, col, left, p.BLOCK_Q)
    return step


@gluon.jit
def _produce(p, memory):
    schedule = memory.schedule
    step = 0
    turn = 0
    number = gl.program_id(0)
    schedule.tell(turn, number, p.items_ptr, p.runs_ptr)
    while schedule.exists(number):
        item, kv_head = schedule.item_and_head(number)
        number = schedule.take()
        item_ptr = p.items_ptr + item * layout.ITEM_WIDTH
        row = gl.load(item_ptr + layout.ITEM_ROW)
        edge_run = gl.load(item_ptr + layout.ITEM_EDGE_RUN)
        edge_tiles = gl.load(item_ptr + layout.ITEM_EDGE_TILES)
        interior_run = gl.load(item_ptr + layout.ITEM_INTERIOR_RUN)
        interior_tiles = gl.load(item_ptr + layout.ITEM_INTERIOR_TILES)
        for consumer in gl.static_range(CONSUMERS):
            memory.k.load(turn * CONSUMERS + consumer, p.k_desc, row + consumer * ROWS, kv_head * p.stride_kh)
            memory.v.load(turn * CONSUMERS + consumer, p.v_desc, row + consumer * ROWS, kv_head * p.stride_vh)
        first_head = kv_head * p.GROUP
        step = _load_stream(p, memory, step, first_head, edge_run, edge_tiles)
        # The next turn, early enough that nobody waits for it, after the tiles that this one begins with.
        schedule.tell(turn + 1, number, p.items_ptr, p.runs_ptr)
        step = _load_stream(p, memory, step, first_head, interior_run, interior_tiles)
        turn += 1
    schedule.finish()


@gluon.jit
def _accumulate_tile(
    p, memory, step, own_slot, dk_acc, dv_acc, first, stop, col, IS_MASKED: gl.constexpr
):  # fmt: skip
    """One query tile of one head into dk_acc and dv_acc, (64 keys, D) float32."""
    scores_layout: gl.constexpr = product_layout(p.BLOCK_Q)
    acc_layout: gl.constexpr = product_layout(p.HEAD_DIM)
    slot = step % memory.slots.STAGES
    k_tile = memory.k.tiles.index(own_slot)
    v_tile = memory.v.tiles.index(own_slot)
    q_tile = memory.q.index(slot)
    dout_tile = memory.dout.index(slot)
    # (64 keys, BLOCK_Q queries)
    nothing = gl.zeros([ROWS, p.BLOCK_Q], gl.float32, scores_layout)
    scores = warpgroup_mma(k_tile, q_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dprobs = warpgroup_mma(v_tile, dout_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    lse_log2 = memory.lse_log2.index(slot).load(gl.SliceLayout(0, scores_layout))
    scores = warpgroup_mma_wait(1, deps=[scores])
    if p.HAS_SOFTCAP:
        scores = cap_scores(scores, p.inner_scale)
    probs = gl.exp2(scores * p.outer_scale - lse_log2[None, :])
    if IS_MASKED:
        cols = col + gl.arange(0, p.BLOCK_Q, gl.SliceLayout(0, scores_layout))
        seen = (cols[None, :] >= first[:, None]) & (cols[None, :] < stop[:, None])
        probs = gl.where(seen, probs, 0.0)
    probs_operand = as_operand(probs, p.q_desc.dtype, acc_layout)
    dv_acc = warpgroup_mma(probs_operand, dout_tile, dv_acc, is_async=True)
    delta = memory.delta.index(slot).load(gl.SliceLayout(0, scores_layout))
    dprobs = warpgroup_mma_wait(1, deps=[dprobs])
    dscores = probs * (dprobs - delta[None, :])
    if p.HAS_SOFTCAP:
        dscores = dscores * (1.0 - scores * scores)
    if IS_MASKED:
        dscores = gl.where(seen, dscores, 0.0)
    dscores_operand = as_operand(dscores, p.q_desc.dtype, acc_layout)
    dk_acc = warpgroup_mma(dscores_operand, q_tile, dk_acc, is_async=True)
    # The operands too: their registers are read until the products are done.
    dk_acc, dv_acc, _, _ = warpgroup_mma_wait(0, deps=[dk_acc, dv_acc, probs_operand, dscores_operand])
    memory.slots.release(step)
    return dk_acc, dv_acc


@gluon.jit
def _consume(p, memory, CONSUMER: gl.constexpr):
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
        _item, kv_head = schedule.item_and_head(number)
        first_row = schedule.item_field(turn, layout.ITEM_ROW) + CONSUMER * ROWS
        n_rows = schedule.item_field(turn, layout.ITEM_N_ROWS) - CONSUMER * ROWS
        run = schedule.item_field(turn, layout.ITEM_EDGE_RUN)
        edge_tiles = schedule.item_field(turn, layout.ITEM_EDGE_TILES)
        interior_tiles = schedule.item_field(turn, layout.ITEM_INTERIOR_TILES)
        col = schedule.run_field(turn, layout.RUN_COL)
        left = schedule.run_field(turn, layout.RUN_N_TILES)
        schedule.heard(turn)
        rows = first_row + gl.arange(0, ROWS, row_layout)
        dk_acc = gl.zeros([ROWS, p.HEAD_DIM], gl.float32, acc_layout)
        dv_acc = gl.zeros([ROWS, p.HEAD_DIM], gl.float32, acc_layout)
        kv_step = turn * CONSUMERS + CONSUMER
        memory.k.wait(kv_step)
        memory.v.wait(kv_step)

        for _ in range(edge_tiles):
            first, stop, col_stop = interval_in_run(p.runs_ptr + run * layout.RUN_WIDTH, rows)
            for _member in range(p.GROUP):
                slot = memory.slots.wait(step)
                zero = zero * 3
                if col_stop - col < p.BLOCK_Q:
                    clean_half(memory.q.index(slot), col_stop - col, CONSUMER)
                    clean_half(memory.dout.index(slot), col_stop - col, CONSUMER)
                    agree(memory.cleaned, cleaned)
                    cleaned += 1
                dk_acc, dv_acc = _accumulate_tile(p, memory, step, CONSUMER + zero, dk_acc, dv_acc, first, stop, col, True)
                step += 1
            run, col, left = next_tile(p.runs_ptr, run, col, left, p.BLOCK_Q)
        for _ in range(interior_tiles * p.GROUP):
            memory.slots.wait(step)
            zero = zero * 3
            dk_acc, dv_acc = _accumulate_tile(p, memory, step, CONSUMER + zero, dk_acc, dv_acc, rows, rows, 0, False)
            step += 1

        memory.k.release(kv_step)
        memory.v.release(kv_step)
        wide_head = kv_head.to(gl.int64)
        dk_ptr = p.dk_ptr + wide_head * p.stride_dkh
        write_rows(dk_ptr, p.stride_dkt, dk_acc * p.softmax_scale, first_row, n_rows, acc_layout)
        write_rows(p.dv_ptr + wide_head * p.stride_dvh, p.stride_dvt, dv_acc, first_row, n_rows, acc_layout)
        turn += 1
        schedule.hear(turn)
        number = schedule.number(turn)


@gluon.jit(do_not_specialize=layout.OF_THE_BATCH)
def hopper_backward_dkdv_kernel(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    lse_log2_desc,
    delta_desc,
    dk_ptr,
    dv_ptr,
    items_ptr,
    runs_ptr,
    stride_qh,
    stride_kh,
    stride_vh,
    stride_doh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    stride_stats_copy,
    stride_stats_h,
    n_items,
    n_heads,
    heads_per_wave,
    counter_ptr,
    zero,
    softmax_scale,
    inner_scale,
    outer_scale,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    LAYOUT_DIGEST: gl.constexpr,
):
    # An integer that is 1 comes as a constant.
    p = Problem(
        q_desc, k_desc, v_desc, dout_desc, lse_log2_desc, delta_desc, dk_ptr, dv_ptr, items_ptr, runs_ptr,
        gl.to_tensor(stride_qh), gl.to_tensor(stride_kh), gl.to_tensor(stride_vh), gl.to_tensor(stride_doh),
        gl.to_tensor(stride_dkt), gl.to_tensor(stride_dkh), gl.to_tensor(stride_dvt), gl.to_tensor(stride_dvh),
        gl.to_tensor(stride_stats_copy), gl.to_tensor(stride_stats_h), zero, softmax_scale, inner_scale, outer_scale,
        GROUP, HEAD_DIM, BLOCK_Q, HAS_SOFTCAP,
    )  # fmt: skip
    schedule = make_schedule(counter_ptr, gl.to_tensor(n_items), gl.to_tensor(n_heads), gl.to_tensor(heads_per_wave), CONSUMERS)
    # A slot of k and v for each consumer, which only that consumer releases.
    k = make_ring(k_desc, CONSUMERS, 1)
    v = make_ring(v_desc, CONSUMERS, 1)
    slots = make_slots(STAGES, CONSUMERS)
    cleaned = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(cleaned, count=CONSUMERS)
    fence_async_shared()
    memory = Memory(
        schedule, k, v, slots, make_tiles(q_desc, STAGES), make_tiles(dout_desc, STAGES),
        make_tiles(lse_log2_desc, STAGES), make_tiles(delta_desc, STAGES), cleaned,
    )  # fmt: skip
    gl.warp_specialize(
        [(_produce, (p, memory)), (_consume, (p, memory, gl.constexpr(0))), (_consume, (p, memory, gl.constexpr(1)))],
        [4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
    )


def hopper_backward_dkdv_call(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse_log2: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
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
    """The dK/dV launch.

    Args:
        q, k, v, dout, lse_log2, delta, dk, dv: as in the module's text; last dimensions contiguous, strides in whole 16 bytes.
        items, runs: tables of the transposed plan, cut with rows_per_tile = 128 and block_cols = block_q.
        heads_per_wave: KV heads whose items run together.
        counter: (COUNTER_SIZE,) int32, zero; zero again afterwards.
        multiprocessors: programs of the persistent grid at most.
        config: a launch `HopperBackwardDkdvConfig`.
    """
    inner_scale, outer_scale = score_scales(softmax_scale, softcap)
    kv_heads = k.shape[1]
    return KernelCall(
        kernel=hopper_backward_dkdv_kernel,
        grid=(min(multiprocessors, n_items * kv_heads),),
        arguments=dict(
            q_desc=head_box(q, config.block_q),
            k_desc=head_box(k, ROWS.value),
            v_desc=head_box(v, ROWS.value),
            dout_desc=head_box(dout, config.block_q),
            lse_log2_desc=vector_box(lse_log2, config.block_q),
            delta_desc=vector_box(delta, config.block_q),
            dk_ptr=dk,
            dv_ptr=dv,
            items_ptr=items,
            runs_ptr=runs,
            stride_qh=q.stride(1),
            stride_kh=k.stride(1),
            stride_vh=v.stride(1),
            stride_doh=dout.stride(1),
            stride_dkt=dk.stride(0),
            stride_dkh=dk.stride(1),
            stride_dvt=dv.stride(0),
            stride_dvh=dv.stride(1),
            stride_stats_copy=lse_log2.stride(0),
            stride_stats_h=q.shape[0],
            n_items=n_items,
            n_heads=kv_heads,
            heads_per_wave=heads_per_wave,
            counter_ptr=counter,
            zero=0,
            softmax_scale=softmax_scale,
            inner_scale=inner_scale,
            outer_scale=outer_scale,
        ),
        constants=dict(
            LAYOUT_DIGEST=layout.DIGEST,
            GROUP=q.shape[1] // kv_heads,
            HEAD_DIM=q.shape[2],
            BLOCK_Q=config.block_q,
            STAGES=config.num_stages,
            HAS_SOFTCAP=softcap > 0,
            CONSUMER_REGISTERS=config.consumer_registers,
        ),
        num_warps=config.num_warps,
        num_stages=1,
        max_registers=config.max_registers,
    )
