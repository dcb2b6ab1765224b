"""The tables that kernels walk visit each visible cell once, and nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft_attn.plan import Plan, Slice
from weft_attn.plan.in_step import Grid
from weft_attn.plan.slices import visible_interval
from weft_attn.plan.stream import LATE_TILES, NO_SLOT, Stream, Tiling, count_items, device_stream, host_stream
from weft_attn.testing.cases import PLANS

TILINGS = [
    Tiling(rows, cols, max_tiles, transposed)
    for rows, cols in ((16, 16), (16, 32), (64, 16), (32, 64), (128, 128), (5, 16), (1, 32))
    for max_tiles in (None, 1, 3)
    for transposed in (False, True)
]
TILINGS += [Tiling(rows, 16, transposed=True, masks_ragged=True) for rows in (16, 64)]
TILINGS += [Tiling(rows, 16, transposed=True, masks_ragged=True, grid=Grid(2, heads)) for rows in (4, 16) for heads in (1, 3)]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Random slices, disjoint by construction: each key interval is shared out among disjoint row intervals."""
    total_q, total_k = draw(st.integers(0, 70)), draw(st.integers(0, 70))
    cuts = st.lists(st.integers(0, 70), max_size=5)
    slices = []
    key_cuts = sorted({min(c, total_k) for c in draw(cuts)} | {0, total_k})
    for k_start, k_stop in itertools.pairwise(key_cuts):
        row_cuts = sorted({min(c, total_q) for c in draw(cuts)} | {0, total_q})
        for q_start, q_stop in itertools.pairwise(row_cuts):
            if draw(st.booleans()):
                bound = st.none() | st.integers(-80, 80)
                slices.append(Slice(q_start, q_stop - q_start, k_start, k_stop - k_start, draw(bound), draw(bound)))
    return Plan(draw(st.permutations(slices)), total_q, total_k)


def replay(plan: Plan, tiling: Tiling, stream: Stream) -> np.ndarray:
    """Visits of each cell, walked as a kernel walks: run by run, the next looked up when one ends."""
    total_rows, total_cols = (plan.total_k, plan.total_q) if tiling.transposed else (plan.total_q, plan.total_k)
    block = tiling.block_cols
    visits = np.zeros((total_rows, total_cols), np.int64)
    for row, n_rows, interior_run, interior_tiles, edge_run, edge_tiles, _, _ in stream.items.tolist():
        rows = np.arange(row, row + n_rows)
        for run, n_tiles, is_edge in ((interior_run, interior_tiles, False), (edge_run, edge_tiles, True)):
            at, (col, left) = run, stream.runs[run][:2].tolist()
            for _ in range(n_tiles):
                cols = np.arange(col, col + block)
                if is_edge:
                    row_start, row_len, col_start, col_len, lo, hi = stream.runs[at][2:].tolist()
                    first, stop = visible_interval(rows - row_start, col_len, lo, hi)
                    stop = np.where((rows >= row_start) & (rows < row_start + row_len), stop, 0)
                    seen = (cols >= col_start + first[:, None]) & (cols < col_start + stop[:, None])
                    assert seen.any(), "an edge tile holds a visible cell"
                    inside = cols < total_cols
                    assert not seen[:, ~inside].any()
                    visits[row : row + n_rows, cols[inside]] += seen[:, inside]
                else:
                    assert col >= 0
                    assert col + block <= total_cols, "an interior tile is inside the tensor"
                    visits[row : row + n_rows, cols] += 1
                left -= 1
                if left == 0:
                    at += 1
                    assert at < len(stream.runs), "a kernel may look one run ahead"
                    col, left = stream.runs[at][:2].tolist()
                else:
                    col += block
    return visits


def check_stream(plan: Plan, tiling: Tiling) -> Stream:
    stream = host_stream(plan, tiling)
    mask = plan.to_mask().numpy()
    visits = replay(plan, tiling, stream)
    np.testing.assert_array_equal(visits, mask.T if tiling.transposed else mask)

    rows, n_rows, steps, slots = (stream.items[:, c] for c in (0, 1, 3, 6))
    steps = steps + stream.items[:, 5]
    assert (n_rows > 0).all()
    assert (n_rows <= tiling.rows_per_tile).all()
    assert tiling.grid is not None or (np.diff(steps) <= 0).all(), "longest first"
    if tiling.max_tiles is not None:
        assert (steps <= tiling.max_tiles).all()

    if tiling.grid is not None:
        check_late_edges(stream)
        slots = np.full_like(slots, NO_SLOT)
    covered = np.zeros(len(visits), np.int64)
    whole = slots == NO_SLOT
    for row, n in zip(rows[whole], n_rows[whole], strict=True):
        covered[row : row + n] += 1
    used = np.zeros(stream.slots, np.int64)
    of_slot = {int(slot): item for item, slot in enumerate(slots) if slot != NO_SLOT}
    assert len(of_slot) == int((~whole).sum()) == stream.slots, "a slot belongs to one item"
    for row, n, first_slot, n_slots in stream.combines.tolist():
        assert n_slots > 1
        covered[row : row + n] += 1
        for slot in range(first_slot, first_slot + n_slots):
            used[slot] += 1
            assert (rows[of_slot[slot]], n_rows[of_slot[slot]]) == (row, n), "parts have the rows of their whole"
            assert steps[of_slot[slot]] > 0, "a part has work"
    assert (used == 1).all()
    assert (covered == 1).all(), "each row is written once"
    return stream


def check_late_edges(stream: Stream) -> None:
    """The column tells a whole number of an item's edge runs, and the tiles of all that follow."""
    for _, _, _, _, run, edge_tiles, late, _ in stream.items.tolist():
        early = stream.runs[run : run + late // LATE_TILES, 1].sum()
        assert early + late % LATE_TILES == edge_tiles


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_tables_visit_each_visible_cell_once(tiling: Tiling) -> None:
    for make in PLANS.values():
        check_stream(make(40), tiling)


@given(
    plan=plans(),
    rows=st.sampled_from([1, 3, 16, 32, 64]),
    cols=st.sampled_from([1, 4, 16, 32]),
    max_tiles=st.none() | st.integers(1, 6),
    transposed=st.booleans(),
)
def test_tables_of_random_plans_visit_each_visible_cell_once(
    plan: Plan, rows: int, cols: int, max_tiles: int | None, transposed: bool
) -> None:
    check_stream(plan, Tiling(rows, cols, max_tiles, transposed))


def test_interior_tiles_are_most_of_a_long_causal_plan() -> None:
    stream = host_stream(Plan.dense(1, 1024, 1024, causal=True), Tiling(64, 64))
    assert stream.items[:, 3].sum() == 16 * 15 // 2
    assert stream.items[:, 5].sum() == 16


def test_interior_tiles_of_neighbouring_slices_are_one_run() -> None:
    plan = Plan([Slice(0, 32, 0, 64), Slice(0, 32, 64, 64)], 32, 128)
    stream = host_stream(plan, Tiling(32, 16))
    assert stream.items[:, 3].tolist() == [8]
    assert stream.runs[0, :2].tolist() == [0, 8]
    assert len(stream.runs) == 2, "one run and the row to spare"


def spans(plan: Plan, tiling: Tiling) -> list[tuple[int, int]]:
    return sorted((int(row), int(row + n)) for row, n in host_stream(plan, tiling).items[:, :2])


def test_short_neighbours_share_a_tile_where_they_see_common_keys() -> None:
    # A prompt of 40, and responses that see it: 40 is too long to share, [5, 4, 20] fit one tile of 32, 7 begins the next.
    plan = Plan.shared_prefix(40, [5, 4, 20, 7])
    assert spans(plan, Tiling(32, 16)) == [(0, 32), (32, 40), (40, 69), (69, 76)]
    assert count_items(plan, 32) == 4


def test_documents_never_share_a_tile() -> None:
    cu = [0, 5, 9, 16, 80, 83]
    plan = Plan.from_cu_seqlens(cu, cu, causal=True)
    expected = [(0, 5), (5, 9), (9, 16), (16, 48), (48, 80), (80, 83)]
    assert spans(plan, Tiling(32, 16)) == expected
    assert spans(plan, Tiling(32, 16, transposed=True)) == expected


def test_the_two_chunks_of_a_short_document_share_a_tile_of_a_zigzag_rank_and_two_documents_do_not() -> None:
    plan = Plan.zigzag([0, 16, 32], rank=1, world_size=2)
    assert spans(plan, Tiling(16, 16)) == [(0, 8), (8, 16)]
    # Rank 0's late chunks are seen by nobody here, so that they share with nobody.
    unshared, shared = [(0, 4), (4, 8), (8, 12), (12, 16)], [(16, 24), (24, 32)]
    assert spans(plan, Tiling(16, 16, transposed=True)) == unshared + shared


def test_parts_of_a_split_item_differ_by_at_most_one_tile() -> None:
    stream = host_stream(Plan.dense(1, 1, 16 * 23), Tiling(16, 16, 5))
    assert sorted(stream.items[:, 3] + stream.items[:, 5]) == [4, 4, 5, 5, 5]
    assert stream.combines.tolist() == [[0, 1, 0, 5]]


def test_transposed_tables_are_those_of_the_transposed_plan() -> None:
    plan = PLANS["packed_unequal"](40)
    flipped = Plan(
        [Slice(s.k_start, s.k_len, s.q_start, s.q_len, -s.hi, -s.lo) for s in plan.slices],  # type: ignore[operator]
        plan.total_k,
        plan.total_q,
    )
    one, other = host_stream(plan, Tiling(16, 32, transposed=True)), host_stream(flipped, Tiling(16, 32))
    np.testing.assert_array_equal(one.items, other.items)
    np.testing.assert_array_equal(one.runs, other.runs)


def test_device_tables_equal_the_host_tables_and_are_built_once() -> None:
    import torch

    plan = PLANS["zigzag_rank_1_of_3"](40)
    tiling = Tiling(16, 16, 2)
    host, device = host_stream(plan, tiling), device_stream(plan, tiling, torch.device("cpu"))
    for name in ("items", "runs", "combines"):
        np.testing.assert_array_equal(getattr(device, name).numpy(), getattr(host, name))
    assert (device.n_items, device.n_combines, device.slots) == (len(host.items), len(host.combines), host.slots)
    assert device_stream(plan, tiling, torch.device("cpu")) is device


@pytest.mark.parametrize("name", PLANS)
def test_items_that_mask_what_is_ragged_have_interior_tiles_only_where_they_are_full(name: str) -> None:
    plan = PLANS[name](200)
    masked = check_stream(plan, Tiling(64, 16, transposed=True, masks_ragged=True)).items
    plain = host_stream(plan, Tiling(64, 16, transposed=True)).items
    interior, edge = 3, 5
    full = masked[:, 1] == 64
    assert (masked[~full, interior] == 0).all()
    assert masked[full, interior].sum() == plain[plain[:, 1] == 64, interior].sum()
    assert masked[:, [interior, edge]].sum() == plain[:, [interior, edge]].sum()


def test_a_stream_on_a_device_knows_its_tiles_and_its_longest_item() -> None:
    stream = device_stream(Plan.dense(1, 128, 128, causal=True), Tiling(32, 32), torch.device("cpu"))
    assert (stream.tiles, stream.longest) == (1 + 2 + 3 + 4, 4)
    nothing = device_stream(Plan([], 0, 0), Tiling(32, 32), torch.device("cpu"))
    assert (nothing.tiles, nothing.longest) == (0, 0)
