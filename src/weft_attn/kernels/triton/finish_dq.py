"""The end of a backward that adds dQ up in memory: dq = scale * dq_sum, in dq's dtype and layout.

dq_sum (Hq, Tq, D) float32, contiguous, its columns in the order of `exchange_pairs`; dq (Tq, Hq, D). Deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from weft_attn.kernels.call import KernelCall
from weft_attn.kernels.triton import layout
from weft_attn.kernels.triton.forward import padded_head_dim


@triton.jit
def exchange_pairs(tile):
    """A (rows, columns) tile with the 16 pairs of each 32 columns in another order: pair 4 j + i where 4 i + j was. Its own inverse.

    A thread has the pairs 4 j + i, j = 0..3, of a product's row. In this order they lie together: it writes them to shared memory 16
    bytes at a time and no two threads meet in a bank; in the order of columns every second write waited for another one.
    """
    groups = tile.reshape([tile.shape[0], tile.shape[1] // 32, 4, 4, 2])
    return groups.permute((0, 1, 3, 2, 4)).reshape([tile.shape[0], tile.shape[1]])


@triton.jit(do_not_specialize=layout.OF_THE_BATCH)
def attention_finish_dq_kernel(
    dq_sum_ptr,
    dq_ptr,
    stride_dqt,
    stride_dqh,
    total_q,
    n_heads,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LAYOUT_DIGEST: tl.constexpr,
):
    head = (tl.program_id(0) % n_heads).to(tl.int64)
    rows = (tl.program_id(0) // n_heads * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    mask = (rows < total_q)[:, None] & (dims < HEAD_DIM)[None, :]
    dq = tl.load(dq_sum_ptr + (head * total_q + rows)[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    dq = exchange_pairs(dq)
    places = head * stride_dqh + rows[:, None] * stride_dqt + dims[None, :]
    tl.store(dq_ptr + places, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=mask)


def finish_dq_call(*, dq_sum: torch.Tensor, dq: torch.Tensor, softmax_scale: float, config: Any) -> KernelCall:
    """The launch.

    Args:
        dq_sum, dq: as in the module's text; dq is written, its last dimension contiguous.
        config: a launch `FinishDqConfig`.
    """
    heads, total_q, head_dim = dq_sum.shape
    assert head_dim % 32 == 0, "dq_sum has its columns in groups of 32"
    return KernelCall(
        kernel=attention_finish_dq_kernel,
        grid=(triton.cdiv(total_q, config.block_rows) * heads,),
        arguments=dict(
            dq_sum_ptr=dq_sum,
            dq_ptr=dq,
            stride_dqt=dq.stride(0),
            stride_dqh=dq.stride(1),
            total_q=total_q,
            n_heads=heads,
            softmax_scale=softmax_scale,
        ),
        constants=dict(
            LAYOUT_DIGEST=layout.DIGEST,
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=padded_head_dim(head_dim),
            BLOCK_ROWS=config.block_rows,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
