"""THE visibility rule on the host: what a slice means, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft_attn.plan import Plan, Slice
from weft_attn.plan.slices import canonical, count_pairs, elementary_segments, transpose, visible_interval
from weft_attn.testing.cases import PLANS
from weft_attn.testing.compare import visible

LENGTHS = st.integers(0, 12)
BOUNDS = st.integers(-15, 15) | st.sampled_from([-(2**40), 2**40])


def cells(q_len: int, k_len: int, lo: int, hi: int) -> np.ndarray:
    """The definition, cell by cell."""
    return np.array([[lo <= j - i <= hi for j in range(k_len)] for i in range(q_len)], dtype=bool).reshape(q_len, k_len)


@given(q_len=LENGTHS, k_len=LENGTHS, lo=BOUNDS, hi=BOUNDS)
def test_a_row_sees_exactly_the_columns_of_its_interval(q_len: int, k_len: int, lo: int, hi: int) -> None:
    first, stop = visible_interval(np.arange(q_len), k_len, lo, hi)
    columns = np.arange(k_len)
    seen = (columns >= first[:, None]) & (columns < stop[:, None])
    np.testing.assert_array_equal(seen, cells(q_len, k_len, lo, hi))


@given(q_len=LENGTHS, k_len=LENGTHS, lo=BOUNDS, hi=BOUNDS)
def test_pairs_in_closed_form_are_the_number_of_visible_cells(q_len: int, k_len: int, lo: int, hi: int) -> None:
    # What `canonical` hands over: bands no wider than the slice.
    table = np.array([[3, q_len, 5, k_len, min(max(lo, 1 - q_len), k_len), min(max(hi, -q_len), k_len - 1)]])
    assert count_pairs(table)[0] == cells(q_len, k_len, lo, hi).sum()


@given(q_len=LENGTHS, k_len=LENGTHS, lo=st.none() | BOUNDS, hi=st.none() | BOUNDS)
def test_a_plan_keeps_the_cells_of_its_slices(q_len: int, k_len: int, lo: int | None, hi: int | None) -> None:
    plan = Plan([Slice(2, q_len, 3, k_len, lo, hi)], q_len + 4, k_len + 5)
    expected = np.zeros((q_len + 4, k_len + 5), dtype=bool)
    far = 2**41
    expected[2 : 2 + q_len, 3 : 3 + k_len] = cells(q_len, k_len, -far if lo is None else lo, far if hi is None else hi)
    np.testing.assert_array_equal(plan.to_mask().numpy(), expected)
    assert plan.pairs == expected.sum()
    assert len(plan.slices) == int(expected.any())
    again = Plan(plan.slices, plan.total_q, plan.total_k)
    assert again == plan, "canonical slices are their own canonical form"


@given(q_len=LENGTHS, k_len=LENGTHS, lo=BOUNDS, hi=BOUNDS)
def test_transposing_swaps_rows_and_columns(q_len: int, k_len: int, lo: int, hi: int) -> None:
    table = canonical(np.array([[0, q_len, 0, k_len, lo, hi]]))
    for row in transpose(table).tolist():
        first, stop = visible_interval(np.arange(row[1]), row[3], row[4], row[5])
        columns = np.arange(row[3])
        seen = np.zeros((k_len, q_len), dtype=bool)
        seen[row[0] : row[0] + row[1], row[2] : row[2] + row[3]] = (columns >= first[:, None]) & (columns < stop[:, None])
        np.testing.assert_array_equal(seen.T, cells(q_len, k_len, lo, hi))


@pytest.mark.parametrize(("rows", "keys"), [(5, 5), (7, 3), (3, 7), (1, 9), (9, 1)])
def test_causal_aligns_the_last_row_with_the_last_key(rows: int, keys: int) -> None:
    expected = torch.ones(rows, keys).tril(keys - rows).bool()
    assert torch.equal(Plan.dense(1, rows, keys, causal=True).to_mask(), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(0, 0), (2, None), (None, 2), (3, 1), (100, 100), (2**50, None)])
@pytest.mark.parametrize(("rows", "keys"), [(6, 6), (8, 5), (5, 8)])
def test_a_window_counts_keys_around_the_aligned_diagonal(
    rows: int, keys: int, window: tuple[int | None, int | None], causal: bool
) -> None:
    left, right = window
    if causal:
        right = 0
    expected = np.zeros((rows, keys), dtype=bool)
    for i in range(rows):
        own = i + keys - rows
        for j in range(keys):
            expected[i, j] = (left is None or j >= own - left) and (right is None or j <= own + right)
    mask = Plan.dense(1, rows, keys, causal=causal, window=window).to_mask().numpy()
    np.testing.assert_array_equal(mask, expected)


def test_segments_cut_wherever_the_set_of_slices_changes() -> None:
    table = np.array([[2, 5, 0, 1, 0, 0], [4, 3, 1, 1, 0, 0], [7, 1, 2, 1, 0, 0]])
    assert elementary_segments(table, 10).tolist() == [0, 2, 4, 7, 8, 10]


@pytest.mark.parametrize("name", PLANS)
def test_rows_of_the_mask_made_on_a_device_are_those_of_the_mask(name: str) -> None:
    plan = PLANS[name](24)
    mask = plan.to_mask()
    for first in range(0, plan.total_q, 7):
        stop = min(first + 7, plan.total_q)
        assert torch.equal(visible(plan, first, stop, torch.device("cpu")), mask[first:stop])
