"""Device twin of THE visibility rule (`plan/slices.py`); a test compares the two cell by cell.

Rows and columns are absolute here. In the forward and dQ kernels rows are queries and columns keys; in the dK/dV kernel, which
walks the transposed plan, rows are keys and columns queries. The rule is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from weft_attn.kernels.triton import layout


@triton.jit
def visible_interval(row, col_len, lo, hi):
    """Row `row` of a slice sees columns [first, stop), both counted inside the slice."""
    first = tl.maximum(row + lo, 0)
    stop = tl.minimum(row + hi + 1, col_len)
    return first, stop


@triton.jit
def interval_in_run(run_ptr, rows):
    """Absolute columns [first, stop) that absolute `rows` see under an edge run's slice, and the slice's end column."""
    return interval_in_slice(
        rows,
        tl.load(run_ptr + layout.RUN_ROW_START),
        tl.load(run_ptr + layout.RUN_ROW_LEN),
        tl.load(run_ptr + layout.RUN_COL_START),
        tl.load(run_ptr + layout.RUN_COL_LEN),
        tl.load(run_ptr + layout.RUN_LO),
        tl.load(run_ptr + layout.RUN_HI),
    )


@triton.jit
def interval_in_slice(rows, row_start, row_len, col_start, col_len, lo, hi):
    """As `interval_in_run`, the slice's numbers in hand."""
    inside = rows - row_start
    first, stop = visible_interval(inside, col_len, lo, hi)
    # An item may hold rows of other slices: they see nothing of this one.
    stop = tl.where((inside >= 0) & (inside < row_len), stop, 0)
    return col_start + first, col_start + stop, col_start + col_len


@triton.jit
def first_tile(runs_ptr, run):
    """(column, tiles left in the run) at the start of a run."""
    return tl.load(runs_ptr + run * layout.RUN_WIDTH + layout.RUN_COL), tl.load(
        runs_ptr + run * layout.RUN_WIDTH + layout.RUN_N_TILES
    )


@triton.jit
def first_tile_of_walk(runs_ptr, run, direction, BLOCK_COLS: tl.constexpr):
    """As `first_tile`, of a walk through the run in a direction: 1 from its first tile, -1 from its last."""
    col, left = first_tile(runs_ptr, run)
    return begin_of_walk(col, left, direction, BLOCK_COLS), left


@triton.jit
def begin_of_walk(col, n_tiles, direction, BLOCK_COLS: tl.constexpr):
    """Where a walk through a run in a direction begins, of a run that begins at `col`."""
    return tl.where(direction < 0, col + (n_tiles - 1) * BLOCK_COLS, col)


@triton.jit
def edges_of_part(part, direction, edge_run, edge_tiles, late):
    """The edge tiles that a walk by keys visits before the interior ones (part 0) or behind them (part 1): first run and how many.

    Walked up, the early ones come first, walked down the late ones, so that all tiles of a slice come by their columns; `late` as in
    layout.LATE_TILES.
    """
    late_tiles = late % layout.LATE_TILES
    is_late = (part == 0) == (direction < 0)
    run = tl.where(is_late, edge_run + late // layout.LATE_TILES, edge_run)
    return run, tl.where(is_late, late_tiles, edge_tiles - late_tiles)


@triton.jit
def interior_of_part(part, interior_tiles):
    """How many interior tiles a walk by keys visits behind a part's edge tiles: all in part 0."""
    return tl.where(part == 0, interior_tiles, 0)


@triton.jit
def next_tile_of_walk(runs_ptr, run, col, left, direction, BLOCK_COLS: tl.constexpr):
    """As `next_tile`, runs in their order and each in the direction. With a branch: for loops that wait for all they began in every step."""
    left -= 1
    col += direction * BLOCK_COLS
    if left == 0:
        run += 1
        col, left = first_tile_of_walk(runs_ptr, run, direction, BLOCK_COLS)
    return run, col, left


@triton.jit
def next_edge_tile(runs_ptr, run, col, left, first, stop, col_stop, rows, direction, n_more, BLOCK_COLS: tl.constexpr):
    """As `next_tile_of_walk`, of edge tiles of which there are `n_more`; and what `rows` see (`interval_in_run`), asked for once a run."""
    left -= 1
    col += direction * BLOCK_COLS
    if (left == 0) & (n_more > 0):
        run += 1
        col, left = first_tile_of_walk(runs_ptr, run, direction, BLOCK_COLS)
        first, stop, col_stop = interval_in_run(runs_ptr + run * layout.RUN_WIDTH, rows)
    return run, col, left, first, stop, col_stop


@triton.jit
def next_tile(runs_ptr, run, col, left, BLOCK_COLS: tl.constexpr):
    """Step to the next tile of the stream, crossing into the next run where one ends.

    Written without a branch, so that the software pipeliner can run it ahead; the table has one row to spare at its end.
    """
    left -= 1
    ends = left == 0
    run = tl.where(ends, run + 1, run)
    run_ptr = runs_ptr + run * layout.RUN_WIDTH
    col = tl.where(ends, tl.load(run_ptr + layout.RUN_COL, mask=ends, other=0), col + BLOCK_COLS)
    left = tl.where(ends, tl.load(run_ptr + layout.RUN_N_TILES, mask=ends, other=0), left)
    return run, col, left
