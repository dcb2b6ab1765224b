"""From a plan to what a kernel walks: work items, and for each the runs of column tiles it visits.

An *item* is one program's work: up to `rows_per_tile` consecutive rows, and two lists of *runs*. A run is a number of
consecutive column tiles of `block_cols`. In an interior run every row of the item sees every column: the kernel reads it without
a mask, and neighbouring runs of different slices are joined, since softmax does not care about slices. An edge run carries its
slice, and the kernel asks the visibility rule's device twin for each row's interval.

All interior runs of an item form one stream of tiles, all edge runs another: a kernel pays its pipeline's start twice per item,
however many slices (documents, gathered chunks) the item sees.

The backward's dK/dV kernel walks the same structure of the transposed plan: rows are keys, columns are queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from weft_attn.errors import Unsupported
from weft_attn.plan.in_step import BY_ROUND, Arrangement, Grid, arrange, components
from weft_attn.plan.in_turn import arrange_in_turn, is_worth_turns, take_turns, tiles_agree
from weft_attn.plan.slices import K_LEN, K_START, Q_LEN, Q_START, Plan, elementary_segments, transpose, visible_interval

IntArray = NDArray[np.int64]

# Columns of the item table. NO_SLOT: the item is whole and writes the result itself; with a grid no item is split, and the column says where
# the late edge tiles are, those behind their slice's interior: runs before them times LATE_TILES, plus how many. A walk: in_step.py.
ITEM_FIELDS = ("row", "n_rows", "interior_run", "interior_tiles", "edge_run", "edge_tiles", "slot", "walk")
INTERIOR_TILES, EDGE_TILES, SLOT = (ITEM_FIELDS.index(name) for name in ("interior_tiles", "edge_tiles", "slot"))
NO_SLOT = -1
LATE_TILES = 2**15
# More late edge tiles, or runs before them, than the column holds; where nobody takes turns they are no late ones then.
TOO_LATE = -1
# Columns of the run table; an interior run uses the first two.
RUN_FIELDS = ("col", "n_tiles", "q_start", "q_len", "k_start", "k_len", "lo", "hi")
# Columns of the combine table.
COMBINE_FIELDS = ("row", "n_rows", "first_slot", "n_slots")


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts a plan.

    Attributes:
        rows_per_tile: rows of an item at most (tokens, where a tile packs several heads of a token).
        block_cols: columns of a tile.
        max_tiles: tiles of an item at most; longer items are split and their parts combined. None: never split.
        transposed: rows are keys and columns are queries (dK/dV).
        masks_ragged: items with fewer rows than a tile have edge tiles only, for a kernel whose rows beyond the item's would reach
            more than results that nobody writes.
        in_turn: heads of a group that an item visits each tile for, where items add to what belongs to the tile's columns one after the
            other (in_turn.py), with a grid; 0: they do not.
        grid: the persistent grid whose programs walk the items in step. None: items are listed longest first.
    """

    rows_per_tile: int
    block_cols: int
    max_tiles: int | None = None
    transposed: bool = False
    masks_ragged: bool = False
    in_turn: int = 0
    grid: Grid | None = None


@dataclass(frozen=True)
class Stream:
    """A plan cut for one kernel: numpy int32 tables.

    Attributes:
        items: (n, 8) ITEM_FIELDS, longest first or as `in_step.arrange` says.
        runs: (m, 8) RUN_FIELDS, with one row more than is used, so that a kernel may look one run ahead.
        combines: (s, 4) COMBINE_FIELDS, one for each item that was split.
        afters: (m,) of a tiling in turn: whom each run comes after (`in_turn.take_turns`). Empty: of any other, where items are too short
            (`in_turn.is_worth_turns`), and where tiles that have a column in common do not begin at the same one, so that nobody can
            tell whose turn it is, or an item visits a tile twice.
        slots: partial results, over all split items.
        heads_per_wave: of the tiling's grid; 1 without.
    """

    items: NDArray[np.int32]
    runs: NDArray[np.int32]
    combines: NDArray[np.int32]
    afters: NDArray[np.int32]
    slots: int
    heads_per_wave: int


@dataclass(frozen=True)
class DeviceStream:
    """A `Stream` on a device, int32 tensors, copied there in the order of the CUDA stream `made_on`.

    Attributes:
        tiles: column tiles of all items together.
        longest: column tiles of the longest item.
        heads_per_wave: as the `Stream`'s.
    """

    items: torch.Tensor
    runs: torch.Tensor
    combines: torch.Tensor
    afters: torch.Tensor
    n_items: int
    n_combines: int
    slots: int
    tiles: int
    longest: int
    heads_per_wave: int
    made_on: torch.cuda.Stream | None = None
    copied: torch.cuda.Event | None = None

    def join(self, stream: int) -> None:
        """Let the current CUDA stream, whose handle is given, wait for the copy, when it is another than the one that made it.

        A graph capture cannot wait for what is outside of it: call once before you capture, as for any kernel.
        """
        if self.made_on is None or self.copied is None or stream == self.made_on.cuda_stream:
            return
        if not torch.cuda.is_current_stream_capturing():
            current = torch.cuda.current_stream(self.items.device)
            current.wait_event(self.copied)
            self.items.record_stream(current)


def device_stream(plan: Plan, tiling: Tiling, device: torch.device) -> DeviceStream:
    """The plan's tables for a kernel on a device: built and copied once, then kept with the plan.

    Raises:
        Unsupported: (a ValueError) they would be built while a CUDA graph is captured, and copied anew from freed memory at each replay.
    """
    key = (tiling, device)
    found = plan._streams.get(key)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise Unsupported(
                "a plan's tables are on the device before a CUDA graph is captured: expected a call like the captured one before, given "
                "the first one"
            )
        found = plan._streams[key] = _to_device(host_stream(plan, tiling), device)
    return found


def host_stream(plan: Plan, tiling: Tiling) -> Stream:
    """Cut a plan into work items (see the module's text)."""
    table = transpose(plan.rows) if tiling.transposed else plan.rows
    total_rows, total_columns = (plan.total_k, plan.total_q) if tiling.transposed else (plan.total_q, plan.total_k)
    stream = build_stream(table, total_rows, tiling)
    return _in_turn(stream, tiling, total_columns) if tiling.in_turn else stream


def _in_turn(stream: Stream, tiling: Tiling, total_columns: int) -> Stream:
    """The stream with its afters, if its tiles agree and items are so long that it pays."""
    assert tiling.grid is not None
    tiles = int(stream.items[:, INTERIOR_TILES].sum() + stream.items[:, EDGE_TILES].sum())
    edges_alone = int(stream.items[stream.items[:, INTERIOR_TILES] == 0, EDGE_TILES].max(initial=0))
    if not is_worth_turns(tiles, edges_alone, len(stream.items), tiling.in_turn, stream.heads_per_wave, tiling.grid.programs):
        return stream
    runs, block = stream.runs[:-1].astype(np.int64), tiling.block_cols
    first, stop = runs[:, 0], runs[:, 0] + runs[:, 1] * block
    k_start, k_len = runs[:, RUN_FIELDS.index("k_start")], runs[:, RUN_FIELDS.index("k_len")]
    # An edge run's last tile may reach beyond its slice.
    if not tiles_agree(first, np.where(k_len > 0, np.minimum(stop, k_start + k_len), stop), block):
        return stream
    late = stream.items[:, SLOT].astype(np.int64)
    if (late == TOO_LATE).any():
        return stream
    found = take_turns(stream.items, stream.runs, late // LATE_TILES, block, total_columns)
    if found is None:
        return stream
    items, cut, afters, early_runs = found
    if early_runs.max(initial=0) >= 2**31 // LATE_TILES:
        return stream
    items[:, SLOT] = early_runs * LATE_TILES + late % LATE_TILES
    return replace(stream, items=items, runs=cut, afters=afters)


def count_items(plan: Plan, rows_per_tile: int) -> int:
    """Items of the forward before any split: what decides whether splitting is needed."""
    return len(tile_rows(plan.rows, plan.total_q, rows_per_tile))


def _to_device(stream: Stream, device: torch.device) -> DeviceStream:
    # One copy for all tables; pinned memory lets it run without stopping the host.
    parts = [stream.items, stream.runs, stream.combines, stream.afters]
    flat = torch.from_numpy(np.concatenate([p.ravel() for p in parts]))
    made_on = copied = None
    if device.type == "cuda":
        made_on, copied = torch.cuda.current_stream(device), torch.cuda.Event()
        flat = flat.pin_memory().to(device, non_blocking=True)
        copied.record(made_on)
    tensors, at = [], 0
    for part in parts:
        tensors.append(flat[at : at + part.size].view(part.shape))
        at += part.size
    tiles = stream.items[:, INTERIOR_TILES] + stream.items[:, EDGE_TILES]
    counts = dict(
        n_items=len(stream.items),
        n_combines=len(stream.combines),
        slots=stream.slots,
        tiles=int(tiles.sum()),
        longest=int(tiles.max(initial=0)),
        heads_per_wave=stream.heads_per_wave,
    )
    return DeviceStream(*tensors, **counts, made_on=made_on, copied=copied)


def tile_rows(table: IntArray, total_rows: int, rows_per_tile: int) -> IntArray:
    """(n, 2) row ranges [start, stop) of the tiles: cuts at every segment, but short neighbours that see common columns share one.

    Rows that see the same columns (decoding with a shared prefix, the chunks of one document) then read them once. Rows of
    different documents never share a tile: a NaN of one would reach the other as zero times NaN.
    """
    bounds = elementary_segments(table, total_rows)
    lengths = np.diff(bounds)
    if len(lengths) == 0:
        return np.zeros((0, 2), np.int64)
    starts = bounds[:-1]
    short = lengths <= rows_per_tile
    fits = short[1:] & short[:-1] & (lengths[1:] + lengths[:-1] <= rows_per_tile)
    if fits.any():
        joins = fits & _see_common_columns(table, bounds)
        heads = _pack_short(lengths.tolist(), joins.tolist(), rows_per_tile)
        starts = starts[heads]
        lengths = np.diff(np.concatenate([starts, bounds[-1:]]))
    counts = -(-lengths // rows_per_tile)
    first = np.repeat(starts, counts) + rows_per_tile * _ramps(counts)
    stop = np.minimum(first + rows_per_tile, np.repeat(starts + lengths, counts))
    return np.stack([first, stop], axis=1)


def _see_common_columns(table: IntArray, bounds: IntArray) -> NDArray[np.bool_]:
    """For each segment but the last: do it and the next have slices that begin at the same column?"""
    first = np.searchsorted(bounds, table[:, Q_START])
    counts = np.searchsorted(bounds, table[:, Q_START] + table[:, Q_LEN]) - first
    segment = np.repeat(first, counts) + _ramps(counts)
    column = np.repeat(table[:, K_START], counts)
    width = int(column.max(initial=0)) + 1
    seen = np.sort(segment * width + column)
    partner = seen + width
    at = np.minimum(np.searchsorted(seen, partner), max(len(seen) - 1, 0))
    common = np.zeros(len(bounds) - 1, dtype=bool)
    common[seen[seen[at] == partner] // width] = True
    return common[:-1]


def _pack_short(lengths: list[int], joins: list[bool], capacity: int) -> list[int]:
    """Indices of the segments that begin a tile when whole neighbours that may join are packed greedily."""
    heads, room = [0], capacity - lengths[0]
    for index in range(1, len(lengths)):
        length = lengths[index]
        if joins[index - 1] and length <= room:
            room -= length
        else:
            heads.append(index)
            room = capacity - length
    return heads


def _ramps(counts: IntArray) -> IntArray:
    """0, 1, .., counts[0]-1, 0, 1, .., counts[1]-1, ..."""
    total = int(counts.sum())
    return np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)


def build_stream(table: IntArray, total_rows: int, tiling: Tiling) -> Stream:
    """The tables of a (canonical) slice table cut by a tiling."""
    assert tiling.grid is None or (tiling.transposed and tiling.max_tiles is None)
    assert tiling.grid is not None or not tiling.in_turn
    block = tiling.block_cols
    tiles = tile_rows(table, total_rows, tiling.rows_per_tile)

    # Pairs (tile, slice) that meet, sorted by tile and then by column.
    q_start, q_stop = table[:, Q_START], table[:, Q_START] + table[:, Q_LEN]
    first_tile = np.searchsorted(tiles[:, 1], q_start, side="right")
    stop_tile = np.searchsorted(tiles[:, 0], q_stop, side="left")
    counts = stop_tile - first_tile
    owner = np.repeat(np.arange(len(table)), counts)
    tile = np.repeat(first_tile, counts) + _ramps(counts)
    order = np.lexsort((table[owner, K_START], tile))
    owner, tile = owner[order], tile[order]
    piece = table[owner]

    # Columns that some row of the tile sees, and columns that every row sees, counted inside the slice.
    k_len, lo, hi = piece[:, K_LEN], piece[:, 4], piece[:, 5]
    row_first = np.maximum(tiles[tile, 0], piece[:, Q_START]) - piece[:, Q_START]
    row_last = np.minimum(tiles[tile, 1], piece[:, Q_START] + piece[:, Q_LEN]) - 1 - piece[:, Q_START]
    top, bottom = visible_interval(row_first, k_len, lo, hi), visible_interval(row_last, k_len, lo, hi)
    # Rows that see nothing at either end of the tile must not stretch the union.
    some_first = np.clip(top[0], 0, k_len)
    some_stop = np.clip(bottom[1], 0, k_len)
    tile_size = tiles[tile, 1] - tiles[tile, 0]
    covers = row_last - row_first + 1 == (tiling.rows_per_tile if tiling.masks_ragged else tile_size)
    all_first, all_stop = bottom[0], np.where(covers, top[1], 0)

    n_cols = np.maximum(0, some_stop - some_first)
    steps = -(-n_cols // block)
    inner_first = np.clip(-(-(all_first - some_first) // block), 0, steps)
    inner_stop = np.clip((all_stop - some_first) // block, inner_first, steps)

    col = piece[:, K_START] + some_first
    interior = _Runs(tile, col + inner_first * block, inner_stop - inner_first, owner).drop_empty().joined(block)
    before = _Runs(tile, col, inner_first, owner).drop_empty()
    after = _Runs(tile, col + inner_stop * block, steps - inner_stop, owner).drop_empty()
    edge = _Runs.merge(before, after)
    late = np.zeros(len(tiles), np.int64)
    if tiling.grid is not None:
        runs_before = np.bincount(before.tile, minlength=len(tiles))
        late_tiles = np.bincount(after.tile, weights=after.n, minlength=len(tiles)).astype(np.int64)
        late = np.where(
            (runs_before < 2**31 // LATE_TILES) & (late_tiles < LATE_TILES),
            runs_before * LATE_TILES + late_tiles,
            TOO_LATE if tiling.in_turn else 0,
        )

    component = np.full(len(tiles), -1)
    if tiling.grid is not None:
        # Rows of a tile belong together, so any slice that it meets tells.
        component[tile] = components(table)[owner]
    return _emit(tiles, table, interior, edge, late, component, tiling)


@dataclass(frozen=True)
class _Runs:
    """Runs of column tiles, sorted by the row tile that walks them."""

    tile: IntArray
    col: IntArray
    n: IntArray
    owner: IntArray  # index of the slice, for edge runs

    def take(self, index: IntArray) -> _Runs:
        return _Runs(self.tile[index], self.col[index], self.n[index], self.owner[index])

    def drop_empty(self) -> _Runs:
        return self.take(np.flatnonzero(self.n > 0))

    @staticmethod
    def merge(one: _Runs, other: _Runs) -> _Runs:
        both = _Runs(*(np.concatenate(pair) for pair in zip(one._fields(), other._fields(), strict=True)))
        return both.take(np.argsort(both.tile, kind="stable"))

    def _fields(self) -> tuple[IntArray, ...]:
        return self.tile, self.col, self.n, self.owner

    def joined(self, block: int) -> _Runs:
        """Runs of one tile that touch become one."""
        if len(self.tile) < 2:
            return self
        touching = (self.tile[1:] == self.tile[:-1]) & (self.col[1:] == self.col[:-1] + self.n[:-1] * block)
        head = np.flatnonzero(np.concatenate([[True], ~touching]))
        return _Runs(self.tile[head], self.col[head], np.add.reduceat(self.n, head), self.owner[head])

    def fill(self, rows: NDArray[np.int32], slices: IntArray | None = None) -> None:
        """Write the runs into rows of the run table, with their slices where a kernel asks for them."""
        rows[:, 0] = self.col
        rows[:, 1] = self.n
        if slices is not None:
            rows[:, 2:] = slices[self.owner]


def _cut(runs: _Runs, steps_before: IntArray, parts: IntArray, total: IntArray, first_item: IntArray, block: int) -> _Runs:
    """Distribute each tile's runs over its items: item p of P walks steps [p*S/P, (p+1)*S/P) of the tile's S.

    `steps_before`: steps of the tile walked before each run. The `tile` of the result is the item.
    """
    tile = runs.tile
    count, size = parts[tile], total[tile]
    stop = steps_before + runs.n
    # Item of step x is the p with p*S//P <= x < (p+1)*S//P.
    item_of_first = ((steps_before + 1) * count - 1) // np.maximum(size, 1)
    item_of_last = (stop * count - 1) // np.maximum(size, 1)
    pieces = item_of_last - item_of_first + 1
    source = np.repeat(np.arange(len(tile)), pieces)
    part = item_of_first[source] + _ramps(pieces)
    begin = np.maximum(steps_before[source], part * size[source] // count[source])
    end = np.minimum(stop[source], (part + 1) * size[source] // count[source])
    shift = begin - steps_before[source]
    return _Runs(
        first_item[tile[source]] + part, runs.col[source] + shift * block, end - begin, runs.owner[source]
    ).drop_empty()


def _steps_before(runs: _Runs, start: IntArray) -> IntArray:
    """Steps that each run's tile walks before it, when the tile's first run begins at step start[tile]."""
    ends = np.cumsum(runs.n)
    starts = ends - runs.n
    first_of_tile = np.searchsorted(runs.tile, runs.tile, side="left")
    return starts - starts[first_of_tile] + start[runs.tile] if len(runs.tile) else starts


def _emit(
    tiles: IntArray, slices: IntArray, interior: _Runs, edge: _Runs, late: IntArray, component: IntArray, tiling: Tiling
) -> Stream:
    n_tiles = len(tiles)
    interior_steps = np.bincount(interior.tile, weights=interior.n, minlength=n_tiles).astype(np.int64)
    edge_steps = np.bincount(edge.tile, weights=edge.n, minlength=n_tiles).astype(np.int64)
    total = interior_steps + edge_steps

    parts = np.ones(n_tiles, dtype=np.int64)
    if tiling.max_tiles is not None:
        parts = np.maximum(1, -(-total // tiling.max_tiles))
    first_item = np.cumsum(parts) - parts
    n_items = int(parts.sum())
    if n_items != n_tiles:
        zero = np.zeros(n_tiles, np.int64)
        before_edge = _steps_before(edge, interior_steps)
        interior = _cut(interior, _steps_before(interior, zero), parts, total, first_item, tiling.block_cols)
        edge = _cut(edge, before_edge, parts, total, first_item, tiling.block_cols)

    item_tile = np.repeat(np.arange(n_tiles), parts)
    items = np.zeros((n_items, len(ITEM_FIELDS)), np.int64)
    items[:, 0] = tiles[item_tile, 0]
    items[:, 1] = tiles[item_tile, 1] - tiles[item_tile, 0]
    items[:, 3] = np.bincount(interior.tile, weights=interior.n, minlength=n_items)
    items[:, 5] = np.bincount(edge.tile, weights=edge.n, minlength=n_items)
    items[:, 2] = np.searchsorted(interior.tile, np.arange(n_items), side="left")
    items[:, 4] = len(interior.tile) + np.searchsorted(edge.tile, np.arange(n_items), side="left")

    split = parts[item_tile] > 1
    slot = np.where(split, np.cumsum(split) - 1, NO_SLOT)
    items[:, 6] = slot if tiling.grid is None else late
    split_tiles = np.flatnonzero(parts > 1)
    combines = np.stack(
        [
            tiles[split_tiles, 0],
            tiles[split_tiles, 1] - tiles[split_tiles, 0],
            slot[first_item[split_tiles]],
            parts[split_tiles],
        ],
        axis=1,
    )

    n_interior = len(interior.tile)
    runs = np.zeros((n_interior + len(edge.tile) + 1, len(RUN_FIELDS)), np.int32)
    interior.fill(runs[:n_interior])
    edge.fill(runs[n_interior:-1], slices)
    steps = items[:, 3] + items[:, 5]
    if tiling.grid is None:
        found = Arrangement(np.argsort(-steps, kind="stable"), np.full(n_items, BY_ROUND), 1)
    else:
        arranged = arrange_in_turn if tiling.in_turn else arrange
        found = arranged(steps, items[:, 5] == 0, component[item_tile], tiling.grid)
    items = items[found.order]
    items[:, 7] = found.walks
    return Stream(
        items=items.astype(np.int32),
        runs=runs,
        combines=combines.astype(np.int32),
        afters=np.zeros(0, np.int32),
        slots=int(split.sum()),
        heads_per_wave=found.heads_per_wave,
    )
