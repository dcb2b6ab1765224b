"""What a Plan promises: its cells, its checks, its equality."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft_attn import InvalidPlan, Plan, Slice
from weft_attn.plan.slices import MAX_TOKENS, live_plans
from weft_attn.testing.cases import PLANS

SPANS = st.tuples(st.integers(0, 12), st.integers(0, 12))


def assert_says_what_is_wrong(error: BaseException) -> None:
    message = str(error)
    assert "expected" in message, message
    assert "given" in message, message


@pytest.mark.parametrize("name", PLANS)
def test_named_plans_are_sound(name: str) -> None:
    for size in (9, 24, 57):
        if name == "unseen" and size < 12:
            continue
        plan = PLANS[name](size)
        plan.check()
        mask = plan.to_mask()
        assert mask.shape == (plan.total_q, plan.total_k)
        assert plan.pairs == int(mask.sum())


@given(one=SPANS, other=SPANS, keys=SPANS, more_keys=SPANS)
def test_slices_that_share_a_row_and_a_key_are_refused(
    one: tuple[int, int], other: tuple[int, int], keys: tuple[int, int], more_keys: tuple[int, int]
) -> None:
    slices = [Slice(*one, *keys), Slice(*other, *more_keys)]
    rectangles = np.zeros((2, 24, 24), dtype=bool)
    for rectangle, s in zip(rectangles, slices, strict=True):
        rectangle[s.q_start : s.q_start + s.q_len, s.k_start : s.k_start + s.k_len] = True
    if (rectangles[0] & rectangles[1]).any():
        with pytest.raises(InvalidPlan, match="disjoint keys") as raised:
            Plan(slices, 24, 24)
        assert_says_what_is_wrong(raised.value)
    else:
        plan = Plan(slices, 24, 24)
        np.testing.assert_array_equal(plan.to_mask().numpy(), rectangles.any(axis=0))


def test_an_overlap_is_found_behind_slices_that_do_not_overlap() -> None:
    fine = [Slice(10 * d, 10, 10 * d, 10) for d in range(9)]
    for at in range(9):
        with pytest.raises(InvalidPlan, match="disjoint keys"):
            Plan([*fine, Slice(10 * at + 3, 2, 10 * at + 9, 1)], 90, 90)


def test_the_order_of_slices_does_not_change_the_cells() -> None:
    slices = PLANS["zigzag_rank_1_of_2"](9).slices
    masks = {bytes(Plan(order, 11, 22).to_mask().numpy()) for order in itertools.permutations(slices[:5])}
    assert len(masks) == 1


@pytest.mark.parametrize(
    ("slices", "total_q", "total_k"),
    [
        ([Slice(0, 5, 0, 4)], 4, 4),
        ([Slice(2, 3, 0, 4)], 4, 4),
        ([Slice(0, 4, 1, 4)], 4, 4),
        ([Slice(-1, 2, 0, 4)], 4, 4),
        ([Slice(0, 2, -1, 4)], 4, 4),
        ([Slice(0, -2, 0, 4)], 4, 4),
        ([Slice(0, 2, 0, -4)], 4, 4),
        ([Slice(5, 0, 0, 1)], 4, 4),
        ([Slice(0, 1.0, 0, 1)], 4, 4),  # type: ignore[arg-type]
        ([Slice(0, True, 0, 1)], 4, 4),
        ([Slice("0", 1, 0, 1)], 4, 4),  # type: ignore[arg-type]
        ([Slice(0, 1, 0, None)], 4, 4),  # type: ignore[arg-type]
        ([Slice(0, 1, 0, 1, lo=0.5)], 4, 4),  # type: ignore[arg-type]
        ([Slice(0, 1, 0, 1, hi=False)], 4, 4),
        ([Slice(0, 1, 0, 1, hi=np.bool_(True))], 4, 4),  # type: ignore[arg-type]
        ([(0, 1, 0, 1)], 4, 4),
        ([None], 4, 4),
        ([], -1, 4),
        ([], 4, -1),
        ([], 4.0, 4),
        ([], 4, True),
        ([], 4, None),
        ([], MAX_TOKENS + 1, 4),
        ([], 4, MAX_TOKENS + 1),
        ([Slice(0, 2, 0, 3), Slice(1, 2, 2, 2)], 4, 4),
    ],
    ids=str,
)
def test_a_plan_that_breaks_a_rule_is_refused(slices: Any, total_q: Any, total_k: Any) -> None:
    with pytest.raises(InvalidPlan) as raised:
        Plan(slices, total_q, total_k)
    assert isinstance(raised.value, ValueError)
    assert_says_what_is_wrong(raised.value)


def test_integers_of_any_kind_are_integers() -> None:
    plan = Plan([Slice(np.int32(0), np.int64(3), np.uint8(1), 2, lo=np.int16(-1))], np.int64(3), 3)  # type: ignore[arg-type]
    assert plan == Plan([Slice(0, 3, 1, 2, lo=-1)], 3, 3)


@pytest.mark.parametrize("far", [2**31, 2**62, 2**63, 10**30])
def test_a_bound_farther_than_any_key_is_no_bound(far: int) -> None:
    plan = Plan([Slice(0, 3, 0, 4, lo=-far, hi=far)], 3, 4)
    assert plan == Plan([Slice(0, 3, 0, 4)], 3, 4)
    assert Plan([Slice(0, 3, 0, 4, lo=far)], 3, 4).pairs == 0
    assert Plan([Slice(0, 3, 0, 4, hi=-far)], 3, 4).pairs == 0


def test_pairs_of_a_billion_tokens_are_counted_exactly() -> None:
    n = 2**30
    assert Plan.dense(1, n, n).pairs == n * n
    assert Plan.dense(1, n, n, causal=True).pairs == n * (n + 1) // 2
    assert Plan.dense(1, n, n, causal=True, window=(2**20, None)).pairs == (2**20 + 1) * n - 2**20 * (2**20 + 1) // 2
    assert Plan([Slice(0, n, 0, n, hi=-1)], n, n).pairs == n * (n - 1) // 2


def test_a_plan_equals_another_with_the_same_slices_and_sizes() -> None:
    one, other = (Plan([Slice(0, 3, 0, 4, hi=0)], 5, 6) for _ in range(2))
    assert one == other
    assert one != Plan([Slice(0, 3, 0, 4, hi=1)], 5, 6)
    assert one != Plan([Slice(0, 3, 0, 4, hi=0)], 6, 6)
    assert one != "plan"
    assert len({one, other}) == 1, "what is equal is one key"


def test_repr_says_the_size_and_the_work() -> None:
    assert repr(Plan([Slice(0, 3, 0, 4, hi=0)], 5, 6)) == "Plan(1 slices, total_q=5, total_k=6, pairs=6)"


def test_the_table_is_the_slices_as_int32() -> None:
    plan = PLANS["packed"](24)
    assert plan.table.dtype == torch.int32
    assert plan.table.device.type == "cpu"
    assert plan.table.tolist() == [[s.q_start, s.q_len, s.k_start, s.k_len, s.lo, s.hi] for s in plan.slices]


def test_a_plan_is_found_by_its_table_while_it_lives() -> None:
    plan = PLANS["packed"](24)
    address = plan.table.data_ptr()
    assert live_plans[address] is plan
    del plan
    gc.collect()
    assert address not in live_plans


def test_a_thousand_documents_cost_milliseconds() -> None:
    import time

    lengths = np.exp(np.random.default_rng(0).normal(np.log(1500), 1, size=1000)).astype(int)
    cu = np.concatenate([[0], np.cumsum(lengths)])
    for build in (lambda: Plan.from_cu_seqlens(cu, cu, causal=True), lambda: Plan.zigzag(cu, 3, 8, kv_order="sequence")):
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            build()
            times.append(time.perf_counter() - begin)
        # Designed for 5 ms; the rest is for a busy machine.
        assert min(times) < 0.05


@given(
    st.integers(0, 8),
    st.integers(0, 8),
    st.one_of(st.none(), st.integers(-12, 12)),
    st.one_of(st.none(), st.integers(-12, 12)),
)
def test_canonical_slices_hold_no_row_and_no_key_at_an_end_that_is_not_visible(
    q_len: int, k_len: int, lo: int | None, hi: int | None
) -> None:
    given_slice = Slice(2, q_len, 3, k_len, lo, hi)
    plan = Plan([given_slice], 12, 13)
    mask = np.zeros((12, 13), dtype=bool)
    for i in range(q_len):
        for j in range(k_len):
            mask[2 + i, 3 + j] = (lo is None or j - i >= lo) and (hi is None or j - i <= hi)
    np.testing.assert_array_equal(plan.to_mask().numpy(), mask)
    assert plan.pairs == mask.sum()
    assert len(plan.slices) == bool(mask.any())
    for one in plan.slices:
        for row in (one.q_start, one.q_start + one.q_len - 1):
            assert mask[row].any()
        for key in (one.k_start, one.k_start + one.k_len - 1):
            assert mask[:, key].any()
    assert Plan(plan.slices, 12, 13) == plan


def test_a_copy_of_a_plan_is_the_plan() -> None:
    plan = Plan.from_cu_seqlens([0, 3, 7], [0, 3, 7], causal=True)
    assert copy.copy(plan) is plan
    assert copy.deepcopy({"a layer": [plan]})["a layer"][0] is plan


@pytest.mark.parametrize("name", ["packed", "zigzag_padded", "unseen"])
def test_a_pickled_plan_is_as_good_as_the_first(name: str, tmp_path: Path) -> None:
    plan = PLANS[name](33)
    # What is kept with a plan is not part of it.
    plan._recipes["a pass"] = lambda: None
    plan._streams["a cut"] = lambda: None
    plan._warm["a layout"] = lambda: None
    torch.save(plan, tmp_path / "plan.pt")
    for found in (pickle.loads(pickle.dumps(plan)), torch.load(tmp_path / "plan.pt", weights_only=False)):
        assert found == plan
        assert hash(found) == hash(plan)
        assert torch.equal(found.table, plan.table)
        assert found.slices == plan.slices
        assert (found._recipes, found._streams, found._warm) == ({}, {}, {})
        # An operator finds it by its table.
        assert live_plans[found.table.data_ptr()] is found


@pytest.mark.parametrize("slices", [None, 3, Slice(0, 4, 0, 6)])
def test_slices_that_are_no_sequence_are_refused(slices: Any) -> None:
    with pytest.raises(InvalidPlan) as raised:
        Plan(slices, 4, 6)
    assert_says_what_is_wrong(raised.value)
    with pytest.raises(InvalidPlan) as raised:
        Plan.from_groups(slices, [0, 6])
    assert_says_what_is_wrong(raised.value)
