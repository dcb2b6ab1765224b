"""Layouts: each rank's rows by the formula, each token once, and a plan that sees what the whole document's rows see."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft_attn import InvalidInput, InvalidPlan, Plan
from weft_attn.plan.layouts import LAYOUTS
from weft_attn.testing.cases import cumulative
from weft_attn.testing.parallel import owned

LENGTHS = st.lists(st.integers(0, 30), max_size=5)
WORLDS = st.integers(1, 5)
WINDOWS = st.none() | st.tuples(st.none() | st.integers(0, 12), st.none() | st.integers(0, 12))
NAMES = st.sampled_from(sorted(LAYOUTS))


@given(name=NAMES, lengths=LENGTHS, world=WORLDS)
def test_a_ranks_tokens_and_positions_follow_the_formula(name: str, lengths: list[int], world: int) -> None:
    cu = cumulative(lengths)
    layout = LAYOUTS[name].of(np.array(cu, dtype=np.int64), world)
    for rank in range(world):
        rows = owned(name, lengths, rank, world)
        assert layout.positions(rank).tolist() == [t for _, t in rows]
        assert layout.tokens(rank).tolist() == [cu[d] + t for d, t in rows]
        assert layout.rank_tokens[rank] == len(rows)
    assert sorted(np.concatenate([layout.tokens(r) for r in range(world)]).tolist()) == list(range(sum(lengths)))


@given(name=NAMES, lengths=LENGTHS, world=WORLDS, data=st.data(), causal=st.booleans(), window=WINDOWS)
def test_a_ranks_rows_see_what_the_whole_documents_rows_see(
    name: str,
    lengths: list[int],
    world: int,
    data: st.DataObject,
    causal: bool,
    window: tuple[int | None, int | None] | None,
) -> None:
    rank = data.draw(st.integers(0, world - 1))
    spare = data.draw(st.none() | st.integers(0, 5))
    counts = [len(owned(name, lengths, r, world)) for r in range(world)]
    stride = None if spare is None else max(counts) + spare
    cu = cumulative(lengths)
    plan = Plan.sharded(name, cu, rank, world, stride, causal=causal, window=window)
    plan.check()
    whole = Plan.from_cu_seqlens(cu, cu, causal=causal, window=window).to_mask().numpy()
    starts = [sum(counts[:r]) if stride is None else r * stride for r in range(world)]
    expected = np.zeros((counts[rank], sum(counts) if stride is None else world * stride), dtype=bool)
    rows = [cu[d] + t for d, t in owned(name, lengths, rank, world)]
    for r in range(world):
        keys = [cu[d] + t for d, t in owned(name, lengths, r, world)]
        expected[:, starts[r] : starts[r] + counts[r]] = whole[np.ix_(rows, keys)]
    np.testing.assert_array_equal(plan.to_mask().numpy(), expected)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_window_that_ends_before_a_neighbour_in_the_buffer_keeps_it_whole(name: str) -> None:
    # Of 2 ranks, rank 0's late chunk sees nothing of its early one, which is its neighbour in the buffer, and all of itself.
    for length, left in ((21, 9), (21, 3), (64, 20)):
        whole = Plan.dense(1, length, length, causal=True, window=(left, None))
        for world in (2, 3, 4):
            assert (
                sum(Plan.sharded(name, [0, length], r, world, window=(left, None)).pairs for r in range(world)) == whole.pairs
            )


def test_zigzag_is_one_of_the_layouts() -> None:
    cu = [0, 9, 9, 30]
    assert Plan.sharded("zigzag", cu, 1, 3, 12) == Plan.zigzag(cu, 1, 3, rank_stride=12)


def test_ranks_see_equal_work_under_zigzag_and_striped() -> None:
    for name in ("zigzag", "striped"):
        pairs = [Plan.sharded(name, [0, 4096], rank, 8).pairs for rank in range(8)]
        assert max(pairs) < 1.01 * min(pairs)


@pytest.mark.parametrize("name", ["ring", None, 3])
def test_an_unknown_layout_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"layout is known: expected .*striped.*, given"):
        Plan.sharded(name, [0, 4], 0, 2)


def test_bad_ranks_and_strides_are_refused() -> None:
    with pytest.raises(InvalidPlan, match="rank is in range"):
        Plan.sharded("striped", [0, 4], 2, 2)
    with pytest.raises(InvalidPlan, match="rank_stride"):
        Plan.sharded("contiguous", [0, 5], 0, 2, 2)
