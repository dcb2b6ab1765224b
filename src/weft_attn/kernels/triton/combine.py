"""Combine: the parts of split items, weighted by their log-sum-exp.

    lse = log(sum_p exp(lse_p) + exp(sink)),   out = sum_p exp(lse_p - lse) out_p

partial_out (slots, packs, BLOCK_Q, Dv) and partial_lse (slots, packs, BLOCK_Q), float32. One program owns one row of one split
tile. Deterministic: parts are added in the order of their slots.
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


@triton.jit(do_not_specialize=layout.OF_THE_BATCH)
def attention_combine_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    combines_ptr,
    stride_ot,
    stride_oh,
    stride_lse_h,
    n_packs,
    PACK: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    LAYOUT_DIGEST: tl.constexpr,
):
    stride_ot, stride_oh = in_units(stride_ot, STRIDE_UNIT), in_units(stride_oh, STRIDE_UNIT)
    row_in_tile = tl.program_id(0) % BLOCK_Q
    pack = tl.program_id(0) // BLOCK_Q % n_packs
    combine_ptr = combines_ptr + tl.program_id(0) // BLOCK_Q // n_packs * layout.COMBINE_WIDTH
    q_row = tl.load(combine_ptr + layout.COMBINE_ROW) + row_in_tile // PACK
    head = pack * PACK + row_in_tile % PACK
    if row_in_tile // PACK < tl.load(combine_ptr + layout.COMBINE_N_ROWS):
        first_slot = tl.load(combine_ptr + layout.COMBINE_FIRST_SLOT)
        n_slots = tl.load(combine_ptr + layout.COMBINE_N_SLOTS)
        parts = tl.arange(0, BLOCK_SLOTS)
        peak = tl.full([], float("-inf"), tl.float32)
        if HAS_SINKS:
            peak = tl.load(sinks_ptr + head).to(tl.float32) * layout.LOG2_E
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
        acc = tl.zeros([HEAD_DIM_V_PADDED], tl.float32)
        for begin in range(0, n_slots, BLOCK_SLOTS):
            is_part = begin + parts < n_slots
            rows = ((first_slot + begin + parts).to(tl.int64) * n_packs + pack) * BLOCK_Q + row_in_tile
            lse_log2 = tl.load(partial_lse_ptr + rows, mask=is_part, other=float("-inf")) * layout.LOG2_E
            new_peak = tl.maximum(peak, tl.max(lse_log2, 0))
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            rescale = tl.exp2(peak - shift)
            weights = tl.exp2(lse_log2 - shift)
            # (BLOCK_SLOTS, Dv)
            outs = load_rows(partial_out_ptr, rows * HEAD_DIM_V, is_part, HEAD_DIM_V, HEAD_DIM_V_PADDED, True, "")
            acc = acc * rescale + tl.sum(weights[:, None] * outs, 0)
            total = total * rescale + tl.sum(weights, 0)
            peak = new_peak
        sees_nothing = total == 0
        acc = acc / tl.where(sees_nothing, 1.0, total)
        lse = tl.where(sees_nothing, float("-inf"), (peak + tl.log2(total)) * layout.LN_2)
        dims = tl.arange(0, HEAD_DIM_V_PADDED)
        out_row = out_ptr + q_row.to(tl.int64) * stride_ot + head.to(tl.int64) * stride_oh
        tl.store(out_row + dims, acc.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM_V)
        tl.store(lse_ptr + head.to(tl.int64) * stride_lse_h + q_row, lse)


def combine_call(
    *,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    combines: torch.Tensor,
    n_combines: int,
    pack: int,
    config: Any,
) -> KernelCall:
    """The combine launch.

    Args:
        partial_out, partial_lse: what the forward's split items wrote.
        sinks: (Hq,) float32 or None.
        out, lse: (Tq, Hq, Dv) and (Hq, Tq); only rows of split tiles are written.
        combines: (n_combines, 4) table of plan/stream.py.
        pack: query heads in a tile.
        config: a launch `CombineConfig`.
    """
    _, n_packs, block_q, head_dim_v = partial_out.shape
    strides = row_strides(o=out)
    return KernelCall(
        kernel=attention_combine_kernel,
        grid=(n_combines * n_packs * block_q,),
        arguments=dict(
            partial_out_ptr=partial_out,
            partial_lse_ptr=partial_lse,
            sinks_ptr=sinks,
            out_ptr=out,
            lse_ptr=lse,
            combines_ptr=combines,
            **strides,
            stride_lse_h=lse.stride(0),
            n_packs=n_packs,
        ),
        constants=dict(
            LAYOUT_DIGEST=layout.DIGEST,
            STRIDE_UNIT=stride_unit(strides),
            PACK=pack,
            HEAD_DIM_V=head_dim_v,
            HEAD_DIM_V_PADDED=padded_head_dim(head_dim_v),
            BLOCK_Q=block_q,
            BLOCK_SLOTS=config.block_slots,
            HAS_SINKS=sinks is not None,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
