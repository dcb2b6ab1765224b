"""Backward on Hopper, dQ: a producer warp feeds two consumers that own 64 query rows of one head each.

    P_ij = exp2(s_ij - lse_log2_i),   dS_ij = P_ij (dout_i.v_j - delta_i),   dQ_i = scale * sum_j dS_ij k_j

q, out, dout, dq (Tq, Hq, D), k, v (Tk, Hkv, D): fp16 or bf16, D 64 or 128; lse, dlse (Hq, Tq) float32, natural log. Items of 128
rows, edge tiles first. q and dout of a row stay in registers. Deterministic. Rows that see no key get zeros.

It makes the row statistics itself, of the rows that it holds, as triton/delta.py says what they are: where documents are short, a pass over
out and dout for them alone is a sixth of a backward (docs/adr/0029). lse_log2 and delta (Hq * Tq) float32 are written for the kernel that
computes dK and dV, which runs after this one.
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
from weft_attn.kernels.hopper.compat import aggregate
from weft_attn.kernels.hopper.pair import SharedRing
from weft_attn.kernels.hopper.schedule import EDGES, Schedule, grid_of, load_item, make_schedule
from weft_attn.kernels.hopper.tiles import (
    CONSUMERS,
    ROWS,
    ZERO,
    agree,
    as_operand,
    clean_half,
    head_box,
    hide,
    load_keys_and_values,
    make_agreement,
    product_layout,
    visible_words,
    write_rows,
)
from weft_attn.kernels.triton import layout
from weft_attn.kernels.triton.forward import score_scales
from weft_attn.kernels.triton.tiles import cap_scores
from weft_attn.kernels.triton.visibility import interval_in_run, interval_in_slice, next_tile


@aggregate
class Problem:
    """What every warp role is told: tensors, tables, scalars and the tile sizes."""

    q_desc: tma.tensor_descriptor
    dout_desc: tma.tensor_descriptor
    out_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    lse_ptr: gl.tensor
    dlse_ptr: gl.tensor
    lse_log2_ptr: gl.tensor
    delta_ptr: gl.tensor
    dq_ptr: gl.tensor
    items_ptr: gl.tensor
    runs_ptr: gl.tensor
    stride_qh: gl.tensor
    stride_doh: gl.tensor
    stride_oh: gl.tensor
    stride_kh: gl.tensor
    stride_vh: gl.tensor
    stride_dqt: gl.tensor
    stride_dqh: gl.tensor
    stride_lse_h: gl.tensor
    stride_dlse_h: gl.tensor
    stride_stats_h: gl.tensor
    softmax_scale: gl.tensor
    inner_scale: gl.tensor
    outer_scale: gl.tensor
    GROUP: gl.constexpr
    HEAD_DIM: gl.constexpr
    BLOCK_K: gl.constexpr
    HAS_SOFTCAP: gl.constexpr
    HAS_DLSE: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q_desc, dout_desc, out_desc, k_desc, v_desc, lse_ptr, dlse_ptr, lse_log2_ptr, delta_ptr, dq_ptr,
        items_ptr, runs_ptr, stride_qh, stride_doh, stride_oh, stride_kh, stride_vh, stride_dqt, stride_dqh,
        stride_lse_h, stride_dlse_h, stride_stats_h, softmax_scale, inner_scale, outer_scale,
        GROUP, HEAD_DIM, BLOCK_K, HAS_SOFTCAP, HAS_DLSE,
    ):  # fmt: skip
        self.q_desc, self.dout_desc, self.out_desc = q_desc, dout_desc, out_desc
        self.k_desc, self.v_desc = k_desc, v_desc
        self.lse_ptr, self.dlse_ptr = lse_ptr, dlse_ptr
        self.lse_log2_ptr, self.delta_ptr, self.dq_ptr = lse_log2_ptr, delta_ptr, dq_ptr
        self.items_ptr, self.runs_ptr = items_ptr, runs_ptr
        self.stride_qh, self.stride_doh, self.stride_oh = stride_qh, stride_doh, stride_oh
        self.stride_kh, self.stride_vh = stride_kh, stride_vh
        self.stride_dqt, self.stride_dqh = stride_dqt, stride_dqh
        self.stride_lse_h, self.stride_dlse_h, self.stride_stats_h = stride_lse_h, stride_dlse_h, stride_stats_h
        self.softmax_scale, self.inner_scale, self.outer_scale = softmax_scale, inner_scale, outer_scale
        self.GROUP = gl.constexpr(GROUP)
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.BLOCK_K = gl.constexpr(BLOCK_K)
        self.HAS_SOFTCAP = gl.constexpr(HAS_SOFTCAP)
        self.HAS_DLSE = gl.constexpr(HAS_DLSE)


@aggregate
class Memory:
    """Shared memory of a program."""

    schedule: Schedule
    q: Ring
    dout: Ring
    out: Ring
    k: Ring | SharedRing
    v: Ring | SharedRing
    cleaned: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, schedule, q, dout, out, k, v, cleaned):
        self.schedule, self.q, self.dout, self.out = schedule, q, dout, out
        self.k, self.v, self.cleaned = k, v, cleaned


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
        for consumer in gl.static_range(CONSUMERS):
            memory.q.load(turn * CONSUMERS + consumer, p.q_desc, row + consumer * ROWS, head * p.stride_qh)
            memory.dout.load(turn * CONSUMERS + consumer, p.dout_desc, row + consumer * ROWS, head * p.stride_doh)
            memory.out.load(turn * CONSUMERS + consumer, p.out_desc, row + consumer * ROWS, head * p.stride_oh)
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


@gluon.jit
def _make_statistics(p, out, dout, head, rows, is_row):
    """lse_log2 and delta of 64 rows, written too; `out` and `dout` as left operands of a product."""
    row_layout: gl.constexpr = rows.type.layout
    head = head.to(gl.int64)
    lse = gl.load(p.lse_ptr + head * p.stride_lse_h + rows, mask=is_row, other=float("-inf"))
    lse_log2 = gl.where(lse == float("-inf"), float("inf"), lse * layout.LOG2_E)
    # A thread has the same elements of an operand as of a product.
    products = gl.convert_layout(out.to(gl.float32) * dout.to(gl.float32), product_layout(p.HEAD_DIM), assert_trivial=True)
    delta = gl.convert_layout(gl.sum(products, 1), row_layout, assert_trivial=True)
    if p.HAS_DLSE:
        delta -= gl.load(p.dlse_ptr + head * p.stride_dlse_h + rows, mask=is_row, other=0.0)
    # Beyond the document are others' rows.
    delta = gl.where(is_row, delta, 0.0)
    stats = head * p.stride_stats_h + rows
    gl.store(p.lse_log2_ptr + stats, lse_log2, mask=is_row)
    gl.store(p.delta_ptr + stats, delta, mask=is_row)
    return lse_log2, delta


@gluon.jit
def _accumulate_tile(
    p, memory, step, q_operand, dout_operand, lse_log2, delta, dq_acc, first, stop, col, IS_MASKED: gl.constexpr
):
    """One key tile into dq_acc, (64 rows, D) float32."""
    scores_layout: gl.constexpr = product_layout(p.BLOCK_K)
    k_tile = memory.k.wait(step)
    # (64 rows, BLOCK_K keys)
    nothing = gl.zeros([ROWS, p.BLOCK_K], gl.float32, scores_layout)
    scores = warpgroup_mma(q_operand, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dprobs = warpgroup_mma(dout_operand, memory.v.wait(step).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if p.HAS_SOFTCAP:
        scores = cap_scores(scores, p.inner_scale)
    probs = gl.exp2(scores * p.outer_scale - lse_log2[:, None])
    dprobs = warpgroup_mma_wait(0, deps=[dprobs])
    memory.v.release(step)
    dscores = probs * (dprobs - delta[:, None])
    if p.HAS_SOFTCAP:
        dscores = dscores * (1.0 - scores * scores)
    if IS_MASKED:
        dscores = hide(dscores, visible_words(first, stop, col, scores_layout), ZERO)
    operand = as_operand(dscores, p.k_desc.dtype, product_layout(p.HEAD_DIM))
    dq_acc = warpgroup_mma(operand, k_tile, dq_acc, is_async=True)
    dq_acc = warpgroup_mma_wait(0, deps=[dq_acc])
    memory.k.release(step)
    return dq_acc


@gluon.jit
def _consume(p, memory, CONSUMER: gl.constexpr):
    schedule = memory.schedule
    step = 0
    turn = 0
    cleaned = 0
    acc_layout: gl.constexpr = product_layout(p.HEAD_DIM)
    scores_layout: gl.constexpr = product_layout(p.BLOCK_K)
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    schedule.dealer.meet()
    schedule.hear(turn)
    number = schedule.number(turn)
    while schedule.exists(number):
        head = schedule.head(turn)
        first_row, n_rows, run, edge_tiles, _, interior_tiles = schedule.item(turn, CONSUMER)
        col, left = schedule.run(turn, EDGES)
        row_start, row_len, col_start, col_len, lo, hi = schedule.slice_of_run(turn, EDGES)
        rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, scores_layout))
        is_row = rows < first_row + n_rows
        dq_acc = gl.zeros([ROWS, p.HEAD_DIM], gl.float32, acc_layout)
        q_step = turn * CONSUMERS + CONSUMER
        q_operand = memory.q.wait(q_step).load(operand_layout)
        dout_operand = memory.dout.wait(q_step).load(operand_layout)
        out_operand = memory.out.wait(q_step).load(operand_layout)
        lse_log2, delta = _make_statistics(p, out_operand, dout_operand, head, rows, is_row)
        is_edge = edge_tiles > 0
        if edge_tiles + interior_tiles > 0:
            # The item's first tile. In an interior tile every row sees every column.
            first, stop, col_stop = interval_in_slice(rows, row_start, row_len, col_start, col_len, lo, hi)
            first = gl.where(is_edge, first, col)
            stop = gl.where(is_edge, stop, col + p.BLOCK_K)
            if is_edge & (col_stop - col < p.BLOCK_K):
                clean_half(memory.k.wait(step), col_stop - col, CONSUMER)
                agree(memory.cleaned, cleaned)
                cleaned += 1
            dq_acc = _accumulate_tile(p, memory, step, q_operand, dout_operand, lse_log2, delta, dq_acc, first, stop, col, True)
            step += 1
            run, col, left = next_tile(p.runs_ptr, run, col, left, p.BLOCK_K)
        # Not before: only products that have used the registers say that what was read from shared memory has come. Of out, statistics
        # that were written say it.
        memory.q.release(q_step)
        memory.dout.release(q_step)
        memory.out.release(q_step)

        for _ in range(gl.maximum(edge_tiles - 1, 0)):
            first, stop, col_stop = interval_in_run(p.runs_ptr + run * layout.RUN_WIDTH, rows)
            if col_stop - col < p.BLOCK_K:
                # A hidden NaN of v reaches only products that are masked.
                clean_half(memory.k.wait(step), col_stop - col, CONSUMER)
                agree(memory.cleaned, cleaned)
                cleaned += 1
            dq_acc = _accumulate_tile(p, memory, step, q_operand, dout_operand, lse_log2, delta, dq_acc, first, stop, col, True)
            step += 1
            run, col, left = next_tile(p.runs_ptr, run, col, left, p.BLOCK_K)
        for _ in range(gl.where(is_edge, interior_tiles, interior_tiles - 1)):
            dq_acc = _accumulate_tile(p, memory, step, q_operand, dout_operand, lse_log2, delta, dq_acc, rows, rows, 0, False)
            step += 1

        dq_ptr = p.dq_ptr + head.to(gl.int64) * p.stride_dqh
        write_rows(dq_ptr, p.stride_dqt, dq_acc * p.softmax_scale, first_row, n_rows)
        schedule.heard(turn)
        turn += 1
        schedule.hear(turn)
        number = schedule.number(turn)
    schedule.dealer.meet()


@gluon.jit(do_not_specialize=layout.OF_THE_BATCH)
def hopper_backward_dq_kernel(
    q_desc,
    dout_desc,
    out_desc,
    k_desc,
    v_desc,
    lse_ptr,
    dlse_ptr,
    lse_log2_ptr,
    delta_ptr,
    dq_ptr,
    items_ptr,
    runs_ptr,
    stride_qh,
    stride_doh,
    stride_oh,
    stride_kh,
    stride_vh,
    stride_dqt,
    stride_dqh,
    stride_lse_h,
    stride_dlse_h,
    stride_stats_h,
    n_items,
    n_heads,
    heads_per_wave,
    counter_ptr,
    softmax_scale,
    inner_scale,
    outer_scale,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_DLSE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    IN_PAIRS: gl.constexpr,
    LAYOUT_DIGEST: gl.constexpr,
):
    # An integer that is 1 comes as a constant.
    p = Problem(
        q_desc, dout_desc, out_desc, k_desc, v_desc, lse_ptr, dlse_ptr, lse_log2_ptr, delta_ptr, dq_ptr, items_ptr, runs_ptr,
        gl.to_tensor(stride_qh), gl.to_tensor(stride_doh), gl.to_tensor(stride_oh), gl.to_tensor(stride_kh),
        gl.to_tensor(stride_vh), gl.to_tensor(stride_dqt), gl.to_tensor(stride_dqh), gl.to_tensor(stride_lse_h),
        gl.to_tensor(stride_dlse_h), gl.to_tensor(stride_stats_h),
        softmax_scale, inner_scale, outer_scale, GROUP, HEAD_DIM, BLOCK_K, HAS_SOFTCAP, HAS_DLSE,
    )  # fmt: skip
    dealer = make_dealer(counter_ptr, IN_PAIRS)
    schedule = make_schedule(
        dealer, gl.to_tensor(n_items), gl.to_tensor(n_heads), gl.to_tensor(heads_per_wave), gl.to_tensor(0), CONSUMERS,
        PRODUCER_WARPS=1,
    )  # fmt: skip
    # A slot of q, dout and out for each consumer, which only that consumer releases.
    q = make_ring(q_desc, CONSUMERS, 1)
    dout = make_ring(dout_desc, CONSUMERS, 1)
    out = make_ring(out_desc, CONSUMERS, 1)
    k, v = make_key_rings(k_desc, v_desc, dealer, "hopper_backward_dq_kernel", 3, STAGES, STAGES, CONSUMERS, IN_PAIRS)
    memory = Memory(schedule, q, dout, out, k, v, make_agreement(CONSUMERS))
    fence_async_shared()
    start(_produce, _consume, p, memory, CONSUMERS, CONSUMER_REGISTERS, IN_PAIRS)


def hopper_backward_dq_call(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    lse_log2: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
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
    """The dQ launch.

    Args:
        q, k, v, out, dout, lse, dlse, dq: as in the module's text; last dimensions contiguous, strides in whole 16 bytes; dlse None:
            the loss does not read lse.
        lse_log2, delta: as in the module's text, written.
        items, runs: tables of plan/stream.py, cut with rows_per_tile = 128 and block_cols = block_k.
        heads_per_wave: heads whose items run together.
        counter: (COUNTER_SIZE,) int32, zero; zero again afterwards.
        multiprocessors: programs of the persistent grid at most.
        config: a launch `HopperBackwardDqConfig`.
    """
    inner_scale, outer_scale = score_scales(softmax_scale, softcap)
    heads = q.shape[1]
    return KernelCall(
        kernel=hopper_backward_dq_kernel,
        grid=grid_of(multiprocessors, n_items, heads, heads // k.shape[1], config.cluster),
        arguments=dict(
            q_desc=head_box(q, ROWS.value),
            dout_desc=head_box(dout, ROWS.value),
            out_desc=head_box(out, ROWS.value),
            k_desc=head_box(k, config.block_k // config.cluster),
            v_desc=head_box(v, config.block_k // config.cluster),
            lse_ptr=lse,
            # Never read without dlse; an argument has to be a pointer.
            dlse_ptr=lse if dlse is None else dlse,
            lse_log2_ptr=lse_log2,
            delta_ptr=delta,
            dq_ptr=dq,
            items_ptr=items,
            runs_ptr=runs,
            stride_qh=q.stride(1),
            stride_doh=dout.stride(1),
            stride_oh=out.stride(1),
            stride_kh=k.stride(1),
            stride_vh=v.stride(1),
            stride_dqt=dq.stride(0),
            stride_dqh=dq.stride(1),
            stride_lse_h=lse.stride(0),
            stride_dlse_h=0 if dlse is None else dlse.stride(0),
            stride_stats_h=q.shape[0],
            n_items=n_items,
            n_heads=heads // config.cluster,
            heads_per_wave=max(1, heads_per_wave // config.cluster),
            counter_ptr=counter,
            softmax_scale=softmax_scale,
            inner_scale=inner_scale,
            outer_scale=outer_scale,
        ),
        constants=dict(
            LAYOUT_DIGEST=layout.DIGEST,
            GROUP=heads // k.shape[1],
            HEAD_DIM=q.shape[2],
            BLOCK_K=config.block_k,
            STAGES=config.num_stages,
            HAS_SOFTCAP=softcap > 0,
            HAS_DLSE=dlse is not None,
            CONSUMER_REGISTERS=config.consumer_registers,
            IN_PAIRS=config.cluster > 1,
        ),
        num_warps=config.num_warps,
        num_stages=1,
        max_registers=config.max_registers,
        cluster=config.cluster,
    )
