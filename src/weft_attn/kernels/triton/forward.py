"""Forward: online softmax in base 2 over an item's stream of key tiles.

    out_i = sum_j exp(s_ij - lse_i) v_j,   lse_i = log(sum_j exp(s_ij) + exp(sink))

q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv): fp16, bf16 or fp32; out (Tq, Hq, Dv) like q; lse (Hq, Tq) float32, natural log.
One program owns an item (plan/stream.py) of one head, or of PACK query heads that share a KV head: then row r of its tile is
token r // PACK, head r % PACK, and K and V are read once for all of them. An item that was split writes float32 partials.
Deterministic. Rows that see no key: out 0, lse -inf (the sink, where there is one).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from weft_attn.kernels.call import KernelCall, tensor_descriptor
from weft_attn.kernels.triton import layout
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
def _attend_stream(
    acc,
    row_sum,
    row_max,
    q_tile,
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
    # acc (BLOCK_Q, Dv), row_sum (BLOCK_Q,), row_max (BLOCK_Q,) in log2 units
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
        if HAS_SOFTCAP:
            scores = cap_scores(scores, inner_scale)
        if IS_MASKED:
            cols = (col + tl.arange(0, BLOCK_K))[None, :]
            seen = (cols >= first[:, None]) & (cols < stop[:, None])
            scores_log2 = tl.where(seen, scores * outer_scale, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores_log2, 1))
            # A row that has seen nothing yet has the maximum -inf: subtract 0, not -inf, from its -inf scores.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            probs = tl.exp2(scores_log2 - shift[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * outer_scale)
            shift = new_max
            probs = tl.exp2(scores * outer_scale - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        acc = acc * rescale[:, None]
        v_tile = load_stream_tile(
            v_ptr, v_desc, kv_head, col, col_stop, stride_vt, stride_vh,
            BLOCK_K, HEAD_DIM_V, HEAD_DIM_V_PADDED, IS_MASKED, USE_TMA, CACHE,
        )  # fmt: skip
        acc = add_product(acc, probs.to(v_tile.dtype), v_tile, PRECISION)
        row_max = new_max
        run, col, left = next_tile(runs_ptr, run, col, left, BLOCK_K)
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=layout.OF_THE_BATCH)
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    items_ptr,
    runs_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_lse_h,
    n_items,
    n_heads,
    heads_per_wave,
    inner_scale,
    outer_scale,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SPLITS: tl.constexpr,
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
    stride_ot, stride_oh = in_units(stride_ot, STRIDE_UNIT), in_units(stride_oh, STRIDE_UNIT)
    item, pack_of_heads = program_item_and_head(n_items, n_heads, heads_per_wave)
    item_ptr = items_ptr + item * layout.ITEM_WIDTH
    q_row = tl.load(item_ptr + layout.ITEM_ROW)
    n_rows = tl.load(item_ptr + layout.ITEM_N_ROWS)
    # Where both streams begin: asked for now, so that the answers are there when a stream starts.
    interior_run = tl.load(item_ptr + layout.ITEM_INTERIOR_RUN)
    edge_run = tl.load(item_ptr + layout.ITEM_EDGE_RUN)
    interior_col, interior_left = first_tile(runs_ptr, interior_run)
    edge_col, edge_left = first_tile(runs_ptr, edge_run)
    kv_head = pack_of_heads * PACK // GROUP

    tile_rows = tl.arange(0, BLOCK_Q)
    tokens = tile_rows // PACK
    heads = pack_of_heads * PACK + tile_rows % PACK
    row_mask = tokens < n_rows
    q_rows = q_row + tokens
    q_offsets = q_rows.to(tl.int64) * stride_qt + heads.to(tl.int64) * stride_qh
    # (BLOCK_Q, D)
    q_tile = load_rows(q_ptr, q_offsets, row_mask, HEAD_DIM, HEAD_DIM_PADDED, True, "")
    if USE_IDENTITY_DOT:
        # A product with the identity leaves Q in the registers of an operand: on Ampere it is then not re-read per key tile.
        dims = tl.arange(0, HEAD_DIM_PADDED)
        identity = tl.where(dims[:, None] == dims[None, :], 1.0, 0.0).to(q_tile.dtype)
        q_tile = product(q_tile, identity, PRECISION).to(q_tile.dtype)

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, HEAD_DIM_V_PADDED], tl.float32)
    acc, row_sum, row_max = _attend_stream(
        acc, row_sum, row_max, q_tile, q_rows, runs_ptr,
        interior_run, interior_col, interior_left, tl.load(item_ptr + layout.ITEM_INTERIOR_TILES),
        k_ptr, k_desc, v_ptr, v_desc, kv_head, stride_kt, stride_kh, stride_vt, stride_vh, inner_scale, outer_scale,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_K, HAS_SOFTCAP, USE_TMA, CACHE, PRECISION, False,
    )  # fmt: skip
    acc, row_sum, row_max = _attend_stream(
        acc, row_sum, row_max, q_tile, q_rows, runs_ptr,
        edge_run, edge_col, edge_left, tl.load(item_ptr + layout.ITEM_EDGE_TILES),
        k_ptr, k_desc, v_ptr, v_desc, kv_head, stride_kt, stride_kh, stride_vt, stride_vh, inner_scale, outer_scale,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_K, HAS_SOFTCAP, USE_TMA, CACHE, PRECISION, True,
    )  # fmt: skip

    slot = tl.load(item_ptr + layout.ITEM_SLOT)
    if HAS_SINKS:
        # A split item's sink joins once, when its parts are combined.
        sink_log2 = tl.load(sinks_ptr + heads).to(tl.float32) * layout.LOG2_E
        sink_log2 = tl.where(slot < 0, sink_log2, float("-inf"))
        new_max = tl.maximum(row_max, sink_log2)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.exp2(sink_log2 - shift)
        acc = acc * rescale[:, None]
        row_max = new_max

    sees_nothing = row_sum == 0
    out_tile = acc / tl.where(sees_nothing, 1.0, row_sum)[:, None]
    lse = tl.where(sees_nothing, float("-inf"), (row_max + tl.log2(row_sum)) * layout.LN_2)

    if HAS_SPLITS:
        if slot >= 0:
            # Partials (slots, n_heads, BLOCK_Q, Dv) and (slots, n_heads, BLOCK_Q), float32.
            partial_rows = (slot.to(tl.int64) * n_heads + pack_of_heads) * BLOCK_Q + tile_rows
            store_rows(partial_out_ptr, partial_rows * HEAD_DIM_V, row_mask, out_tile, HEAD_DIM_V, HEAD_DIM_V_PADDED)
            tl.store(partial_lse_ptr + partial_rows, lse, mask=row_mask)
        else:
            out_offsets = q_rows.to(tl.int64) * stride_ot + heads.to(tl.int64) * stride_oh
            store_rows(out_ptr, out_offsets, row_mask, out_tile, HEAD_DIM_V, HEAD_DIM_V_PADDED)
            tl.store(lse_ptr + heads.to(tl.int64) * stride_lse_h + q_rows, lse, mask=row_mask)
    else:
        out_offsets = q_rows.to(tl.int64) * stride_ot + heads.to(tl.int64) * stride_oh
        store_rows(out_ptr, out_offsets, row_mask, out_tile, HEAD_DIM_V, HEAD_DIM_V_PADDED)
        tl.store(lse_ptr + heads.to(tl.int64) * stride_lse_h + q_rows, lse, mask=row_mask)


def forward_call(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    partial_out: torch.Tensor | None,
    partial_lse: torch.Tensor | None,
    items: torch.Tensor,
    runs: torch.Tensor,
    n_items: int,
    pack: int,
    heads_per_wave: int,
    softmax_scale: float,
    softcap: float,
    config: Any,
) -> KernelCall:
    """The forward launch.

    Args:
        q, k, v, out, lse: as in the module's text; the last dimension of q, k, v, out is contiguous.
        sinks: (Hq,) float32 or None.
        partial_out, partial_lse: (slots, Hq / pack, block_q, Dv) and (slots, Hq / pack, block_q) float32, or None when no item
            is split.
        items, runs: tables of plan/stream.py, cut with rows_per_tile = block_q // pack and block_cols = block_k.
        pack: query heads in a tile; divides Hq / Hkv.
        heads_per_wave: packs of heads whose items run together.
        config: a launch `ForwardConfig`.
    """
    heads, head_dim, head_dim_v = q.shape[1], q.shape[2], v.shape[2]
    group = heads // k.shape[1]
    n_heads = heads // pack
    inner_scale, outer_scale = score_scales(softmax_scale, softcap)
    strides = row_strides(q=q, k=k, v=v, o=out)
    return KernelCall(
        kernel=attention_forward_kernel,
        grid=(n_items * n_heads,),
        arguments=dict(
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            k_desc=tensor_descriptor(k, config.block_k) if config.use_tma else None,
            v_desc=tensor_descriptor(v, config.block_k) if config.use_tma else None,
            sinks_ptr=sinks,
            out_ptr=out,
            lse_ptr=lse,
            partial_out_ptr=partial_out,
            partial_lse_ptr=partial_lse,
            items_ptr=items,
            runs_ptr=runs,
            **strides,
            stride_lse_h=lse.stride(0),
            n_items=n_items,
            n_heads=n_heads,
            heads_per_wave=heads_per_wave,
            inner_scale=inner_scale,
            outer_scale=outer_scale,
        ),
        constants=dict(
            LAYOUT_DIGEST=layout.DIGEST,
            STRIDE_UNIT=stride_unit(strides),
            GROUP=group,
            PACK=pack,
            HEAD_DIM=head_dim,
            HEAD_DIM_V=head_dim_v,
            HEAD_DIM_PADDED=padded_head_dim(head_dim),
            HEAD_DIM_V_PADDED=padded_head_dim(head_dim_v),
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            HAS_SOFTCAP=softcap > 0,
            HAS_SINKS=sinks is not None,
            HAS_SPLITS=partial_out is not None,
            USE_IDENTITY_DOT=config.identity_dot,
            USE_TMA=config.use_tma,
            CACHE=config.cache_modifier,
            PRECISION=dot_precision(q.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def score_scales(softmax_scale: float, softcap: float) -> tuple[float, float]:
    """(inner, outer): log2 scores are outer * products, or outer * tanh(inner * products) under a softcap."""
    if softcap > 0:
        return softmax_scale / softcap, softcap * layout.LOG2_E.value
    return 1.0, softmax_scale * layout.LOG2_E.value


def padded_head_dim(head_dim: int) -> int:
    """Tile width of a head dim: tiles are powers of two, and a matrix product wants 16 columns."""
    return max(16, 1 << (head_dim - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products in full float32: anything less is not what the caller asked for."""
    return "ieee" if dtype == torch.float32 else "tf32"
