"""Backward, dK and dV: a program owns a key tile of one KV head and walks every query row and query head that sees it.

    P_ij = exp2(s_ij - lse_log2_i),   dV_j = sum_i P_ij dout_i
    dS_ij = P_ij (dout_i.v_j - delta_i),   dK_j = scale * sum_i dS_ij q_i

Everything is transposed: rows of a tile are keys, columns are queries, and the items come from the transposed plan. q, dout
(Tq, Hq, D | Dv), k, v (Tk, Hkv, D | Dv), lse_log2 and delta from delta.py (in shifted copies with use_tma) or hopper/backward_dq.py; dk, dv (Tk, Hkv, D | Dv) in their
own dtype, float32 allowed. No atomics: deterministic. Keys that nobody sees get zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from weft_attn.kernels.call import KernelCall, tensor_descriptor, vector_descriptor
from weft_attn.kernels.triton import layout
from weft_attn.kernels.triton.forward import dot_precision, padded_head_dim, score_scales
from weft_attn.kernels.triton.tiles import (
    add_product,
    cap_scores,
    in_units,
    load_rows,
    load_stream_tile,
    product,
    program_item_and_head,
    row_strides,
    store_rows,
    stride_unit,
)
from weft_attn.kernels.triton.visibility import first_tile, interval_in_run, next_tile


@triton.jit
def _load_stats(
    lse_log2_ptr,
    lse_log2_desc,
    delta_ptr,
    delta_desc,
    stride_copy,
    element,
    n_valid,
    BLOCK_Q: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """lse_log2 and delta of BLOCK_Q queries from flat element `element` on; (+inf, 0) from the n_valid-th on."""
    rows = tl.arange(0, BLOCK_Q)
    if USE_TMA:
        # The shifted copy in which this element is 16-byte aligned, see delta.py.
        copy = element % 4
        start = copy * stride_copy + element - copy
        lse_log2 = tl.where(rows < n_valid, lse_log2_desc.load([start]), float("inf"))
        delta = tl.where(rows < n_valid, delta_desc.load([start]), 0.0)
    else:
        lse_log2 = tl.load(lse_log2_ptr + element + rows, mask=rows < n_valid, other=float("inf"))
        delta = tl.load(delta_ptr + element + rows, mask=rows < n_valid, other=0.0)
    return lse_log2, delta


@triton.jit
def _accumulate_stream(
    dk_acc,
    dv_acc,
    k_tile,
    v_tile,
    k_rows,
    runs_ptr,
    run,
    col,
    left,
    n_tiles,
    q_ptr,
    q_desc,
    dout_ptr,
    dout_desc,
    lse_log2_ptr,
    lse_log2_desc,
    delta_ptr,
    delta_desc,
    first_head,
    stride_qt,
    stride_qh,
    stride_dot,
    stride_doh,
    stride_stats_copy,
    stride_stats_h,
    inner_scale,
    outer_scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    CACHE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    # dk_acc (BLOCK_K, D), dv_acc (BLOCK_K, Dv): float32
    begin = run
    begin_col, begin_left = col, left
    tiles_done = 0
    head = first_head
    for _ in range(n_tiles * GROUP):
        col_stop = col + BLOCK_Q
        if IS_MASKED:
            first, stop, col_stop = interval_in_run(runs_ptr + run * layout.RUN_WIDTH, k_rows)
        cols = col + tl.arange(0, BLOCK_Q)
        q_tile = load_stream_tile(
            q_ptr, q_desc, head, col, col_stop, stride_qt, stride_qh,
            BLOCK_Q, HEAD_DIM, HEAD_DIM_PADDED, IS_MASKED, USE_TMA, CACHE,
        )  # fmt: skip
        lse_log2, delta = _load_stats(
            lse_log2_ptr, lse_log2_desc, delta_ptr, delta_desc, stride_stats_copy, head * stride_stats_h + col, col_stop - col,
            BLOCK_Q, USE_TMA,
        )  # fmt: skip
        # (BLOCK_K, BLOCK_Q)
        scores = product(k_tile, q_tile.T, PRECISION)
        if HAS_SOFTCAP:
            scores = cap_scores(scores, inner_scale)
        probs = tl.exp2(scores * outer_scale - lse_log2[None, :])
        if IS_MASKED:
            seen = (cols[None, :] >= first[:, None]) & (cols[None, :] < stop[:, None])
            probs = tl.where(seen, probs, 0.0)
        dout_tile = load_stream_tile(
            dout_ptr, dout_desc, head, col, col_stop, stride_dot, stride_doh,
            BLOCK_Q, HEAD_DIM_V, HEAD_DIM_V_PADDED, IS_MASKED, USE_TMA, CACHE,
        )  # fmt: skip
        dv_acc = add_product(dv_acc, probs.to(dout_tile.dtype), dout_tile, PRECISION)
        dprobs = product(v_tile, dout_tile.T, PRECISION)
        dscores = probs * (dprobs - delta[None, :])
        if HAS_SOFTCAP:
            dscores = dscores * (1.0 - scores * scores)
        dk_acc = add_product(dk_acc, dscores.to(q_tile.dtype), q_tile, PRECISION)

        # Walk all tiles for one query head, then again from the first for the next head of the group.
        run, col, left = next_tile(runs_ptr, run, col, left, BLOCK_Q)
        tiles_done += 1
        wraps = tiles_done == n_tiles
        tiles_done = tl.where(wraps, 0, tiles_done)
        head = tl.where(wraps, head + 1, head)
        run = tl.where(wraps, begin, run)
        col = tl.where(wraps, begin_col, col)
        left = tl.where(wraps, begin_left, left)
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=layout.OF_THE_BATCH)
def attention_backward_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    q_desc,
    dout_desc,
    lse_log2_ptr,
    delta_ptr,
    lse_log2_desc,
    delta_desc,
    dk_ptr,
    dv_ptr,
    items_ptr,
    runs_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
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
    softmax_scale,
    inner_scale,
    outer_scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    CACHE: tl.constexpr,
    PRECISION: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    LAYOUT_DIGEST: tl.constexpr,
):
    stride_qt, stride_qh = in_units(stride_qt, STRIDE_UNIT), in_units(stride_qh, STRIDE_UNIT)
    stride_kt, stride_kh = in_units(stride_kt, STRIDE_UNIT), in_units(stride_kh, STRIDE_UNIT)
    stride_vt, stride_vh = in_units(stride_vt, STRIDE_UNIT), in_units(stride_vh, STRIDE_UNIT)
    stride_dot, stride_doh = in_units(stride_dot, STRIDE_UNIT), in_units(stride_doh, STRIDE_UNIT)
    stride_dkt, stride_dkh = in_units(stride_dkt, STRIDE_UNIT), in_units(stride_dkh, STRIDE_UNIT)
    stride_dvt, stride_dvh = in_units(stride_dvt, STRIDE_UNIT), in_units(stride_dvh, STRIDE_UNIT)
    item, kv_head = program_item_and_head(n_items, n_heads, heads_per_wave)
    item_ptr = items_ptr + item * layout.ITEM_WIDTH
    # Where both streams begin: asked for now, so that the answers are there when a stream starts.
    interior_run = tl.load(item_ptr + layout.ITEM_INTERIOR_RUN)
    edge_run = tl.load(item_ptr + layout.ITEM_EDGE_RUN)
    interior_col, interior_left = first_tile(runs_ptr, interior_run)
    edge_col, edge_left = first_tile(runs_ptr, edge_run)
    k_row = tl.load(item_ptr + layout.ITEM_ROW)
    tile_rows = tl.arange(0, BLOCK_K)
    row_mask = tile_rows < tl.load(item_ptr + layout.ITEM_N_ROWS)
    k_rows = k_row + tile_rows
    wide_rows = k_rows.to(tl.int64)
    wide_head = kv_head.to(tl.int64)
    # (BLOCK_K, D), (BLOCK_K, Dv)
    k_tile = load_rows(k_ptr + wide_head * stride_kh, wide_rows * stride_kt, row_mask, HEAD_DIM, HEAD_DIM_PADDED, True, "")
    v_tile = load_rows(v_ptr + wide_head * stride_vh, wide_rows * stride_vt, row_mask, HEAD_DIM_V, HEAD_DIM_V_PADDED, True, "")
    dk_acc = tl.zeros([BLOCK_K, HEAD_DIM_PADDED], tl.float32)
    dv_acc = tl.zeros([BLOCK_K, HEAD_DIM_V_PADDED], tl.float32)
    first_head = kv_head * GROUP
    dk_acc, dv_acc = _accumulate_stream(
        dk_acc, dv_acc, k_tile, v_tile, k_rows, runs_ptr,
        interior_run, interior_col, interior_left, tl.load(item_ptr + layout.ITEM_INTERIOR_TILES),
        q_ptr, q_desc, dout_ptr, dout_desc, lse_log2_ptr, lse_log2_desc, delta_ptr, delta_desc, first_head,
        stride_qt, stride_qh, stride_dot, stride_doh, stride_stats_copy, stride_stats_h, inner_scale, outer_scale,
        GROUP, HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_Q, HAS_SOFTCAP, USE_TMA, CACHE, PRECISION, False,
    )  # fmt: skip
    dk_acc, dv_acc = _accumulate_stream(
        dk_acc, dv_acc, k_tile, v_tile, k_rows, runs_ptr,
        edge_run, edge_col, edge_left, tl.load(item_ptr + layout.ITEM_EDGE_TILES),
        q_ptr, q_desc, dout_ptr, dout_desc, lse_log2_ptr, lse_log2_desc, delta_ptr, delta_desc, first_head,
        stride_qt, stride_qh, stride_dot, stride_doh, stride_stats_copy, stride_stats_h, inner_scale, outer_scale,
        GROUP, HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_Q, HAS_SOFTCAP, USE_TMA, CACHE, PRECISION, True,
    )  # fmt: skip
    store_rows(
        dk_ptr + wide_head * stride_dkh, wide_rows * stride_dkt, row_mask, dk_acc * softmax_scale, HEAD_DIM, HEAD_DIM_PADDED
    )
    store_rows(dv_ptr + wide_head * stride_dvh, wide_rows * stride_dvt, row_mask, dv_acc, HEAD_DIM_V, HEAD_DIM_V_PADDED)


def backward_dkdv_call(
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
    softmax_scale: float,
    softcap: float,
    config: Any,
) -> KernelCall:
    """The dK/dV launch.

    Args:
        q, k, v, dout, lse_log2, delta, dk, dv: as in the module's text; last dimensions contiguous.
        items, runs: tables of the transposed plan, cut with rows_per_tile = block_k and block_cols = block_q.
        heads_per_wave: KV heads whose items run together.
        config: a launch `BackwardDkdvConfig`.
    """
    inner_scale, outer_scale = score_scales(softmax_scale, softcap)
    strides = row_strides(q=q, k=k, v=v, do=dout, dk=dk, dv=dv)
    return KernelCall(
        kernel=attention_backward_dkdv_kernel,
        grid=(n_items * k.shape[1],),
        arguments=dict(
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            dout_ptr=dout,
            q_desc=tensor_descriptor(q, config.block_q) if config.use_tma else None,
            dout_desc=tensor_descriptor(dout, config.block_q) if config.use_tma else None,
            lse_log2_ptr=lse_log2,
            delta_ptr=delta,
            lse_log2_desc=vector_descriptor(lse_log2, config.block_q) if config.use_tma else None,
            delta_desc=vector_descriptor(delta, config.block_q) if config.use_tma else None,
            dk_ptr=dk,
            dv_ptr=dv,
            items_ptr=items,
            runs_ptr=runs,
            **strides,
            stride_stats_copy=lse_log2.stride(0),
            stride_stats_h=q.shape[0],
            n_items=n_items,
            n_heads=k.shape[1],
            heads_per_wave=heads_per_wave,
            softmax_scale=softmax_scale,
            inner_scale=inner_scale,
            outer_scale=outer_scale,
        ),
        constants=dict(
            LAYOUT_DIGEST=layout.DIGEST,
            STRIDE_UNIT=stride_unit(strides),
            GROUP=q.shape[1] // k.shape[1],
            HEAD_DIM=q.shape[2],
            HEAD_DIM_V=v.shape[2],
            HEAD_DIM_PADDED=padded_head_dim(q.shape[2]),
            HEAD_DIM_V_PADDED=padded_head_dim(v.shape[2]),
            BLOCK_K=config.block_k,
            BLOCK_Q=config.block_q,
            HAS_SOFTCAP=softcap > 0,
            USE_TMA=config.use_tma,
            CACHE=config.cache_modifier,
            PRECISION=dot_precision(q.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
