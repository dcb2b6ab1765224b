"""A backward that adds dQ up in memory: zeroed with the row statistics, scaled into dq's dtype and layout at the end."""

from __future__ import annotations

import pytest
import torch

from weft_attn.kernels.triton.delta import delta_call, stats_shape
from weft_attn.kernels.triton.finish_dq import finish_dq_call
from weft_attn.launch import DeltaConfig, FinishDqConfig

NAN = float("nan")


@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 16), (37, 3, 16), (64, 2, 24)])
def test_the_sum_is_zeroed_beside_the_statistics_and_nothing_else(rows: int, heads: int, dim: int) -> None:
    out, dout = torch.randn(2, rows, heads, dim)
    lse = torch.randn(heads, rows)
    # Longer than the sum at both ends.
    memory = torch.full((heads * rows * dim + 2,), NAN)
    dq_sum = memory[1:-1].view(heads, rows, dim)
    delta, lse_log2 = torch.full((2, *stats_shape(heads, rows, 1)), NAN)
    config = DeltaConfig(block_rows=16, num_warps=4, num_stages=1)
    delta_call(out=out, dout=dout, lse=lse, dlse=None, delta=delta, lse_log2=lse_log2, dq_sum=dq_sum, config=config).launch()
    assert (dq_sum == 0).all()
    assert memory[[0, -1]].isnan().all()
    torch.testing.assert_close(delta[0, : heads * rows].view(heads, rows), (out * dout).sum(2).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 32), (37, 3, 96), (64, 2, 128)])
def test_the_sum_is_scaled_into_the_layout_of_dq(rows: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    unscaled = torch.randn(heads, rows, dim)
    # The order of columns that the kernels add in: of each 32, the pairs 0, 4, 8, 12, then 1, 5, 9, 13, and so on.
    pairs = torch.arange(dim).view(dim // 32, 16, 2)
    dq_sum = unscaled[:, :, pairs[:, [4 * j + i for i in range(4) for j in range(4)]].flatten()].contiguous()
    whole = torch.full((rows, heads + 1, dim + 8), NAN, dtype=dtype)
    dq = whole[:, :heads, :dim]
    config = FinishDqConfig(block_rows=16, num_warps=4, num_stages=1)
    finish_dq_call(dq_sum=dq_sum, dq=dq, softmax_scale=0.3, config=config).launch()
    torch.testing.assert_close(dq, (unscaled * 0.3).to(dtype).transpose(0, 1))
    assert whole[:, heads:].isnan().all()
    assert whole[:, :, dim:].isnan().all()
