"""Hopper's kernels against the oracle on every plan, however small: selection would give the smallest to the portable kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import weft_attn as weft
from weft_attn.kernels.triton.layout import ITEM_EDGE_TILES
from weft_attn.launch import override
from weft_attn.launch.config import HopperConfig, HopperForwardConfig, LaunchConfig
from weft_attn.launch.device import device_of
from weft_attn.launch.select import DKDV_KERNELS, DQ_KERNELS, FORWARD_KERNELS, Problem, select_first, select_fused
from weft_attn.ops import attention_into, begin_backward
from weft_attn.plan import in_turn
from weft_attn.plan.stream import Tiling, host_stream
from weft_attn.testing.cases import PLANS, Case, make_inputs
from weft_attn.testing.compare import assert_matches_oracle, evaluate

DEVICE = torch.device("cuda")
MAIN = Case(size=301, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if not device_of(DEVICE).has_hopper_kernels:
        pytest.skip("Hopper's kernels run on sm_90")


@pytest.fixture(autouse=True)
def _in_turn_however_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel of all gradients is overridden, a deterministic backward has its programs add in turn."""
    monkeypatch.setattr(in_turn, "TILES_PER_TURN", 0)
    monkeypatch.setattr(in_turn, "EDGES_OF_MEAN", math.inf)


def rows_of(case: Case, *, deterministic: bool = False, keys: float | None = None, alone: bool = False) -> list[LaunchConfig]:
    """What the tables give this head dim, as overrides: they run whatever the number of rows and keys.

    Args:
        keys: rows for so many keys a query; None: many, or where they are to be deterministic few.
        alone: programs work alone, also where they could in pairs.
    """
    keys = (0 if deterministic else math.inf) if keys is None else keys
    group = 1 if alone else case.heads // case.kv_heads
    problem = Problem(case.head_dim, case.dim_v, case.dtype.itemsize * 8, keys_per_query=keys, group=group)
    device = device_of(DEVICE)
    choices = [select_first(FORWARD_KERNELS, problem, device)]
    fused = None if deterministic else select_fused(problem, device)
    choices += [fused] if fused else [select_first(kernels, problem, device) for kernels in (DKDV_KERNELS, DQ_KERNELS)]
    found: list[LaunchConfig] = [c.config for c in choices if isinstance(c.config, HopperConfig)]
    assert found, "no row of the tables serves the case"
    return found


def differing_numbers(run: Callable[[], list[torch.Tensor]], times: int) -> int:
    """How many numbers of so many runs are not those of the first."""
    first = run()
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(times):
        for one, other in zip(run(), first, strict=True):
            differing += (one != other).sum()
    return int(differing)


def takes_turns(plan: weft.Plan) -> bool:
    """Whether programs have added in turn under the plan."""
    return any(tiling.in_turn and len(stream.afters) for (tiling, _), stream in plan._streams.items())


def check(case: Case, plan: weft.Plan | None = None, *, poison: bool = False) -> None:
    """Match the oracle with the kernel of all gradients, as its programs come and in turn, and with those of each; in pairs, and alone."""
    plan = plan or case.make_plan()
    inputs = make_inputs(case, plan, DEVICE)
    given = inputs.poisoned(plan) if poison else inputs
    fused, apart = rows_of(case), rows_of(case, deterministic=True)
    rows = [fused, fused, apart, rows_of(case, deterministic=True, keys=math.inf, alone=True)]
    for deterministic, configs in zip((False, True, True, True), rows, strict=True):
        attention = partial(weft.plan_attention, plan=plan, return_lse=True, deterministic=deterministic, **case.options)
        with override(*configs):
            found = evaluate(lambda q, k, v, sinks: attention(q, k, v, sinks=sinks), given)  # type: ignore[arg-type] # noqa: B023
        assert_matches_oracle(found, case, plan, inputs)


@pytest.mark.parametrize("dim", [64, 128])
def test_a_backward_over_some_heads_of_its_tensors_is_that_of_the_heads_alone(dim: int) -> None:
    """As over several ranks: out, dout, dq and the statistics are views of some heads, with NaN in the others."""
    case = replace(MAIN, plan="packed_unequal", head_dim=dim)
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    assert x.dlse is not None
    rows, heads = plan.total_q, case.heads

    def of_several(tensor: torch.Tensor, along: int) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[along] += 4
        whole = torch.full(shape, math.nan, dtype=tensor.dtype, device=DEVICE)
        view = whole.narrow(along, 3, tensor.shape[along])
        view.copy_(tensor)
        return view

    for deterministic in (False, True):
        with override(*rows_of(case, deterministic=deterministic)):
            out, lse = torch.empty_like(x.q), torch.empty(heads, rows, device=DEVICE)
            attention_into(x.q, x.k, x.v, None, plan, dim**-0.5, 0.0, deterministic, out, lse)
            found = []
            for seen in (lambda tensor, _: tensor, of_several):
                gradients = [seen(torch.full_like(tensor, math.nan), 1) for tensor in (x.q, x.k, x.v)]
                begin_backward(
                    seen(x.dout, 1), seen(x.dlse, 0), seen(x.q, 1), seen(x.k, 1), seen(x.v, 1), None, seen(out, 1), seen(lse, 0),
                    plan, dim**-0.5, 0.0, deterministic, *gradients,
                ).complete()  # fmt: skip
                found.append(gradients)
        for one, other, sums_vary in zip(*found, (not deterministic, False, False), strict=True):
            torch.testing.assert_close(other, one, **(dict(rtol=2e-2, atol=2e-3) if sums_vary else dict(rtol=0, atol=0)))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_backward_begins_before_its_keys_are_there(dim: int, deterministic: bool) -> None:
    """As over several ranks: until `multiply`, k, v, dk and dv may hold anything; once it is done, dk and dv leave."""
    case = replace(MAIN, plan="packed_unequal", head_dim=dim)
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    scalars = (plan, dim**-0.5, 0.0, deterministic)
    with override(*rows_of(case, deterministic=deterministic)):
        out, lse = torch.empty_like(x.q), torch.empty(case.heads, plan.total_q, device=DEVICE)
        attention_into(x.q, x.k, x.v, None, *scalars, out, lse)
        once, later = ([torch.full_like(y, math.nan) for y in (x.q, x.k, x.v)] for _ in range(2))
        begin_backward(x.dout, x.dlse, x.q, x.k, x.v, None, out, lse, *scalars, *once).complete()
        k, v = torch.full_like(x.k, math.nan), torch.full_like(x.v, math.nan)
        # Two at a time, as of two groups of heads: each has memory of its own between its launches.
        backwards = [begin_backward(x.dout, x.dlse, x.q, k, v, None, out, lse, *scalars, *later) for _ in range(2)]
        assert all(gradient.isnan().all() for gradient in later[1:])
        k.copy_(x.k)
        v.copy_(x.v)
        backwards[0].multiply()
        dk, dv = (gradient.clone() for gradient in later[1:])
        backwards[1].multiply()
        backwards[0].finish()
    for one, other, sums_vary in zip(once, (later[0], dk, dv), (not deterministic, False, False), strict=True):
        torch.testing.assert_close(other, one, **(dict(rtol=2e-2, atol=2e-3) if sums_vary else dict(rtol=0, atol=0)))


# Tensors without rows cannot be described to the copy engine: such calls are the portable kernels'.
@pytest.mark.parametrize("name", [name for name in PLANS if name not in ("no_rows", "no_keys")])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_plan_matches_the_oracle(name: str, dim: int) -> None:
    check(replace(MAIN, plan=name, head_dim=dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 256])
def test_other_head_dims_match_the_oracle(dim: int, dtype: torch.dtype) -> None:
    check(replace(MAIN, plan="packed_unequal", head_dim=dim, dtype=dtype))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_items_without_edge_tiles_and_items_without_any_match_the_oracle(dim: int) -> None:
    case = replace(MAIN, head_dim=dim)
    check(case, weft.Plan.dense(1, 256, 256))
    check(case, weft.Plan.dense(1, 400, 100, causal=True))


@pytest.mark.parametrize("name", ["packed_window", "causal_more_rows"])
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-18, 2.0])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_any_scale_matches_the_oracle(name: str, scale: float, dim: int) -> None:
    """Row statistics, rows without keys among them, are divided by a scale where products begin with them."""
    check(replace(MAIN, plan=name, head_dim=dim, softmax_scale=scale))


@pytest.mark.parametrize("name", ["zigzag_padded", "causal_more_rows", "shared_prefix", "window_both"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_all_features_together_match_the_oracle(name: str, dim: int) -> None:
    check(replace(MAIN, plan=name, head_dim=dim, sinks=True, softcap=2.0))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (6, 2), (2, 1)])
@pytest.mark.parametrize("dim", [64, 128])
def test_other_groupings_match_the_oracle(heads: int, kv_heads: int, dim: int) -> None:
    check(replace(MAIN, plan="packed_window", heads=heads, kv_heads=kv_heads, head_dim=dim))


@pytest.mark.parametrize("name", ["zigzag_padded", "unseen", "groups"])
def test_nan_where_nobody_looks_reaches_nothing(name: str) -> None:
    check(replace(MAIN, plan=name), poison=True)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_nan_of_a_document_reaches_no_other(dim: int) -> None:
    """Nor through zeros that are added to a neighbour's rows of dQ."""
    case = replace(MAIN, plan="packed_unequal", head_dim=dim)
    offsets = [0, 100, 230, 400, 401, 500]
    plan = weft.Plan.from_cu_seqlens(offsets, offsets, causal=True)
    clean = make_inputs(case, plan, DEVICE)
    sick = slice(100, 230)
    for deterministic in (False, True):
        attention = partial(weft.plan_attention, plan=plan, return_lse=True, deterministic=deterministic)
        dirty = make_inputs(case, plan, DEVICE)
        for t in (dirty.q, dirty.k, dirty.v, dirty.dout):
            t[sick] = float("nan")
        with override(*rows_of(case, deterministic=deterministic)):
            want, got = (evaluate(lambda q, k, v, sinks: attention(q, k, v), x) for x in (clean, dirty))  # type: ignore[arg-type] # noqa: B023
        for name in ("out", "dq", "dk", "dv"):
            one, other = getattr(got, name).clone(), getattr(want, name).clone()
            one[sick], other[sick] = 0, 0
            torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_keys_beyond_an_item_have_no_infinite_weights(dim: int) -> None:
    """Slices that end inside a tile, and scores so low that the weight of a zeroed key overflows fp16."""
    case = replace(MAIN, head_dim=dim, dtype=torch.float16)
    plan = weft.Plan.zigzag([0, 1000, 5100], 0, 4)
    x = make_inputs(case, plan, DEVICE)
    x.q.mul_(0.1).add_(1.3)
    x.k.mul_(0.1).sub_(1.3)
    results = []
    for deterministic in (False, True):
        attention = partial(weft.plan_attention, plan=plan, return_lse=True, deterministic=deterministic)
        with override(*rows_of(case, deterministic=deterministic)):
            results.append(evaluate(lambda q, k, v, sinks: attention(q, k, v), x))  # type: ignore[arg-type] # noqa: B023
    for (name, one), (_, other) in zip(results[0].items(), results[1].items(), strict=True):
        assert one.isfinite().all() or name == "lse", name
        torch.testing.assert_close(one, other, rtol=2**-6, atol=1e-3 * float(other.abs().nan_to_num(posinf=0).max()), msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_rows_whose_largest_score_rises_slowly_and_then_at_once_match_the_oracle(dim: int, dtype: torch.dtype) -> None:
    """What came before is rescaled only where a tile's scores are far above the one that its rows' are lowered by."""
    case = replace(MAIN, head_dim=dim, dtype=dtype, size=1500)
    plan = weft.Plan.from_cu_seqlens([0, 700, 1500], [0, 700, 1500], causal=True)
    for sizes in (torch.arange(1500) // 64 * 0.3, 8.0 * (torch.arange(1500) % 700 > 500), 6.0 - torch.arange(1500) / 250):
        inputs = make_inputs(case, plan, DEVICE)
        inputs.k.mul_((0.1 + sizes.to(DEVICE))[:, None, None])
        with override(*rows_of(case)):
            found = evaluate(lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, return_lse=True), inputs)  # type: ignore[arg-type]
        assert_matches_oracle(found, case, plan, inputs)


def most_edge_tiles(plan: weft.Plan, rows: list[LaunchConfig]) -> int:
    """Of an item of the forward."""
    config = next(row for row in rows if isinstance(row, HopperForwardConfig))
    return int(host_stream(plan, Tiling(*config.cut)).items[:, ITEM_EDGE_TILES.value].max())


# Items without edge tiles; with two and more, where the last one has the largest scores.
RISING = {
    "interior": (weft.Plan.from_cu_seqlens([0, 640, 1408], [0, 640, 1408]), 640),
    "edges": (weft.Plan.dense(1, 1408, 1500, causal=True), 1500),
    "window": (weft.Plan.dense(1, 1408, 1500, causal=True, window=(300, 0)), 1500),
}


@pytest.mark.parametrize("features", [{}, {"softcap": 200.0}, {"sinks": True}], ids=["plain", "softcap", "sinks"])
@pytest.mark.parametrize("name", RISING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_scores_that_rise_beyond_the_limit_match_the_oracle(
    dim: int, dtype: torch.dtype, name: str, features: dict[str, Any]
) -> None:
    """By 20 powers of two every 64 keys: interior tiles are weighed again one after the other, and edge tiles after an item's first."""
    plan, document = RISING[name]
    case = replace(MAIN, head_dim=dim, dtype=dtype, **features)
    rows = rows_of(case)
    most = most_edge_tiles(plan, rows)
    assert most == 0 if name == "interior" else most > 1
    inputs = make_inputs(case, plan, DEVICE)
    inputs.q.mul_(0.05).add_(1.0)
    step = torch.arange(plan.total_k, device=DEVICE) % document // 64
    inputs.k.mul_(0.05).add_((step * 20 * math.log(2) / math.sqrt(dim))[:, None, None])
    if inputs.sinks is not None:
        inputs.sinks[0], inputs.sinks[1] = -math.inf, 100.0
    with override(*rows):
        found = evaluate(
            lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, sinks=sinks, return_lse=True, **case.options),  # type: ignore[arg-type]
            inputs,
        )
    assert_matches_oracle(found, case, plan, inputs)


@pytest.mark.parametrize("name", RISING)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_row_is_the_same_to_the_bit_beside_rows_that_are_weighed_again(dim: int, name: str) -> None:
    plan, document = RISING[name]
    x = make_inputs(replace(MAIN, head_dim=dim), plan, DEVICE)
    step = torch.arange(plan.total_k, device=DEVICE) % document // 64
    x.k.mul_(0.05).add_((step * 20 * math.log(2) / math.sqrt(dim))[:, None, None])
    others = torch.arange(plan.total_q, device=DEVICE) % 64 < 8
    results = []
    for size in (0.0, 1.0):
        # Rows that see scores alike beside such rows, and beside rows whose scores rise in every tile.
        q = torch.where(others[:, None, None], torch.full_like(x.q, size), x.q * 0.01)
        with override(*rows_of(replace(MAIN, head_dim=dim))):
            results.append(weft.plan_attention(q, x.k, x.v, plan, return_lse=True))
    (out, lse), (beside_out, beside_lse) = results
    assert torch.equal(out[~others], beside_out[~others])
    assert torch.equal(lse[:, ~others], beside_lse[:, ~others])


@pytest.mark.parametrize("name", [name for name in PLANS if name not in ("no_rows", "no_keys")])
def test_three_consumers_in_turn_match_the_oracle_on_every_plan(name: str) -> None:
    """Of pairs and of programs alone."""
    case = replace(MAIN, plan=name, head_dim=64, sinks=name == "packed")
    for alone in (False, True):
        forward = next(row for row in rows_of(case, alone=alone) if isinstance(row, HopperForwardConfig))
        assert (forward.consumers, forward.cluster) == (3, 1 if alone else 2)
    check(case, poison=name in ("zigzag_padded", "unseen", "groups"))


def test_graphs_replay_beside_eager_launches() -> None:
    """A persistent grid counts its items: a captured launch with a counter of its own."""
    case = replace(MAIN, plan="packed")
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    with override(*rows_of(case)):
        want = weft.plan_attention(x.q, x.k, x.v, plan)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = weft.plan_attention(x.q, x.k, x.v, plan)
        side = torch.cuda.Stream()
        for _ in range(20):
            with torch.cuda.stream(side):
                graph.replay()
            eager = weft.plan_attention(x.q, x.k, x.v, plan)
            torch.cuda.synchronize()
            assert torch.equal(got, want)
            assert torch.equal(eager, want)


@pytest.mark.parametrize("alone", [False, True])
def test_a_thousand_forwards_of_three_consumers_are_equal_to_the_bit(alone: bool) -> None:
    case = replace(MAIN, plan="packed", head_dim=64, sinks=True)
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    with override(*rows_of(case, alone=alone)), torch.no_grad():
        differing = differing_numbers(lambda: [weft.plan_attention(x.q, x.k, x.v, plan, sinks=x.sinks)], 1000)
    assert differing == 0


@pytest.mark.parametrize(("dim", "how"), [(128, "in turn"), (64, "in turn"), (128, "in pairs"), (128, "alone"), (256, "alone")])
def test_a_thousand_runs_are_equal_to_the_bit(dim: int, how: str) -> None:
    case = replace(MAIN, plan="packed", sinks=True, head_dim=dim)
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    configs = rows_of(case) if how == "in turn" else rows_of(case, deterministic=True, alone=how == "alone")
    attention = lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, sinks=sinks, deterministic=True, return_lse=True)  # noqa: E731
    with override(*configs):
        differing = differing_numbers(lambda: [t for _, t in evaluate(attention, x).items()], 1000)  # type: ignore[arg-type]
    assert differing == 0
    assert (how == "in turn") is takes_turns(plan)


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(32, 8, 256), (32, 8, 64), (32, 8, 33), (16, 16, 64), (16, 16, 33)])
def test_many_short_items_in_a_row_are_equal_to_the_bit(heads: int, kv_heads: int, length: int) -> None:
    """Items of one or two tiles: what an item reads, its place in the tables too, must have come before the next one's is brought."""
    offsets = torch.arange(0, 65536 // length + 1) * length
    plan = weft.Plan.from_cu_seqlens(offsets, offsets, causal=True)
    case = replace(MAIN, heads=heads, kv_heads=kv_heads)
    x = make_inputs(case, plan, DEVICE)

    def run() -> list[torch.Tensor]:
        attention = lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, deterministic=True, return_lse=True)  # noqa: E731
        return [t for _, t in evaluate(attention, x).items()]

    assert differing_numbers(run, 30) == 0


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gradients_of_short_items_keys_are_equal_to_the_bit(dim: int) -> None:
    """Where all gradients come of one kernel, in whatever order it adds to dQ: an item's keys and values, too, must have been read before the
    next one's are brought.
    """
    offsets = torch.arange(0, 257) * 33
    plan = weft.Plan.from_cu_seqlens(offsets, offsets, causal=True)
    case = replace(MAIN, heads=32, kv_heads=8, head_dim=dim)
    x = make_inputs(case, plan, DEVICE)

    def run() -> list[torch.Tensor]:
        attention = lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, return_lse=True)  # noqa: E731
        results = evaluate(attention, x)
        return [results.dk, results.dv]

    with override(*rows_of(case, deterministic=False)):
        assert differing_numbers(run, 30) == 0


@pytest.mark.parametrize(
    "plan",
    [
        weft.Plan.dense(1, 8192, 8192, causal=True),
        weft.Plan.dense(1, 8192, 8192),
        weft.Plan.dense(1, 8192, 8192, causal=True, window=(1000, 0)),
        weft.Plan.from_cu_seqlens([0, 3001, 8192], [0, 3001, 8192], causal=True),
    ],
    ids=["causal", "full", "window", "two documents"],
)
@pytest.mark.parametrize("dim", [64, 128])
def test_programs_in_turn_add_in_the_same_order_every_time(plan: weft.Plan, dim: int) -> None:
    """Many rounds of the grid, up and down, where programs wait for each other; without turns these gradients differ."""
    case = replace(MAIN, heads=32, kv_heads=8, head_dim=dim)
    x = make_inputs(case, plan, DEVICE)
    attention = lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, deterministic=True, return_lse=True)  # noqa: E731
    with override(*rows_of(case)):
        differing = differing_numbers(lambda: [t for _, t in evaluate(attention, x).items()], 30)  # type: ignore[arg-type]
    assert differing == 0
    assert takes_turns(plan)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(128, torch.bfloat16), (128, torch.float16), (64, torch.bfloat16), (256, torch.bfloat16)]
)
def test_long_rows_take_the_fused_backward_and_match_the_oracle(dim: int, dtype: torch.dtype) -> None:
    case = replace(MAIN, plan="zigzag_rank_1_of_2", size=5000, heads=4, kv_heads=1, head_dim=dim, dtype=dtype)
    plan = case.make_plan()
    problem = Problem(dim, dim, 16, keys_per_query=plan.keys_per_query)
    assert select_fused(problem, device_of(DEVICE)) is not None
    x = make_inputs(case, plan, DEVICE)
    for deterministic in (False, True):
        attention = partial(weft.plan_attention, plan=plan, return_lse=True, deterministic=deterministic)
        assert_matches_oracle(evaluate(lambda q, k, v, sinks: attention(q, k, v), x), case, plan, x)  # type: ignore[arg-type] # noqa: B023
