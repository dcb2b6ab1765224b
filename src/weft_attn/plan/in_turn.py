"""Whom an item comes after where items add to the columns that they visit, one after the other, so that sums do not change from run to run.

Each tile of columns gets the items that visit it in the order of the list. Items that visit a tile at the same time, as those of a round do
(in_step.py), follow each other through all of their tiles: the last one waits at its first tile, for as long as it takes all of them to
add there, and then no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from weft_attn.plan.in_step import BY_ITEM, Arrangement, Grid, arrange

IntArray = NDArray[np.int64]

# Heads of a wave, at least.
HEADS_IN_TURN = 4
# Tiles of a mean item and KV head that make waiting worth while, for each item of a head that begins with others: the last of them waits
# for all.
TILES_PER_TURN = 6
# How long an item without interior tiles may be, of the mean. Chosen when it walked up and those around it perhaps down; they go together since
# ADR 30, and what longer ones would cost was not measured.
EDGES_OF_MEAN = 0.25
# Columns of the item table (stream.py: ITEM_FIELDS).
INTERIOR_RUN, EDGE_RUN = 2, 4


def arrange_in_turn(steps: IntArray, is_flat: NDArray[np.bool_], component: IntArray, grid: Grid) -> Arrangement:
    """As `in_step.arrange`, with waves of so many heads, of documents too, that few items of each follow each other.

    Where items are not simply listed longest first all walk down: whoever begins later is behind, and nobody that sees less goes further.
    """
    found = arrange(steps, is_flat, component, grid, heads_apart=False)
    heads = min(grid.heads, max(found.heads_per_wave, HEADS_IN_TURN))
    walks = np.full(len(steps), BY_ITEM) if found.walks.any() else found.walks
    return Arrangement(found.order, walks, heads)


def is_worth_turns(tiles: int, edges_alone: int, n_items: int, group: int, heads_per_wave: int, programs: int) -> bool:
    """Whether items last so long that it matters little how long they wait for each other in the beginning.

    Args:
        tiles, n_items: of the stream.
        edges_alone: tiles of the longest item that has edge tiles only.
        group: query heads of a KV head, which an item visits each tile with.
        heads_per_wave, programs: of the grid.
    """
    lasts = tiles * group * heads_per_wave >= TILES_PER_TURN * n_items * programs
    return lasts and edges_alone * n_items <= EDGES_OF_MEAN * tiles


def tiles_agree(first: IntArray, stop: IntArray, block: int) -> bool:
    """Whether all tiles that have a column in common begin at the same one, of runs of tiles of `block` columns from `first` up to `stop`."""
    begins, ends = [], []
    for phase in np.unique(first % block):
        of_phase = np.flatnonzero(first % block == phase)
        of_phase = of_phase[np.argsort(first[of_phase], kind="stable")]
        reach = np.maximum.accumulate(stop[of_phase])
        heads = np.flatnonzero(np.concatenate([[True], first[of_phase][1:] >= reach[:-1]]))
        begins.append(first[of_phase][heads])
        ends.append(reach[np.append(heads[1:], len(of_phase)) - 1])
    if not begins:
        return True
    begin, end = np.concatenate(begins), np.concatenate(ends)
    order = np.argsort(begin, kind="stable")
    return bool((begin[order][1:] >= end[order][:-1]).all())


def take_turns(
    items: NDArray[np.int32], runs: NDArray[np.int32], early_runs: IntArray, block: int, total_columns: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], IntArray] | None:
    """Runs cut such that all tiles of one come after the same item, the items that walk them, and whom each run comes after.

    Args:
        items, runs: of a stream, in its order.
        early_runs: (items,) of each item's edge runs, how many are not late.
        block: columns of a tile.

    Returns:
        items, runs, early_runs, and between them (runs,) the first row of the item that adds before, + 1; 0: the run comes after nobody.
        None: an item visits a tile twice, and which visit comes first depends on the way that it walks.
    """
    last = np.zeros(total_columns + block, np.int32)
    pieces: list[tuple[int, int, int, int, int]] = []
    table = runs[:, :2].tolist()

    def cut(run: int, n_tiles: int, row: int) -> Iterator[int]:
        """Cut runs of so many tiles from this one on; after each, how many pieces there are."""
        while n_tiles > 0:
            col, count = table[run]
            visited = last[col : col + count * block : block]
            ends = [*(np.flatnonzero(visited[1:] != visited[:-1]) + 1).tolist(), count]
            for begin, end in zip([0, *ends[:-1]], ends, strict=True):
                pieces.append((run, col + begin * block, end - begin, int(visited[begin]), row + 1))
            visited[:] = row + 1
            n_tiles -= count
            run += 1
            yield len(pieces)

    items, early_runs = items.copy(), early_runs.copy()
    for number, item in enumerate(items):
        row, _, interior_run, interior_tiles, edge_run, edge_tiles = item[:6].tolist()
        item[EDGE_RUN] = begin = len(pieces)
        reached = [begin, *cut(edge_run, edge_tiles, row)]
        early_runs[number] = reached[early_runs[number]] - begin
        item[INTERIOR_RUN] = len(pieces)
        deque(cut(interior_run, interior_tiles, row), maxlen=0)
    found = np.array(pieces, np.int64).reshape(-1, 5)
    if (found[:, 3] == found[:, 4]).any():
        return None
    found_runs = runs[np.append(found[:, 0], len(runs) - 1)]
    found_runs[:-1, :2] = found[:, 1:3]
    return items, found_runs, np.append(found[:, 3], 0).astype(np.int32), early_runs
