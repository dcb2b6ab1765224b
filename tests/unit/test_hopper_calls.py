"""What the launchers of Hopper's kernels hand over, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from weft_attn.errors import InvalidInput
from weft_attn.kernels.call import KernelCall
from weft_attn.kernels.hopper import statistics
from weft_attn.kernels.hopper.backward import hopper_backward_call
from weft_attn.kernels.hopper.backward_dq import hopper_backward_dq_call
from weft_attn.kernels.hopper.forward import hopper_forward_call
from weft_attn.kernels.hopper.schedule import PRODUCER_REGISTERS, grid_of
from weft_attn.launch import HopperBackwardDqConfig, HopperForwardConfig
from weft_attn.launch import config as launch_config
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


def calls_of(cluster: int, *, heads_per_wave: int = 8, n_items: int = 1) -> tuple[KernelCall, KernelCall]:
    """Forward and dQ of 8 query and 2 KV heads."""
    q, kv = torch.empty(128, 8, 128, dtype=torch.bfloat16), torch.empty(128, 2, 128, dtype=torch.bfloat16)
    table, stats = torch.zeros(1, 8, dtype=torch.int32), torch.empty(8, 128)
    shared = dict(
        q=q, k=kv, v=kv, items=table, runs=table, n_items=n_items, heads_per_wave=heads_per_wave,
        counter=torch.zeros(2, dtype=torch.int32), softmax_scale=1.0, softcap=0.0, multiprocessors=132,
    )  # fmt: skip
    forward = HopperForwardConfig(block_k=128, num_warps=4, num_stages=2, value_stages=3, cluster=cluster)
    dq = HopperBackwardDqConfig(block_k=64, num_warps=4, num_stages=4, cluster=cluster)
    return (
        hopper_forward_call(**shared, sinks=None, out=q, lse=stats, config=forward),
        hopper_backward_dq_call(**shared, out=q, dout=q, lse=stats, dlse=None, lse_log2=stats, delta=stats, dq=q, config=dq),
    )


def test_a_pair_takes_two_heads_for_one_and_each_of_its_programs_half_a_tile() -> None:
    for alone, pair in zip(calls_of(1), calls_of(2), strict=True):
        assert (alone.cluster, pair.cluster) == (1, 2)
        assert (alone.grid, pair.grid) == ((8,), (4,))
        assert (alone.arguments["n_heads"], pair.arguments["n_heads"]) == (8, 4)
        assert (alone.arguments["heads_per_wave"], pair.arguments["heads_per_wave"]) == (8, 4)
        for name in ("k_desc", "v_desc"):
            rows, columns = alone.arguments[name].block_shape
            assert pair.arguments[name].block_shape == [rows // 2, columns]
        assert alone.arguments["q_desc"].block_shape == pair.arguments["q_desc"].block_shape
        assert alone.constants["GROUP"] == pair.constants["GROUP"] == 4
        assert (alone.constants["IN_PAIRS"], pair.constants["IN_PAIRS"]) == (False, True)
    # The grid is as many programs as there are multiprocessors; a wave has a head of each program at least.
    assert [call.grid for call in (*calls_of(1, n_items=100), *calls_of(2, n_items=100))] == [(132,), (132,), (66,), (66,)]
    assert [call.arguments["heads_per_wave"] for call in calls_of(2, heads_per_wave=1)] == [1, 1]


def test_a_grid_is_never_empty_where_there_is_work_and_a_cluster_shares_a_kv_head() -> None:
    assert grid_of(132, 100, 8) == (132,)
    assert grid_of(132, 2, 8) == (16,)
    assert grid_of(132, 0, 8) == (0,)
    assert grid_of(131, 100, 8, group=4, cluster=2) == (65,)
    assert grid_of(1, 100, 8, group=4, cluster=2) == (1,)
    assert grid_of(132, 0, 8, group=4, cluster=2) == (0,)
    with pytest.raises(InvalidInput, match="share a KV head"):
        grid_of(132, 100, 6, group=3, cluster=2)


def test_values_may_have_more_stages_than_keys() -> None:
    forward, _ = calls_of(2)
    assert (forward.constants["K_STAGES"], forward.constants["V_STAGES"]) == (2, 3)


def test_the_producer_gets_what_the_configs_leave_it() -> None:
    assert PRODUCER_REGISTERS.value == launch_config.PRODUCER_REGISTERS


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("scale", "softcap", "folds"),
    [(0.1, 0.0, True), (1e-18, 0.0, True), (0.1, 2.0, False), (0.0, 0.0, False), (1e-20, 0.0, False)],
)
def test_products_begin_with_statistics_where_a_scale_divides_them_and_nothing_caps_their_sum(
    dim: int, scale: float, softcap: float, folds: bool
) -> None:
    q, kv = torch.empty(128, 8, dim, dtype=torch.bfloat16), torch.empty(128, 2, dim, dtype=torch.bfloat16)
    table, statistic = torch.zeros(1, 8, dtype=torch.int32), torch.empty(8 * 128)
    call = hopper_backward_call(
        q=q, k=kv, v=kv, dout=q, lse_log2=statistic, delta=statistic, dk=kv, dv=kv, dq_sum=torch.empty(8, 128, dim),
        items=table, runs=table, n_items=1, heads_per_wave=2, last_heads=2, counter=torch.zeros(2, dtype=torch.int32),
        softmax_scale=scale, softcap=softcap, multiprocessors=132,
        config=select("hopper_backward", Problem(dim, dim, 16), H200).config,
    )  # fmt: skip
    assert call.constants["FOLDS"] is folds
    if folds:
        # The largest statistic in use is finite after the division, and the rest of an infinite one is none.
        assert 1e5 / call.arguments["outer_scale"] < statistics.ENOUGH.value
