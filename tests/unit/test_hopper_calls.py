"""What the launchers of Hopper's kernels hand over, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from weft_attn.kernels.hopper.forward import hopper_forward_call
from weft_attn.launch import HopperForwardConfig
from weft_attn.launch.config import CONFIGS
from weft_attn.launch.device import Device
from weft_attn.launch.select import Problem, select
from weft_attn.ops import execute
from weft_attn.plan import Plan

H200 = Device("NVIDIA H200", "sm_90", 132, 227 * 1024)


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


def test_waves_are_two_rounds_by_keys_and_bounded_by_bytes_by_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "device_of", lambda _: H200)
    plan = Plan.dense(1, 8192, 8192, causal=True)
    q, kv = torch.empty(8192, 32, 128, dtype=torch.bfloat16), torch.empty(8192, 8, 128, dtype=torch.bfloat16)

    def wave(kernel: str, **changes: int) -> int:
        choice = select(kernel, Problem(128, 128, 16), H200)
        choice = replace(choice, config=replace(choice.config, **changes))
        return execute.prepare_backward(choice, plan, q, kv, kv).wave

    # 64 items of 128 keys a head: four heads fill 132 multiprocessors twice. Nothing of that counts bytes.
    for kernel in ("hopper_backward", "hopper_backward_dkdv"):
        assert wave(kernel) == 4
        assert "wave_bytes" not in CONFIGS[kernel].__dataclass_fields__
    # 4 MiB of keys and values a KV head, and four query heads of each.
    assert wave("hopper_backward_dq", wave_bytes=2 * 4 * 2**20) == 8
    # 16 MiB of queries and dO a KV head.
    assert wave("backward_dkdv", wave_bytes=3 * 16 * 2**20) == 3
