"""Whom items come after: replayed in the order of the list, everybody finds the one there that the table names."""

from __future__ import annotations

from itertools import groupby, product
from operator import itemgetter

import numpy as np
import pytest

from weft_attn.plan import Plan, Slice, in_turn
from weft_attn.plan.in_step import BY_ITEM, Grid
from weft_attn.plan.stream import LATE_TILES, Stream, Tiling, host_stream
from weft_attn.testing.cases import PLANS, Case

BLOCK = 16
GRIDS = [Grid(1, 1), Grid(5, 2), Grid(132, 8)]
# Tiles that begin where a slice's columns do not, or where those of another slice do not.
DISAGREEING = {
    "causal_more_keys", "concat", "groups", "packed_unequal", "shared_prefix", "striped", "unseen", "window_both", "zigzag_sequence",
    "zigzag_window",
}  # fmt: skip
NAMES = [name for name in PLANS if name not in DISAGREEING | {"no_rows", "no_keys"}]


@pytest.fixture(autouse=True)
def _however_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_turn, "TILES_PER_TURN", 0)
    monkeypatch.setattr(in_turn, "EDGES_OF_MEAN", float("inf"))


def streams(plan: Plan, grid: Grid) -> tuple[Stream, Stream]:
    """Of items that add as they come, and in turn."""
    tiling = dict(rows_per_tile=32, block_cols=BLOCK, transposed=True, masks_ragged=True, grid=grid)
    return host_stream(plan, Tiling(**tiling)), host_stream(plan, Tiling(**tiling, in_turn=4))  # type: ignore[arg-type]


def walk(stream: Stream, item: list[int], is_up: bool) -> list[tuple[int, int]]:
    """(column, run) of an item's tiles in the order in which the kernel visits them (`visibility.py: edges_of_part`), runs each by itself."""
    edges = tiles(stream, item)[: item[5]]
    early, late = ([(col, run) for col, run, is_late in edges if is_late == wanted] for wanted in (False, True))
    interior = [(col, run) for col, run, _ in tiles(stream, item)[item[5] :]]
    if is_up:
        return [*early, *interior, *late]
    runs = [list(run) for part in (late, interior, early) for _, run in groupby(part, key=itemgetter(1))]
    return [tile for run in runs for tile in reversed(run)]


def tiles(stream: Stream, item: list[int]) -> list[tuple[int, int, bool]]:
    """(column, run, whether late) of an item's edge tiles and interior ones."""
    _, _, interior_run, interior_tiles, edge_run, edge_tiles, late, _ = item
    found = []
    for run, left, is_edge in ((edge_run, edge_tiles, True), (interior_run, interior_tiles, False)):
        first = run
        while left > 0:
            col, count = stream.runs[run, :2].tolist()
            is_late = is_edge and run - first >= late // LATE_TILES
            found += [(col + tile * BLOCK, run, is_late) for tile in range(count)]
            left, run = left - count, run + 1
        assert left == 0, "runs end with their item's tiles"
    return found


@pytest.mark.parametrize(("name", "grid"), list(product(NAMES, GRIDS)), ids=str)
def test_everybody_comes_after_the_one_that_was_there_last(name: str, grid: Grid) -> None:
    plan = Case(plan=name, size=301).make_plan()
    free, turned = streams(plan, grid)
    last: dict[int, int] = {}
    visits: list[tuple[int, int]] = []
    for number, item in enumerate(turned.items.tolist()):
        # A program finds out which way by itself: neither may matter.
        for col, run in walk(turned, item, is_up=number % 2 == 0 and item[7] == 0):
            assert turned.afters[run] == last.get(col, 0)
            last[col] = item[0] + 1
            visits.append((item[0], col))
    assert sorted(visits) == sorted(
        (item[0], col) for item in free.items.tolist() for col, _, _ in tiles(free, [*item[:6], 0, 0])
    )


@pytest.mark.parametrize("name", NAMES)
def test_late_edge_tiles_lie_behind_the_interior_of_their_slice(name: str) -> None:
    _, turned = streams(Case(plan=name, size=301).make_plan(), GRIDS[1])
    for item in turned.items.tolist():
        found = tiles(turned, item)
        edges = found[: item[5]]
        assert sum(is_late for _, _, is_late in edges) == item[6] % LATE_TILES
        inside = [col for col, _, _ in found[item[5] :]]
        for col, run, is_late in edges:
            _, _, _, _, start, length, _, _ = turned.runs[run].tolist()
            of_slice = [x for x in inside if start <= x < start + length]
            assert all(x < col if is_late else x > col for x in of_slice)


def test_a_causal_document_has_one_run_of_each_kind_and_follows_its_longer_neighbour() -> None:
    plan = Plan.dense(1, 512, 512, causal=True)
    _, turned = streams(plan, Grid(4, 1))
    rows = turned.items[:, 0]
    assert (np.diff(rows) > 0).all()
    for item in turned.items[1:].tolist():
        assert turned.afters[item[4]] == item[0] - 32 + 1


def test_tiles_that_begin_at_different_columns_take_no_turns() -> None:
    # The last row sees all keys, and the diagonal begins 5 rows down.
    plan = Plan.dense(1, 300, 305, causal=True)
    _, turned = streams(plan, GRIDS[1])
    assert len(turned.afters) == 0
    for name in DISAGREEING:
        assert len(streams(Case(plan=name, size=301).make_plan(), GRIDS[1])[1].afters) == 0
    assert in_turn.tiles_agree(np.array([0, 32, 16]), np.array([32, 64, 48]), 16)
    assert not in_turn.tiles_agree(np.array([0, 24]), np.array([32, 40]), 16)
    assert in_turn.tiles_agree(np.array([0, 24]), np.array([24, 40]), 16)
    assert in_turn.tiles_agree(np.array([], np.int64), np.array([], np.int64), 16)


def test_items_of_documents_walk_down_and_waves_have_several_heads() -> None:
    offsets = np.arange(0, 301, 20).tolist()
    _, turned = streams(Plan.from_cu_seqlens(offsets, offsets, causal=True), Grid(4, 8))
    assert turned.heads_per_wave >= in_turn.HEADS_IN_TURN
    assert set(turned.items[:, 7].tolist()) <= {0, BY_ITEM}


def test_documents_of_many_heads_take_turns_in_waves_of_as_many_as_make_a_round_of_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    offsets = np.arange(0, 65537, 2048).tolist()
    tiling = Tiling(128, 64, transposed=True, masks_ragged=True, in_turn=8, grid=Grid(132, 8))
    turned = host_stream(Plan.from_cu_seqlens(offsets, offsets, causal=True), tiling)
    assert turned.heads_per_wave == 8
    assert len(turned.afters) > 0


def test_items_with_more_late_edges_than_a_number_tells_take_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.from_cu_seqlens([0, 300], [0, 300], causal=True)
    assert len(streams(plan, GRIDS[1])[1].afters) > 0
    monkeypatch.setattr("weft_attn.plan.stream.LATE_TILES", 1)
    assert len(streams(plan, GRIDS[1])[1].afters) == 0


def test_an_item_that_visits_a_tile_twice_takes_no_turns() -> None:
    """Two short stretches of keys in one item, one seen whole and the other up to the diagonal: walked down it would wait for itself."""
    slices = [Slice(0, 8192, 0, 8192), Slice(0, 8192, 8192, 64), Slice(0, 8192, 8256, 64, hi=0)]
    tiling = Tiling(128, 64, transposed=True, masks_ragged=True, in_turn=4, grid=Grid(132, 8))
    assert len(host_stream(Plan(slices, 8192, 8320), tiling).afters) == 0
    assert len(host_stream(Plan(slices[:1], 8192, 8192), tiling).afters) > 0


def test_long_items_of_edge_tiles_alone_take_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tiling = Tiling(128, 64, transposed=True, masks_ragged=True, in_turn=4, grid=Grid(132, 8))
    assert len(host_stream(Plan.dense(1, 16384, 16383), tiling).afters) == 0
    assert len(host_stream(Plan.dense(1, 16383, 16383, causal=True), tiling).afters) > 0


def test_short_items_take_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    few_rows = Plan.dense(1, 1024, 65536)
    many_rows = Plan.dense(1, 16384, 16384, causal=True)
    tiling = Tiling(128, 64, transposed=True, masks_ragged=True, in_turn=4, grid=Grid(132, 8))
    assert len(host_stream(few_rows, tiling).afters) == 0
    assert len(host_stream(many_rows, tiling).afters) > 0


def test_runs_that_are_cut_count_as_many_before_the_late_ones() -> None:
    """Item 32 comes after item 0 at one of its two early tiles: two runs, and the late one is the third."""
    runs = np.zeros((4, 8), np.int32)
    runs[:3, :2] = [[0, 1], [0, 2], [64, 1]]
    items = np.array([[0, 32, 0, 0, 0, 1, 0, 0], [32, 32, 0, 0, 1, 3, 0, 0]], np.int32)
    found = in_turn.take_turns(items, runs, np.array([1, 1]), BLOCK, 96)
    assert found is not None
    cut_items, cut, afters, early_runs = found
    assert cut[:, :2].tolist() == [[0, 1], [0, 1], [16, 1], [64, 1], [0, 0]]
    assert afters.tolist() == [0, 1, 0, 0, 0]
    assert early_runs.tolist() == [1, 2]
    assert cut_items[:, 4].tolist() == [0, 1]
