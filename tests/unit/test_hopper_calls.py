"""What the launchers of Hopper's kernels hand over, without a GPU."""

from __future__ import annotations

import torch

from weft_attn.kernels.hopper.forward import hopper_forward_call
from weft_attn.launch import HopperForwardConfig


def test_hidden_scores_stay_hidden_under_a_scale_of_zero() -> None:
    """The kernel multiplies them by the scale: zero times minus infinity is NaN."""
    q, kv = torch.empty(128, 8, 64, dtype=torch.bfloat16), torch.empty(128, 2, 64, dtype=torch.bfloat16)
    table = torch.zeros(1, 8, dtype=torch.int32)
    config = HopperForwardConfig(block_k=128, num_warps=4, num_stages=2)
    call = hopper_forward_call(
        q=q, k=kv, v=kv, sinks=None, out=q, lse=torch.empty(8, 128), items=table, runs=table, n_items=1, heads_per_wave=8,
        counter=torch.zeros(2, dtype=torch.int32), softmax_scale=0.0, softcap=0.0, multiprocessors=132, config=config,
    )  # fmt: skip
    scale = torch.tensor(call.arguments["outer_scale"], dtype=torch.float32)
    assert torch.tensor(float("-inf")) * scale == float("-inf")
    assert torch.exp2(torch.tensor(1e6) * scale) == 1
