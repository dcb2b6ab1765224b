"""Row statistics that both backward kernels read, one pass over out and its gradient.

    delta_i = sum_d dout_id * out_id - dlse_i          (dS_ij = P_ij * (dP_ij - delta_i))
    lse_log2_i = lse_i * log2(e), +inf where lse_i is -inf, so that exp2(s - lse_log2) is 0 there

out, dout (Tq, Hq, Dv); lse, dlse (Hq, Tq) float32, natural log. delta, lse_log2 (COPIES, padded Hq * Tq) float32, each copy the
flattened (Hq, Tq). The copy engine reads from multiples of 16 bytes only, but documents begin at any row: so copy c of four holds
the statistics shifted by c rows, and a tile that begins at element x is read from copy x % 4. Deterministic.

It zeroes dq_sum (Hq, Tq, D) float32 too, where a later kernel adds to one, and turns, int32, where its programs say who has. dq_sum
has programs of its own, which come last: reads, then writes, take 7% less time than both mixed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from weft_attn.kernels.call import KernelCall
from weft_attn.kernels.triton import layout
from weft_attn.kernels.triton.forward import padded_head_dim
from weft_attn.kernels.triton.tiles import in_units, load_rows, row_strides, stride_unit


@triton.jit
def _zero_rows(ptr, block, n_rows, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Zero a block of (n_rows, HEAD_DIM) float32."""
    rows = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    zeros = tl.zeros([BLOCK_ROWS, HEAD_DIM_PADDED], tl.float32)
    tl.store(ptr + rows[:, None] * HEAD_DIM + dims[None, :], zeros, mask=(rows < n_rows)[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=layout.OF_THE_BATCH)
def attention_delta_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    lse_log2_ptr,
    dq_sum_ptr,
    turns_ptr,
    n_turns,
    stride_ot,
    stride_oh,
    stride_dot,
    stride_doh,
    stride_lse_h,
    stride_dlse_h,
    stride_copy,
    total_q,
    n_heads,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    COPIES: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    LAYOUT_DIGEST: tl.constexpr,
):
    stride_ot, stride_oh = in_units(stride_ot, STRIDE_UNIT), in_units(stride_oh, STRIDE_UNIT)
    stride_dot, stride_doh = in_units(stride_dot, STRIDE_UNIT), in_units(stride_doh, STRIDE_UNIT)
    if dq_sum_ptr is not None:
        block = tl.program_id(0) - tl.cdiv(total_q, BLOCK_ROWS) * n_heads
        if block >= 0:
            _zero_rows(dq_sum_ptr, block, tl.cast(total_q, tl.int64) * n_heads, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_ROWS)
            return
    head = tl.program_id(0) % n_heads
    rows = tl.program_id(0) // n_heads * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < total_q
    offsets = rows.to(tl.int64)
    out_base = out_ptr + head.to(tl.int64) * stride_oh
    dout_base = dout_ptr + head.to(tl.int64) * stride_doh
    # (BLOCK_ROWS, Dv)
    out_tile = load_rows(out_base, offsets * stride_ot, row_mask, HEAD_DIM_V, HEAD_DIM_V_PADDED, True, "")
    dout_tile = load_rows(dout_base, offsets * stride_dot, row_mask, HEAD_DIM_V, HEAD_DIM_V_PADDED, True, "")
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + head.to(tl.int64) * stride_dlse_h + offsets, mask=row_mask, other=0.0)
    lse = tl.load(lse_ptr + head.to(tl.int64) * stride_lse_h + offsets, mask=row_mask, other=0.0)
    lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * layout.LOG2_E)
    element = head.to(tl.int64) * total_q + offsets
    for copy in tl.static_range(COPIES):
        shifted = copy * stride_copy + element - copy
        tl.store(delta_ptr + shifted, delta, mask=row_mask & (element >= copy))
        tl.store(lse_log2_ptr + shifted, lse_log2, mask=row_mask & (element >= copy))
    if turns_ptr is not None:
        for first in tl.static_range(0, layout.MOST_TURNS * BLOCK_ROWS, BLOCK_ROWS):
            turns = tl.program_id(0) * (layout.MOST_TURNS * BLOCK_ROWS) + first + tl.arange(0, BLOCK_ROWS)
            tl.store(turns_ptr + turns, tl.zeros([BLOCK_ROWS], tl.int32), mask=turns < n_turns)


# Elements of float32 in the copy engine's 16 bytes.
SHIFTED_COPIES = 4


def stats_shape(heads: int, total_q: int, copies: int) -> tuple[int, int]:
    """(copies, padded): room for one statistic in float32; copy 0 begins with the (heads, total_q) values."""
    return copies, -(-heads * total_q // SHIFTED_COPIES) * SHIFTED_COPIES


def delta_call(
    *,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    delta: torch.Tensor,
    lse_log2: torch.Tensor,
    dq_sum: torch.Tensor | None,
    turns: torch.Tensor | None = None,
    config: Any,
) -> KernelCall:
    """The delta launch.

    Args:
        out, dout, lse, dlse: as in the module's text; dlse None: the loss does not read lse.
        delta, lse_log2: of `stats_shape` with 1 copy or SHIFTED_COPIES, written.
        dq_sum, turns: as in the module's text, contiguous, turns of at most layout.MOST_TURNS elements a row of a head; None: there is none.
        config: a launch `DeltaConfig`.
    """
    total_q, heads, head_dim_v = out.shape
    strides = row_strides(o=out, do=dout)
    blocks = triton.cdiv(total_q, config.block_rows) * heads
    return KernelCall(
        kernel=attention_delta_kernel,
        # dq_sum has as many rows as there are statistics.
        grid=(blocks if dq_sum is None else 2 * blocks,),
        arguments=dict(
            out_ptr=out,
            dout_ptr=dout,
            lse_ptr=lse,
            dlse_ptr=dlse,
            delta_ptr=delta,
            lse_log2_ptr=lse_log2,
            dq_sum_ptr=dq_sum,
            turns_ptr=turns,
            n_turns=0 if turns is None else turns.numel(),
            **strides,
            stride_lse_h=lse.stride(0),
            stride_dlse_h=0 if dlse is None else dlse.stride(0),
            stride_copy=delta.stride(0),
            total_q=total_q,
            n_heads=heads,
        ),
        constants=dict(
            LAYOUT_DIGEST=layout.DIGEST,
            STRIDE_UNIT=stride_unit(strides),
            HEAD_DIM=0 if dq_sum is None else dq_sum.shape[2],
            HEAD_DIM_PADDED=0 if dq_sum is None else padded_head_dim(dq_sum.shape[2]),
            HEAD_DIM_V=head_dim_v,
            HEAD_DIM_V_PADDED=padded_head_dim(head_dim_v),
            BLOCK_ROWS=config.block_rows,
            HAS_DLSE=dlse is not None,
            COPIES=delta.shape[0],
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
