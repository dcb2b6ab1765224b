"""What a plan costs: visible pairs, floating-point operations, bytes, tile steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weft_attn.plan.layouts import Layout
from weft_attn.plan.slices import Plan
from weft_attn.plan.stream import Tiling, host_stream

# A backward computes five products where the forward computes two.
BACKWARD_OVER_FORWARD = 2.5


def forward_flops(plan: Plan, heads: int, head_dim: int, head_dim_v: int | None = None) -> int:
    """Floating-point operations of the forward's two products over visible pairs only."""
    return 2 * plan.pairs * heads * (head_dim + (head_dim if head_dim_v is None else head_dim_v))


def backward_flops(plan: Plan, heads: int, head_dim: int, head_dim_v: int | None = None) -> float:
    """Floating-point operations of the backward: 2.5 times the forward's."""
    return BACKWARD_OVER_FORWARD * forward_flops(plan, heads, head_dim, head_dim_v)


def kv_bytes(plan: Plan, kv_heads: int, head_dim: int, head_dim_v: int, dtype_bits: int) -> int:
    """Bytes of K and V, each read once."""
    return plan.total_k * kv_heads * (head_dim + head_dim_v) * dtype_bits // 8


def steps_of(plan: Plan, rows_per_tile: int, block_cols: int) -> int:
    """Column tiles that all row tiles visit together, for one head."""
    items = host_stream(plan, Tiling(rows_per_tile, block_cols)).items
    return int(items[:, 3].sum() + items[:, 5].sum())


def causal_pairs_by_rank(layout: Layout) -> NDArray[np.int64]:
    """(W,) visible pairs of every rank's rows under a causal mask, without building the ranks' plans."""
    # Row `start + i * step` of a document sees itself and all rows before it.
    start, size = layout.starts, layout.sizes
    by_chunk = (size * (start + 1) + layout.step * (size * (size - 1) // 2)).sum(axis=0)
    pairs: NDArray[np.int64] = by_chunk[layout.chunks_of_ranks(layout.world_size)].sum(axis=1)
    return pairs
