"""The forward kernel in the interpreter against the oracle, over every plan, head dim, dtype and tile shape."""

from __future__ import annotations

import pytest
import torch

import weft_attn as weft
from weft_attn.kernels.call import KernelCall
from weft_attn.launch import ForwardConfig, override
from weft_attn.testing.cases import PLANS, Case, make_inputs
from weft_attn.testing.compare import Attention, assert_matches_oracle, evaluate


def ours(case: Case, plan: weft.Plan) -> Attention:
    return lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, sinks=sinks, return_lse=True, **case.options)  # type: ignore[return-value]


def tiles(block_q: int, block_k: int) -> ForwardConfig:
    return ForwardConfig(block_q=block_q, block_k=block_k, num_warps=4, num_stages=1)


def check(case: Case, plan: weft.Plan | None = None) -> None:
    plan = plan or case.make_plan()
    inputs = make_inputs(case, plan)
    assert_matches_oracle(evaluate(ours(case, plan), inputs, gradients=False), case, plan, inputs)


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_matches_the_oracle(name: str) -> None:
    """At this size documents have interior tiles, edge tiles on both sides of the diagonal, and ends inside a tile."""
    with override(tiles(16, 16)):
        check(Case(plan=name, size=28))


# Padded and whole tiles in each dtype; the backward's tests look at every pair of dims in float32.
HEAD_DIMS = [
    (8, 8, torch.float16),
    (24, 24, torch.bfloat16),
    (64, 64, torch.float16),
    (64, 64, torch.float32),
    (80, 80, torch.float32),
    (80, 80, torch.float16),
    (128, 128, torch.bfloat16),
    (192, 128, torch.float16),
    (256, 256, torch.bfloat16),
    (8, 256, torch.float16),
    (72, 24, torch.bfloat16),
]


@pytest.mark.parametrize(("dim", "dim_v", "dtype"), HEAD_DIMS, ids=str)
def test_every_head_dim_matches_the_oracle(dim: int, dim_v: int, dtype: torch.dtype) -> None:
    with override(tiles(16, 16)):
        check(Case(plan="packed_unequal", size=20, head_dim=dim, head_dim_v=dim_v, dtype=dtype))


# Each shape on two plans; wide and high ones on the window, whose two sides they cut differently.
TILE_SHAPES = [
    ("packed_window", (16, 32)),
    ("packed_window", (32, 16)),
    ("packed_window", (16, 128)),
    ("prefix_lm", (16, 32)),
    ("prefix_lm", (64, 32)),
    ("prefix_lm", (128, 16)),
    ("zigzag_padded", (32, 16)),
    ("zigzag_padded", (64, 32)),
    ("zigzag_padded", (16, 128)),
    ("zigzag_padded", (128, 16)),
]


@pytest.mark.parametrize(("name", "tile"), TILE_SHAPES, ids=str)
def test_every_tile_shape_matches_the_oracle(name: str, tile: tuple[int, int]) -> None:
    with override(tiles(*tile)):
        check(Case(plan=name))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [1, 63, 129])
@pytest.mark.parametrize("rows", [1, 63, 129])
def test_odd_lengths_match_the_oracle(rows: int, keys: int, causal: bool) -> None:
    with override(tiles(64, 64)):
        check(Case(), weft.Plan.dense(1, rows, keys, causal=causal))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 2), (8, 1), (6, 3), (5, 5)])
def test_grouped_heads_match_the_oracle(heads: int, kv_heads: int) -> None:
    with override(tiles(32, 32)):
        check(Case(plan="packed", size=30, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("causal", torch.float32),
        ("packed", torch.float16),
        ("packed", torch.bfloat16),
        ("zigzag_rank_1_of_2", torch.bfloat16),
        ("zigzag_rank_1_of_2", torch.float32),
    ],
    ids=str,
)
def test_the_packages_own_configs_match_the_oracle(name: str, dtype: torch.dtype) -> None:
    check(Case(plan=name, dtype=dtype, heads=4, kv_heads=2, head_dim=64))


@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_scores_far_apart_or_all_alike_match_the_oracle(spread: float) -> None:
    with override(tiles(16, 16)):
        check(Case(plan="causal", spread=spread))


def test_equal_scores_are_averaged() -> None:
    plan = weft.Plan.dense(1, 20, 20, causal=True)
    v = torch.randn(20, 1, 16)
    with override(tiles(16, 16)):
        out, lse = weft.plan_attention(torch.zeros(20, 2, 16), torch.randn(20, 1, 16), v, plan, return_lse=True)
    counts = torch.arange(1, 21)
    torch.testing.assert_close(out[:, 1], v[:, 0].cumsum(0) / counts[:, None])
    torch.testing.assert_close(lse[0], counts.log())


@pytest.mark.parametrize("heads_per_wave_bytes", [1, 10**4, 10**9])
def test_the_order_of_heads_does_not_change_the_result(heads_per_wave_bytes: int) -> None:
    config = ForwardConfig(block_q=16, block_k=16, num_warps=4, num_stages=1, wave_bytes=heads_per_wave_bytes)
    case = Case(plan="packed", heads=6, kv_heads=3, size=20)
    with override(config):
        check(case)


@pytest.mark.parametrize("name", ["no_rows", "nothing"])
def test_no_rows_launch_nothing(name: str, launches: list[KernelCall]) -> None:
    case = Case(plan=name)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    out = weft.plan_attention(x.q, x.k, x.v, plan)
    assert out.shape == (0, 2, 16)  # type: ignore[union-attr]
    assert launches == []


def test_rows_that_see_nothing_are_exactly_zero_and_minus_infinity() -> None:
    for name in ("causal_more_rows", "unseen", "no_keys", "empty", "packed_unequal"):
        case = Case(plan=name)
        plan = case.make_plan()
        x = make_inputs(case, plan)
        out, lse = weft.plan_attention(x.q, x.k, x.v, plan, return_lse=True)
        blind = ~plan.to_mask().any(dim=1)
        assert blind.any()
        assert (out[blind] == 0).all()
        assert (lse[:, blind] == float("-inf")).all()
        assert lse[:, ~blind].isfinite().all()
