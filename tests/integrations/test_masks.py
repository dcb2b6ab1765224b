"""Masks become plans cell by cell: bands, segments, padding, pages, and any boolean mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft_attn.errors import InvalidPlan
from weft_attn.integrations import masks
from weft_attn.plan import Plan


def blocks(plan: Plan, batch: int) -> np.ndarray:
    """(B, rows, keys) of a packed batch, after a look that no row sees another sequence's keys."""
    full = plan.to_mask().numpy().reshape(batch, plan.total_q // batch, batch, plan.total_k // batch)
    own = np.stack([full[b, :, b] for b in range(batch)])
    assert full.sum() == own.sum()
    return own


@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 7),
    keys=st.integers(1, 9),
    shift=st.integers(-3, 6),
    left=st.none() | st.integers(0, 5),
    right=st.none() | st.integers(0, 5),
    data=st.data(),
)
def test_segmented_bands_hold_the_cells_that_their_definition_names(batch, rows, keys, shift, left, right, data) -> None:
    def numbers(length: int) -> np.ndarray:
        steps = data.draw(st.lists(st.integers(0, 1), min_size=batch * length, max_size=batch * length))
        return np.array(steps).reshape(batch, length).cumsum(axis=1) - 1

    row_segments, key_segments = numbers(rows), numbers(keys)
    visible = np.array(data.draw(st.lists(st.booleans(), min_size=batch * keys, max_size=batch * keys))).reshape(batch, keys)
    plan = masks.segmented_band(row_segments, key_segments, visible, shift, (left, right))
    plan.check()
    distance = np.arange(keys)[None, :] - (np.arange(rows)[:, None] + shift)
    expected = (row_segments[:, :, None] == key_segments[:, None, :]) & visible[:, None, :]
    expected &= (distance >= (-99 if left is None else -left)) & (distance <= (99 if right is None else right))
    np.testing.assert_array_equal(blocks(plan, batch), expected)


def test_a_segment_that_comes_back_is_refused() -> None:
    numbers = np.array([[0, 1, 0]])
    with pytest.raises(InvalidPlan, match="one stretch"):
        masks.segmented_band(numbers, numbers, None, 0, (None, 0))


def test_a_band_of_one_shape_is_one_plan() -> None:
    assert masks.band(2, 3, 4, 1, (None, 0)) is masks.band(2, 3, 4, 1, (None, 0))
    assert masks.band(2, 3, 4, 1, (None, 0)) == Plan.dense(2, 3, 4, causal=True)


@pytest.mark.parametrize("sizes", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_a_batch_without_rows_or_keys_sees_nothing(sizes: tuple[int, int, int]) -> None:
    plan = masks.band(*sizes, 0, (None, None))
    assert (plan.total_q, plan.total_k, plan.pairs) == (sizes[0] * sizes[1], sizes[0] * sizes[2], 0)


@given(
    batch=st.integers(1, 3), rows=st.integers(1, 8), keys=st.integers(1, 8), seed=st.integers(0, 2**16), kind=st.integers(0, 3)
)
def test_any_mask_becomes_a_plan_of_the_same_cells(batch: int, rows: int, keys: int, seed: int, kind: int) -> None:
    generator = np.random.default_rng(seed)
    distance = np.arange(keys)[None, :] - np.arange(rows)[:, None]
    mask = {
        0: lambda: generator.random((batch, rows, keys)) < generator.random(),
        1: lambda: (
            (distance <= generator.integers(-3, 5)) & (distance >= -generator.integers(0, 5)) & np.ones((batch, 1, 1), bool)
        ),
        2: lambda: (distance != generator.integers(-2, 3)) & np.ones((batch, 1, 1), bool),  # a hole that moves
        3: lambda: (distance <= 0) ^ (generator.random((batch, rows, keys)) < 0.05),
    }[kind]()
    plan = masks.cells(mask)
    plan.check()
    np.testing.assert_array_equal(blocks(plan, batch), mask)


def test_a_mask_of_bands_takes_few_slices() -> None:
    distance = np.arange(500)[None, :] - np.arange(500)[:, None]
    assert len(masks.cells(((distance <= 0) & (distance > -64))[None]).slices) <= 3
    packed = np.repeat([0, 1, 2], [100, 250, 150])
    assert len(masks.cells(((distance <= 0) & (packed[:, None] == packed))[None]).slices) == 3


def test_pages_are_read_where_they_lie() -> None:
    pages = np.array([[4, 1, 0], [2, 9, 9], [3, 9, 9]])
    rows, begins, ends = np.array([2, 1, 0]), np.array([1, 0, 0]), np.array([9, 3, 4])
    plan = masks.paged(rows, begins, ends, pages, 4, 20, True, (5, None))
    expected = torch.zeros(3, 20, dtype=torch.bool)
    for row, own in ((0, 7), (1, 8)):  # keys 1 .. 9, the last row at key 8
        for key in range(max(1, own - 5), own + 1):
            expected[row, [16, 4, 0][key // 4] + key % 4] = True
    expected[2, 8:11] = True
    assert torch.equal(plan.to_mask(), expected)


@pytest.mark.parametrize("pages", [[[0, 5]], [[0, -1]], [[1, 1]]])
def test_a_page_that_is_not_there_or_twice_in_a_sequence_is_refused(pages: list[list[int]]) -> None:
    one = np.ones(1, np.int64)
    with pytest.raises(InvalidPlan):
        masks.paged(one, 0 * one, 8 * one, np.array(pages), 4, 20, False, (None, None))
