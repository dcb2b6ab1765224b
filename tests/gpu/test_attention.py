"""Compiled kernels against the oracle at GPU sizes: every plan, head dim, dtype and feature, up to 64K keys.

Each head dim, dtype, group size and feature is a kernel of its own to compile, for a second or two: one setting goes through all
plans, the others through one or two. With pytest-xdist, `-n 8` compiles in parallel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import weft_attn as weft
from weft_attn.launch import BackwardDkdvConfig, BackwardDqConfig, ForwardConfig, InvalidConfig, override
from weft_attn.launch.config import StreamConfig
from weft_attn.launch.device import device_of
from weft_attn.launch.select import select
from weft_attn.ops import problem_of
from weft_attn.testing.cases import PLANS, Case, Inputs, cumulative, make_inputs
from weft_attn.testing.compare import Attention, Results, assert_matches_oracle, blockwise, evaluate

DEVICE = torch.device("cuda")
# The setting that meets every plan.
MAIN = Case(size=301, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16)


def ours(case: Case, plan: weft.Plan) -> Attention:
    return lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, sinks=sinks, return_lse=True, **case.options)  # type: ignore[return-value]


def check(case: Case, plan: weft.Plan | None = None, *, gradients: bool = True) -> None:
    plan = plan or case.make_plan()
    inputs = make_inputs(case, plan, DEVICE)
    assert_matches_oracle(evaluate(ours(case, plan), inputs, gradients=gradients), case, plan, inputs)


def check_large(case: Case, plan: weft.Plan, *, gradients: bool = True) -> None:
    """As `check`, with an oracle and a baseline by blocks of rows: all rows and all keys, however many there are."""
    inputs = make_inputs(case, plan, DEVICE)
    found = evaluate(ours(case, plan), inputs, gradients=gradients)
    oracle = blockwise(case, plan, inputs, torch.float64, gradients=gradients, rows=1024)
    baseline = blockwise(case, plan, inputs, case.dtype, gradients=gradients, rows=1024)
    lse = blockwise(case, plan, inputs, torch.float32, gradients=False, rows=1024).lse
    assert_matches_oracle(found, case, plan, inputs, oracle=oracle, baselines=[replace(baseline, lse=lse)])


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_matches_the_oracle(name: str) -> None:
    check(replace(MAIN, plan=name))


@pytest.mark.parametrize(
    ("dim", "dim_v", "dtype"),
    [
        (8, 8, torch.bfloat16),
        (24, 24, torch.float16),
        (64, 64, torch.float16),
        (72, 72, torch.bfloat16),
        (80, 80, torch.bfloat16),
        (128, 128, torch.float16),
        (192, 128, torch.bfloat16),
        (256, 256, torch.bfloat16),
        (64, 64, torch.float32),
        (256, 256, torch.float32),
    ],
    ids=str,
)
def test_every_head_dim_and_dtype_matches_the_oracle(dim: int, dim_v: int, dtype: torch.dtype) -> None:
    check(replace(MAIN, plan="packed_unequal", head_dim=dim, head_dim_v=dim_v, dtype=dtype))


@pytest.mark.parametrize("name", ["zigzag_padded", "causal_more_rows", "shared_prefix", "window_both"])
def test_all_features_together_match_the_oracle(name: str) -> None:
    check(replace(MAIN, plan=name, sinks=True, softcap=2.0))


@pytest.mark.parametrize(
    "features",
    [
        {"sinks": True, "softcap": 2.0, "dtype": torch.float32, "head_dim": 64},
        {"lse_gradient": False},
        {"softmax_scale": 0.31},
        {"spread": 8.0},
    ],
    ids=str,
)
def test_single_features_match_the_oracle(features: dict[str, Any]) -> None:
    check(replace(MAIN, plan="packed", **features))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1)])
def test_other_groupings_match_the_oracle(heads: int, kv_heads: int) -> None:
    check(replace(MAIN, plan="packed_window", heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("keys", [1, 63, 129, 4097])
@pytest.mark.parametrize("rows", [1, 63, 129])
def test_odd_lengths_match_the_oracle(rows: int, keys: int) -> None:
    check(MAIN, weft.Plan.dense(1, rows, keys, causal=True))


# ---- few rows, many keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (8, 1), (4, 4), (32, 8)])
@pytest.mark.parametrize("rows", [1, 16])
def test_decoding_over_64k_keys_matches_the_oracle(rows: int, heads: int, kv_heads: int) -> None:
    case = replace(MAIN, heads=heads, kv_heads=kv_heads, sinks=heads == 8)
    check_large(case, weft.Plan.dense(1, rows, 65_537, causal=True), gradients=False)


def test_a_batch_of_unequal_contexts_is_decoded() -> None:
    keys = [5000, 1, 0, 17, 12_345, 300, 64, 65, 1024]
    plan = weft.Plan.from_cu_seqlens(list(range(len(keys) + 1)), cumulative(keys), causal=True)
    check_large(MAIN, plan)


# ---- 64K keys -------------------------------------------------------------------------------------------------------------


def lengths_of(total: int, documents: int) -> list[int]:
    """Unequal document lengths (log-normal) that add up to about `total`."""
    weights = torch.randn(documents, generator=torch.Generator().manual_seed(0)).exp()
    return [int(x) for x in weights / weights.sum() * total]


@pytest.mark.parametrize("documents", [1, 38])
def test_one_zigzag_rank_of_64k_keys_matches_the_oracle(documents: int) -> None:
    plan = weft.Plan.zigzag(cumulative(lengths_of(65_536, documents)), 3, 8)
    check_large(MAIN, plan)


def test_a_causal_sequence_of_64k_matches_the_oracle() -> None:
    check_large(replace(MAIN, heads=4, kv_heads=1), weft.Plan.dense(1, 65_536, 65_536, causal=True))


def test_a_window_over_64k_matches_the_oracle() -> None:
    check_large(replace(MAIN, heads=4, kv_heads=1), weft.Plan.dense(1, 65_000, 65_000, causal=True, window=(4000, None)))


# ---- switches -------------------------------------------------------------------------------------------------------------


def chosen(kernel: str, plan: weft.Plan, x: Inputs) -> StreamConfig:
    config = select(kernel, problem_of(plan, x.q, x.k, x.v), device_of(x.q.device)).config
    assert isinstance(config, StreamConfig)
    return config


def assert_equal(one: Results, other: Results) -> None:
    for (name, a), (_, b) in zip(one.items(), other.items(), strict=True):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} elements differ"


@pytest.mark.parametrize("use_tma", [False, True])
def test_tiles_may_come_through_pointers_or_the_copy_engine(use_tma: bool) -> None:
    case = replace(MAIN, plan="zigzag_rank_1_of_3")
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    if use_tma and not device_of(DEVICE).has_tma:
        pytest.skip("needs a copy engine")
    kinds = (ForwardConfig, BackwardDkdvConfig, BackwardDqConfig)
    configs = [kind(block_q=64, block_k=64, num_warps=4, num_stages=2, use_tma=use_tma) for kind in kinds]
    with override(*configs):
        assert_matches_oracle(evaluate(ours(case, plan), x), case, plan, x)


@pytest.mark.parametrize("switch", [{"identity_dot": True}, {"cache_modifier": ".cg"}, {"wave_bytes": 1}], ids=str)
def test_switches_match_the_oracle(switch: dict[str, Any]) -> None:
    case = replace(MAIN, plan="packed")
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    names = [
        n for n in ("forward", "backward_dkdv", "backward_dq") if all(hasattr(chosen(n, plan, x), field) for field in switch)
    ]
    with override(*(replace(chosen(name, plan, x), **switch) for name in names)):
        assert_matches_oracle(evaluate(ours(case, plan), x), case, plan, x)


@pytest.mark.parametrize("kind", [BackwardDkdvConfig, BackwardDqConfig])
def test_an_override_holds_in_the_backward_too(kind: type[StreamConfig]) -> None:
    """Autograd runs the backward of CUDA tensors on threads of its own: a config that cannot be must be refused there."""
    case = replace(MAIN, plan="packed")
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    impossible = kind(block_q=1024, block_k=1024, num_warps=4, num_stages=2)
    with override(impossible), pytest.raises(InvalidConfig, match=f"overriding {kind.kernel} config"):
        evaluate(ours(case, plan), x)


# ---- how tensors lie, where kernels run -----------------------------------------------------------------------------------


def test_views_of_a_fused_tensor_are_read_in_place() -> None:
    case = replace(MAIN, plan="packed")
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    fused = torch.cat([x.q, x.k, x.v], dim=1)
    views = Inputs(*fused.split([8, 2, 2], dim=1), x.sinks, x.dout.transpose(0, 1).contiguous().transpose(0, 1), x.dlse)
    assert_equal(evaluate(ours(case, plan), views), evaluate(ours(case, plan), x))


def test_bases_that_the_copy_engine_cannot_address_are_read() -> None:
    case = replace(MAIN, plan="packed")
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)

    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    off = replace(x, q=moved(x.q), k=moved(x.k), v=moved(x.v), dout=moved(x.dout))
    assert_matches_oracle(evaluate(ours(case, plan), off), case, plan, off)


def test_a_dense_batch_matches_the_oracle() -> None:
    plan = weft.Plan.dense(3, 257, 385, causal=True)
    x = make_inputs(MAIN, plan, DEVICE)

    def dense(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = weft.attention(*(t.unflatten(0, (3, -1)) for t in (q, k, v)), causal=True, sinks=sinks, return_lse=True)
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    assert_matches_oracle(evaluate(dense, x), MAIN, plan, x)


def test_lengths_may_be_on_the_device() -> None:
    cu = torch.tensor([0, 100, 100, 357], device=DEVICE)
    x = torch.randn(357, 2, 128, device=DEVICE, dtype=torch.bfloat16)
    out = weft.varlen_attention(x, x, x, cu, cu, causal=True)
    assert torch.equal(out, weft.varlen_attention(x, x, x, cu.tolist(), cu.tolist(), causal=True))  # type: ignore[arg-type]


def test_a_plan_is_used_on_any_stream() -> None:
    case = replace(MAIN, plan="packed")
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        first = evaluate(ours(case, plan), x)
    second = evaluate(ours(case, plan), x)
    torch.cuda.synchronize()
    assert_equal(first, second)
    assert_matches_oracle(first, case, plan, x)


def test_a_captured_graph_replays_the_forward() -> None:
    plan = weft.Plan.dense(1, 16, 4096, causal=True)
    x = make_inputs(MAIN, plan, DEVICE)
    weft.plan_attention(x.q, x.k, x.v, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = weft.plan_attention(x.q, x.k, x.v, plan)
    assert isinstance(out, torch.Tensor)
    x.q.copy_(torch.randn_like(x.q))
    graph.replay()
    assert torch.equal(out, weft.plan_attention(x.q, x.k, x.v, plan))  # type: ignore[arg-type]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("plan", "heads"),
    [
        (weft.Plan.zigzag([0, 16384], 3, 8), 8),
        (weft.Plan.from_cu_seqlens([0, 100, 164, 301], [0, 100, 164, 301], causal=True), 4),
        (weft.Plan.from_cu_seqlens([0, 2], [0, 4096], causal=True), 8),
    ],
    ids=["long rows", "packed", "split keys"],
)
def test_a_captured_step_replays_forward_and_backward_on_other_values(plan: weft.Plan, heads: int, deterministic: bool) -> None:
    x = make_inputs(replace(MAIN, heads=heads, sinks=True), plan, DEVICE)
    assert x.sinks is not None
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v, x.sinks)]

    def step() -> list[torch.Tensor]:
        out, lse = weft.plan_attention(x.q, x.k, x.v, plan, sinks=x.sinks, deterministic=deterministic, return_lse=True)
        return [out, lse, *torch.autograd.grad(out, leaves, x.dout)]

    # What is done once for a plan (tables, compilation) cannot be captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for t in (*leaves, x.dout):
                t.copy_(torch.randn_like(t))
        graph.replay()
        for found, eager in zip(captured, step(), strict=True):
            assert found.isfinite().all()
            if deterministic:
                assert torch.equal(found, eager)
            else:
                # The order of dQ's float32 sums is not fixed: a rounding of the result apart at most.
                torch.testing.assert_close(found, eager, rtol=2**-7, atol=1e-5)


def test_warm_launches_are_replayed() -> None:
    """Triton's launcher is the one that kernels/replay.py knows: else warm calls are slower than they need be."""
    plan = weft.Plan.zigzag([0, 16384], 3, 8)
    x = make_inputs(replace(MAIN, heads=8), plan, DEVICE)
    for _ in range(2):
        evaluate(ours(MAIN, plan), x)
    steps = [step for recipe in plan._recipes.values() for step in (*recipe.before, *recipe.steps, *recipe.after)]
    assert len(steps) >= 2
    if torch.version.cuda is not None:
        assert all(step._bound._replay is not None for step in steps)


def test_a_compiled_layer_gives_the_eager_gradients() -> None:
    def layer(x: torch.Tensor, plan: weft.Plan) -> torch.Tensor:
        q, k, v = x.split([4, 1, 1], dim=1)
        return weft.plan_attention(q, k, v, plan)  # type: ignore[return-value]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in ([100, 157], [64, 1, 300]):
        cu = cumulative(lengths)
        plan = weft.Plan.from_cu_seqlens(cu, cu, causal=True)
        x = torch.randn(cu[-1], 6, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        grads = [torch.autograd.grad(f(x, plan).float().square().sum(), x)[0] for f in (layer, compiled)]
        assert torch.equal(*grads)
