"""Backward, dQ: a program owns a query tile of one head and walks the key tiles it sees, as the forward does.

    P_ij = exp2(s_ij - lse_log2_i),   dS_ij = P_ij (dout_i.v_j - delta_i),   dQ_i = scale * sum_j dS_ij k_j

q, dout, dq (Tq, Hq, D | Dv), k, v (Tk, Hkv, D | Dv), lse_log2 and delta from delta.py. No atomics:
deterministic. Rows that see no key get zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from weft_attn.kernels.call import KernelCall, tensor_descriptor
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
def _accumulate_stream(
    dq_acc,
    q_tile,
    dout_tile,
    lse_log2,
    delta,
    q_rows,
    runs_ptr,
    run,
    col,
    left,
    n_tiles,
    k_ptr,
    k_desc,
    v_ptr,
    v_desc,
    kv_head,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    inner_scale,
    outer_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    CACHE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    # dq_acc (BLOCK_Q, D) float32
    for _ in range(n_tiles):
        col_stop = col + BLOCK_K
        if IS_MASKED:
            first, stop, col_stop = interval_in_run(runs_ptr + run * layout.RUN_WIDTH, q_rows)
        k_tile = load_stream_tile(
            k_ptr, k_desc, kv_head, col, col_stop, stride_kt, stride_kh,
            BLOCK_K, HEAD_DIM, HEAD_DIM_PADDED, IS_MASKED, USE_TMA, CACHE,
        )  # fmt: skip
        # (BLOCK_Q, BLOCK_K)
        scores = product(q_tile, k_tile.T, PRECISION)
        v_tile = load_stream_tile(
            v_ptr, v_desc, kv_head, col, col_stop, stride_vt, stride_vh,
            BLOCK_K, HEAD_DIM_V, HEAD_DIM_V_PADDED, IS_MASKED, USE_TMA, CACHE,
        )  # fmt: skip
        dprobs = product(dout_tile, v_tile.T, PRECISION)
        if HAS_SOFTCAP:
            scores = cap_scores(scores, inner_scale)
        probs = tl.exp2(scores * outer_scale - lse_log2[:, None])
        if IS_MASKED:
            cols = (col + tl.arange(0, BLOCK_K))[None, :]
            seen = (cols >= first[:, None]) & (cols < stop[:, None])
            probs = tl.where(seen, probs, 0.0)
        dscores = probs * (dprobs - delta[:, None])
        if HAS_SOFTCAP:
            dscores = dscores * (1.0 - scores * scores)
        dq_acc = add_product(dq_acc, dscores.to(k_tile.dtype), k_tile, PRECISION)
        run, col, left = next_tile(runs_ptr, run, col, left, BLOCK_K)
    return dq_acc


@triton.jit(do_not_specialize=layout.OF_THE_BATCH)
def attention_backward_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    k_desc,
    v_desc,
    lse_log2_ptr,
    delta_ptr,
    dq_ptr,
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
    stride_dqt,
    stride_dqh,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_IDENTITY_DOT: tl.constexpr,
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
    stride_dqt, stride_dqh = in_units(stride_dqt, STRIDE_UNIT), in_units(stride_dqh, STRIDE_UNIT)
    item, head = program_item_and_head(n_items, n_heads, heads_per_wave)
    item_ptr = items_ptr + item * layout.ITEM_WIDTH
    # Where both streams begin: asked for now, so that the answers are there when a stream starts.
    interior_run = tl.load(item_ptr + layout.ITEM_INTERIOR_RUN)
    edge_run = tl.load(item_ptr + layout.ITEM_EDGE_RUN)
    interior_col, interior_left = first_tile(runs_ptr, interior_run)
    edge_col, edge_left = first_tile(runs_ptr, edge_run)
    tile_rows = tl.arange(0, BLOCK_Q)
    row_mask = tile_rows < tl.load(item_ptr + layout.ITEM_N_ROWS)
    q_rows = tl.load(item_ptr + layout.ITEM_ROW) + tile_rows
    wide_rows = q_rows.to(tl.int64)
    wide_head = head.to(tl.int64)
    # (BLOCK_Q, D), (BLOCK_Q, Dv)
    q_tile = load_rows(q_ptr + wide_head * stride_qh, wide_rows * stride_qt, row_mask, HEAD_DIM, HEAD_DIM_PADDED, True, "")
    dout_tile = load_rows(
        dout_ptr + wide_head * stride_doh, wide_rows * stride_dot, row_mask, HEAD_DIM_V, HEAD_DIM_V_PADDED, True, ""
    )
    if USE_IDENTITY_DOT:
        # As in the forward: an operand in registers instead of one re-read from shared memory per key tile.
        dims = tl.arange(0, HEAD_DIM_PADDED)
        identity = tl.where(dims[:, None] == dims[None, :], 1.0, 0.0).to(q_tile.dtype)
        q_tile = product(q_tile, identity, PRECISION).to(q_tile.dtype)
    stats = wide_head * stride_stats_h + q_rows
    lse_log2 = tl.load(lse_log2_ptr + stats, mask=row_mask, other=float("inf"))
    delta = tl.load(delta_ptr + stats, mask=row_mask, other=0.0)

    dq_acc = tl.zeros([BLOCK_Q, HEAD_DIM_PADDED], tl.float32)
    kv_head = head // GROUP
    dq_acc = _accumulate_stream(
        dq_acc, q_tile, dout_tile, lse_log2, delta, q_rows, runs_ptr,
        interior_run, interior_col, interior_left, tl.load(item_ptr + layout.ITEM_INTERIOR_TILES),
        k_ptr, k_desc, v_ptr, v_desc, kv_head, stride_kt, stride_kh, stride_vt, stride_vh, inner_scale, outer_scale,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_K, HAS_SOFTCAP, USE_TMA, CACHE, PRECISION, False,
    )  # fmt: skip
    dq_acc = _accumulate_stream(
        dq_acc, q_tile, dout_tile, lse_log2, delta, q_rows, runs_ptr,
        edge_run, edge_col, edge_left, tl.load(item_ptr + layout.ITEM_EDGE_TILES),
        k_ptr, k_desc, v_ptr, v_desc, kv_head, stride_kt, stride_kh, stride_vt, stride_vh, inner_scale, outer_scale,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_K, HAS_SOFTCAP, USE_TMA, CACHE, PRECISION, True,
    )  # fmt: skip
    dq_base = dq_ptr + wide_head * stride_dqh
    store_rows(dq_base, wide_rows * stride_dqt, row_mask, dq_acc * softmax_scale, HEAD_DIM, HEAD_DIM_PADDED)


def backward_dq_call(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse_log2: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    items: torch.Tensor,
    runs: torch.Tensor,
    n_items: int,
    heads_per_wave: int,
    softmax_scale: float,
    softcap: float,
    config: Any,
) -> KernelCall:
    """The dQ launch.

    Args:
        q, k, v, dout, lse_log2, delta, dq: as in the module's text; last dimensions contiguous.
        items, runs: tables of the plan, cut with rows_per_tile = block_q and block_cols = block_k.
        heads_per_wave: query heads whose items run together.
        config: a launch `BackwardDqConfig`.
    """
    inner_scale, outer_scale = score_scales(softmax_scale, softcap)
    strides = row_strides(q=q, k=k, v=v, do=dout, dq=dq)
    return KernelCall(
        kernel=attention_backward_dq_kernel,
        grid=(n_items * q.shape[1],),
        arguments=dict(
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            dout_ptr=dout,
            k_desc=tensor_descriptor(k, config.block_k) if config.use_tma else None,
            v_desc=tensor_descriptor(v, config.block_k) if config.use_tma else None,
            lse_log2_ptr=lse_log2,
            delta_ptr=delta,
            dq_ptr=dq,
            items_ptr=items,
            runs_ptr=runs,
            **strides,
            stride_stats_h=q.shape[0],
            n_items=n_items,
            n_heads=q.shape[1],
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
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            HAS_SOFTCAP=softcap > 0,
            USE_IDENTITY_DOT=config.identity_dot,
            USE_TMA=config.use_tma,
            CACHE=config.cache_modifier,
            PRECISION=dot_precision(q.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
