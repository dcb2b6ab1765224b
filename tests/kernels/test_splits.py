"""Few rows: query heads packed into one tile, keys split, parts combined."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import weft_attn as weft
from weft_attn.kernels.call import KernelCall
from weft_attn.launch import CombineConfig, ForwardConfig, override
from weft_attn.testing.cases import Case, make_inputs
from weft_attn.testing.compare import Attention, assert_matches_oracle, evaluate

FEW = ForwardConfig(block_q=16, block_k=16, num_warps=4, num_stages=1)


def ours(case: Case, plan: weft.Plan) -> Attention:
    return lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, sinks=sinks, return_lse=True, **case.options)  # type: ignore[return-value]


def names(launches: list[KernelCall]) -> list[str]:
    return [c.kernel.fn.__name__.removeprefix("attention_").removesuffix("_kernel") for c in launches]


def check(case: Case, launches: list[KernelCall], plan: weft.Plan | None = None, *, pack: int, splits: bool = True) -> None:
    plan = plan or case.make_plan()
    inputs = make_inputs(case, plan)
    launches.clear()
    assert_matches_oracle(evaluate(ours(case, plan), inputs, gradients=False), case, plan, inputs)
    assert names(launches) == (["forward", "combine"] if splits else ["forward"])
    assert launches[0].constants["PACK"] == pack


@pytest.fixture(autouse=True)
def _wide_machine(machine: Callable[..., object]) -> None:
    machine(multiprocessors=132)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "pack", "dtype"),
    [
        (4, 4, 1, torch.bfloat16),
        (4, 1, 4, torch.float16),
        (8, 1, 8, torch.float32),
        (16, 1, 16, torch.bfloat16),
        (6, 2, 3, torch.float16),
        (6, 2, 3, torch.bfloat16),
        (6, 2, 3, torch.float32),
        (24, 1, 12, torch.float32),
    ],
    ids=str,
)
def test_one_row_of_any_grouping_matches_the_oracle(
    heads: int, kv_heads: int, pack: int, dtype: torch.dtype, launches: list[KernelCall]
) -> None:
    with override(FEW):
        check(Case(plan="decode_1", size=60, heads=heads, kv_heads=kv_heads, dtype=dtype), launches, pack=pack)


@pytest.mark.parametrize(("heads", "kv_heads", "pack"), [(2, 2, 1), (8, 2, 4), (8, 1, 8)])
def test_sixteen_rows_match_the_oracle(heads: int, kv_heads: int, pack: int, launches: list[KernelCall]) -> None:
    with override(FEW):
        check(Case(plan="decode_16", size=40, heads=heads, kv_heads=kv_heads), launches, pack=pack)


# Sizes at which some tile of 16 keys has more than 4 to walk, below which nothing is split.
LONG = {
    "causal": 80,
    "causal_more_rows": 140,
    "causal_more_keys": 40,
    "packed_unequal": 80,
    "window_both": 130,
    "zigzag_rank_1_of_3": 70,
    "zigzag_padded": 70,
    "shared_prefix": 70,
    "decode_batch": 40,
    "prefix_lm": 40,
    "unseen": 120,
    "groups": 80,
    "concat": 132,
}


@pytest.mark.parametrize("name", LONG)
def test_any_plan_may_be_split(name: str, launches: list[KernelCall]) -> None:
    with override(FEW):
        check(Case(plan=name, size=LONG[name]), launches, pack=2)


@pytest.mark.parametrize("name", ["no_keys", "empty", "one"])
def test_a_plan_without_work_is_packed_and_not_split(name: str, launches: list[KernelCall]) -> None:
    with override(FEW):
        check(Case(plan=name, heads=4, kv_heads=2, sinks=True), launches, pack=2, splits=False)


def test_more_parts_than_a_combining_program_reads_at_a_time(launches: list[KernelCall]) -> None:
    """Each part has at least 4 tiles of 16 keys: 1,500 keys make 24 parts; a program reads 16."""
    plan = weft.Plan.dense(1, 1, 1500)
    with override(FEW, CombineConfig(num_warps=4, num_stages=1, block_slots=16)):
        check(Case(heads=2, sinks=True), launches, plan, pack=2)
    parts = launches[1].arguments["combines_ptr"][:, 3]
    assert parts.max() > 16


SINKS, SOFTCAP, BOTH = {"sinks": True}, {"softcap": 2.0}, {"sinks": True, "softcap": 2.0, "spread": 8.0}


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("decode_1", SINKS),
        ("decode_1", BOTH),
        ("decode_16", SOFTCAP),
        ("decode_16", BOTH),
        # Rows that see nothing beside a sink.
        ("packed_unequal", SINKS),
        ("packed_unequal", BOTH),
        ("unseen", SINKS),
        ("unseen", SOFTCAP),
    ],
    ids=str,
)
def test_features_survive_the_split(name: str, features: dict[str, object], launches: list[KernelCall]) -> None:
    size = LONG.get(name, 40)
    with override(FEW):
        check(Case(plan=name, size=size, heads=4, kv_heads=1, head_dim_v=24, **features), launches, pack=4)  # type: ignore[arg-type]


def test_a_sink_counts_once_however_many_parts_there_are() -> None:
    """With equal scores the denominator is the number of keys plus one sink's term."""
    keys = 400
    q, k, v = torch.zeros(1, 1, 16), torch.randn(keys, 1, 16), torch.ones(keys, 1, 16)
    with override(FEW):
        out, lse = weft.plan_attention(q, k, v, weft.Plan.dense(1, 1, keys), sinks=torch.zeros(1), return_lse=True)
    torch.testing.assert_close(out, torch.full_like(out, keys / (keys + 1)))
    torch.testing.assert_close(lse, torch.tensor([[float(keys + 1)]]).log())


def test_a_sink_of_minus_infinity_is_no_sink_in_a_split() -> None:
    case = Case(plan="packed_unequal", size=80)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    with override(FEW):
        without = weft.plan_attention(x.q, x.k, x.v, plan, return_lse=True)
        found = weft.plan_attention(x.q, x.k, x.v, plan, sinks=torch.full((2,), float("-inf")), return_lse=True)
    assert torch.equal(found[0], without[0])
    assert torch.equal(found[1], without[1])


def test_a_split_and_a_whole_forward_agree(launches: list[KernelCall], machine: Callable[..., object]) -> None:
    case = Case(plan="decode_16", heads=4, kv_heads=1)
    x = make_inputs(case, case.make_plan())
    with override(FEW):
        split = weft.plan_attention(x.q, x.k, x.v, case.make_plan(), return_lse=True)
        machine(multiprocessors=1)
        whole = weft.plan_attention(x.q, x.k, x.v, case.make_plan(), return_lse=True)
    assert names(launches) == ["forward", "combine", "forward"]
    torch.testing.assert_close(split[0], whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split[1], whole[1], rtol=1e-5, atol=1e-6)


def test_gradients_after_a_split_forward_match_the_oracle(launches: list[KernelCall]) -> None:
    case = Case(plan="decode_16", heads=4, kv_heads=1, sinks=True, head_dim_v=24)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    with override(FEW):
        assert_matches_oracle(evaluate(ours(case, plan), x), case, plan, x)
    assert "combine" in names(launches)


def test_partial_results_are_float32(launches: list[KernelCall]) -> None:
    with override(FEW):
        check(Case(plan="decode_1", dtype=torch.float16), launches, pack=2)
    assert launches[0].arguments["partial_out_ptr"].dtype == torch.float32
    assert launches[0].arguments["partial_lse_ptr"].dtype == torch.float32


def test_a_split_forward_is_repeatable_to_the_bit() -> None:
    case = Case(plan="decode_16", heads=4, kv_heads=2, dtype=torch.bfloat16)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    with override(FEW):
        runs = [weft.plan_attention(x.q, x.k, x.v, plan, return_lse=True) for _ in range(2)]
    for out, lse in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert torch.equal(lse, runs[0][1])
