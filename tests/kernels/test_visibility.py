"""The device twin of THE visibility rule, cell by cell, and the walk over a run table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from weft_attn.kernels.hopper.tiles import visible_bits
from weft_attn.kernels.triton import layout
from weft_attn.kernels.triton.visibility import (
    edges_of_part,
    first_tile,
    first_tile_of_walk,
    interior_of_part,
    interval_in_run,
    next_edge_tile,
    next_tile,
    next_tile_of_walk,
    visible_interval,
)
from weft_attn.plan import in_step, slices, stream
from weft_attn.testing.cases import PLANS

ROWS = 32
BY_KEYS = stream.Tiling(32, 16, transposed=True, masks_ragged=True, grid=in_step.Grid(4, 2))


@triton.jit
def _interval_kernel(first_ptr, stop_ptr, col_len, lo, hi, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, ROWS)
    first, stop = visible_interval(rows, col_len, lo, hi)
    tl.store(first_ptr + rows, first)
    tl.store(stop_ptr + rows, stop)


@triton.jit
def _run_kernel(out_ptr, run_ptr, row, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, ROWS)
    first, stop, end = interval_in_run(run_ptr, row + rows)
    tl.store(out_ptr + rows, first)
    tl.store(out_ptr + ROWS + rows, stop)
    tl.store(out_ptr + 2 * ROWS + rows, tl.zeros([ROWS], tl.int32) + end)


@triton.jit
def _bits_kernel(bits_ptr, first_ptr, stop_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(bits_ptr + at, visible_bits(tl.load(first_ptr + at), tl.load(stop_ptr + at)))


@triton.jit
def _walk_kernel(out_ptr, runs_ptr, run, n_tiles, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    col, left = first_tile(runs_ptr, run)
    for step in range(n_tiles):
        tl.store(out_ptr + 2 * step, run)
        tl.store(out_ptr + 2 * step + 1, col)
        run, col, left = next_tile(runs_ptr, run, col, left, BLOCK)


@triton.jit
def _directed_walk_kernel(out_ptr, runs_ptr, run, n_tiles, direction, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    col, left = first_tile_of_walk(runs_ptr, run, direction, BLOCK)
    for step in range(n_tiles):
        tl.store(out_ptr + 2 * step, run)
        tl.store(out_ptr + 2 * step + 1, col)
        run, col, left = next_tile_of_walk(runs_ptr, run, col, left, direction, BLOCK)


@triton.jit
def _walk_by_keys_kernel(out_ptr, item_ptr, runs_ptr, direction, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """An item's tiles in the order in which a Hopper backward by keys visits them: column, and what the item's first row sees, of edge tiles."""
    rows = tl.load(item_ptr + layout.ITEM_ROW) + tl.arange(0, 1)
    step = 0
    for part in range(2):
        run, n_tiles = edges_of_part(
            part,
            direction,
            tl.load(item_ptr + layout.ITEM_EDGE_RUN),
            tl.load(item_ptr + layout.ITEM_EDGE_TILES),
            tl.load(item_ptr + layout.ITEM_LATE_EDGES),
        )
        col, left = first_tile_of_walk(runs_ptr, run, direction, BLOCK)
        first, stop, col_stop = interval_in_run(runs_ptr + run * layout.RUN_WIDTH, rows)
        for tile in range(n_tiles):
            tl.store(out_ptr + 4 * step, col)
            tl.store(out_ptr + 4 * step + 1 + tl.arange(0, 1), first)
            tl.store(out_ptr + 4 * step + 2 + tl.arange(0, 1), stop)
            tl.store(out_ptr + 4 * step + 3, col_stop)
            step += 1
            run, col, left, first, stop, col_stop = next_edge_tile(
                runs_ptr, run, col, left, first, stop, col_stop, rows, direction, n_tiles - 1 - tile, BLOCK
            )
        run = tl.load(item_ptr + layout.ITEM_INTERIOR_RUN)
        n_tiles = interior_of_part(part, tl.load(item_ptr + layout.ITEM_INTERIOR_TILES))
        col, left = first_tile_of_walk(runs_ptr, run, direction, BLOCK)
        for _ in range(n_tiles):
            tl.store(out_ptr + 4 * step, col)
            step += 1
            run, col, left = next_tile_of_walk(runs_ptr, run, col, left, direction, BLOCK)


def cells(first: np.ndarray, stop: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return (columns >= first[:, None]) & (columns < stop[:, None])


def test_the_device_rule_is_the_host_rule_on_random_slices() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        col_len = int(random.integers(0, 40))
        lo, hi = (int(x) for x in random.integers(-45, 45, size=2))
        first, stop = (torch.zeros(ROWS, dtype=torch.int32) for _ in range(2))
        _interval_kernel[(1,)](first, stop, col_len, lo, hi, ROWS=ROWS)
        expected = slices.visible_interval(np.arange(ROWS), col_len, lo, hi)
        np.testing.assert_array_equal(first.numpy(), expected[0])
        np.testing.assert_array_equal(stop.numpy(), expected[1])


def test_rows_outside_a_runs_slice_see_nothing_and_rows_inside_see_the_host_rules_cells() -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        row_start, row_len, col_start, col_len, row = (int(x) for x in random.integers(0, 30, size=5))
        lo, hi = (int(x) for x in random.integers(-35, 35, size=2))
        run = torch.tensor([0, 0, row_start, row_len, col_start, col_len, lo, hi], dtype=torch.int32)
        out = torch.zeros(3, ROWS, dtype=torch.int32)
        _run_kernel[(1,)](out, run, row, ROWS=ROWS)
        rows, columns = np.arange(row, row + ROWS), np.arange(80)
        first, stop = slices.visible_interval(rows - row_start, col_len, lo, hi)
        expected = cells(col_start + first, col_start + stop, columns)
        expected[(rows < row_start) | (rows >= row_start + row_len)] = False
        np.testing.assert_array_equal(cells(out[0].numpy(), out[1].numpy(), columns), expected)
        assert (out[2] == col_start + col_len).all()


def test_a_word_says_which_of_a_threads_columns_are_visible() -> None:
    """Of a product that is 128 columns wide; the interval may lie before the tile, behind it, or hold nothing."""
    edges = np.r_[-(10**9), np.arange(-9, 137), 10**9]
    first, stop = (torch.tensor(x.ravel(), dtype=torch.int32) for x in np.meshgrid(edges, edges))
    size = triton.next_power_of_2(len(first))
    first, stop = (torch.nn.functional.pad(x, (0, size - len(x))) for x in (first, stop))
    bits = torch.zeros(size, dtype=torch.int32)
    _bits_kernel[(1,)](bits, first, stop, SIZE=size)
    found = (bits.numpy()[:, None] >> np.arange(32)) & 1
    columns = 8 * (np.arange(32) // 2) + np.arange(32) % 2
    np.testing.assert_array_equal(found, cells(first.numpy(), stop.numpy(), columns))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["packed", "zigzag_padded", "shared_prefix", "window_both"])
def test_a_kernel_walks_the_tiles_that_the_host_tables_say(name: str, transposed: bool) -> None:
    tables = stream.host_stream(PLANS[name](40), stream.Tiling(16, 8, 3, transposed))
    runs = torch.from_numpy(tables.runs)
    for item in tables.items.tolist():
        for run, n_tiles in ((item[2], item[3]), (item[4], item[5])):
            expected, at, taken = [], run, 0
            for _ in range(n_tiles):
                expected.append([at, int(tables.runs[at, 0]) + 8 * taken])
                taken += 1
                if taken == tables.runs[at, 1]:
                    at, taken = at + 1, 0
            walked = torch.zeros(n_tiles, 2, dtype=torch.int32)
            _walk_kernel[(1,)](walked, runs, run, n_tiles, BLOCK=8)
            assert walked.tolist() == expected


@pytest.mark.parametrize("name", ["packed", "zigzag_padded", "shared_prefix", "window_both"])
def test_a_walk_back_takes_each_run_from_its_last_tile(name: str) -> None:
    tables = stream.host_stream(PLANS[name](160), stream.Tiling(16, 8, transposed=True))
    runs = torch.from_numpy(tables.runs)
    turned = 0
    for item in tables.items.tolist():
        run, n_tiles = item[2], item[3]
        forth, back = torch.zeros(2, n_tiles, 2, dtype=torch.int32)
        _directed_walk_kernel[(1,)](forth, runs, run, n_tiles, 1, BLOCK=8)
        _directed_walk_kernel[(1,)](back, runs, run, n_tiles, -1, BLOCK=8)
        plain = torch.zeros_like(forth)
        _walk_kernel[(1,)](plain, runs, run, n_tiles, BLOCK=8)
        assert torch.equal(forth, plain)
        assert torch.equal(back[:, 0], plain[:, 0])
        for each in plain[:, 0].unique():
            assert torch.equal(back[back[:, 0] == each, 1], plain[plain[:, 0] == each, 1].flip(0))
        turned += not torch.equal(forth, back)
    assert turned, "a plan whose runs are single tiles says nothing of directions"


def test_device_constants_are_the_host_tables_columns() -> None:
    for fields, prefix in ((stream.ITEM_FIELDS, "ITEM"), (stream.RUN_FIELDS, "RUN"), (stream.COMBINE_FIELDS, "COMBINE")):
        assert getattr(layout, f"{prefix}_WIDTH").value == len(fields)
    items = {"row", "n_rows", "interior_run", "interior_tiles", "edge_run", "edge_tiles", "slot", "walk"}
    for field in items:
        assert getattr(layout, f"ITEM_{field.upper()}").value == stream.ITEM_FIELDS.index(field)
    # Kernels say row and column where the forward's table says query and key.
    for device, host in (("ROW_START", "q_start"), ("ROW_LEN", "q_len"), ("COL_START", "k_start"), ("COL_LEN", "k_len")):
        assert getattr(layout, f"RUN_{device}").value == stream.RUN_FIELDS.index(host)
    for field in ("col", "n_tiles", "lo", "hi"):
        assert getattr(layout, f"RUN_{field.upper()}").value == stream.RUN_FIELDS.index(field)
    assert (layout.WALK_BY_ITEM.value, layout.WALK_UP_IN_EVEN.value) == (in_step.BY_ITEM, in_step.UP_IN_EVEN)
    assert layout.WALK_UP_IN_EVEN.value << 1 == in_step.UP_IN_ODD
    assert (layout.ITEM_LATE_EDGES.value, layout.LATE_TILES.value) == (stream.ITEM_FIELDS.index("slot"), stream.LATE_TILES)
    for field in stream.COMBINE_FIELDS:
        assert getattr(layout, f"COMBINE_{field.upper()}").value == stream.COMBINE_FIELDS.index(field)


@triton.jit
def _cast_kernel(x_ptr, cast_ptr, stored_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    tl.store(cast_ptr + offsets, x.to(cast_ptr.dtype.element_ty))
    tl.store(stored_ptr + offsets, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_interpreter_truncates_to_bfloat16_and_rounds_to_float16(dtype: torch.dtype) -> None:
    """What `testing/compare.py` says of it: when this fails, the allowance there can go."""
    from weft_attn.testing.compare import truncated_to_bfloat16, truncates

    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    cast, stored = torch.empty(256, dtype=dtype), torch.empty(256, dtype=dtype)
    _cast_kernel[(1,)](x, cast, stored, SIZE=256)
    expected = truncated_to_bfloat16(x) if dtype == torch.bfloat16 else x.to(dtype).float()
    assert torch.equal(cast.float(), expected)
    assert torch.equal(stored.float(), expected)
    assert truncates(dtype, torch.device("cpu")) is (dtype == torch.bfloat16)
    assert not truncates(dtype, torch.device("cuda"))


def walked_by_keys(tables: stream.Stream, item: np.ndarray, direction: int) -> np.ndarray:
    """(tiles, 4) of `_walk_by_keys_kernel`; -1 where it tells nothing."""
    found = torch.full((int(item[3] + item[5]), 4), -1, dtype=torch.int32)
    if len(found):
        _walk_by_keys_kernel[(1,)](found, torch.from_numpy(item.copy()), torch.from_numpy(tables.runs), direction, BLOCK=16)
    return found.numpy()


@pytest.mark.parametrize("direction", [1, -1])
def test_a_walk_by_keys_comes_by_a_slices_tiles_in_the_order_of_their_columns(direction: int) -> None:
    """Early edge tiles at the diagonal, late ones at a ragged end and behind a window."""
    documents = np.array([0, 250, 269, 400])
    for window in ((None, None), (75, 0)):
        plan = slices.Plan.from_cu_seqlens(documents, documents, causal=True, window=window)
        tables = stream.host_stream(plan, BY_KEYS)
        for item in tables.items:
            assert (np.diff(walked_by_keys(tables, item, direction)[:, 0]) * direction > 0).all()


@pytest.mark.parametrize("name", PLANS)
def test_a_walk_by_keys_visits_an_items_tiles_each_with_what_its_run_says(name: str) -> None:
    tables = stream.host_stream(PLANS[name](40), BY_KEYS)
    for number, item in enumerate(tables.items):
        expected = []
        for run, n_tiles, is_edge in ((item[2], item[3], False), (item[4], item[5], True)):
            for row, at in _tiles(tables.runs, run, n_tiles):
                seen = (-1, -1, -1)
                if is_edge:
                    first, stop = (int(x[0]) for x in slices.visible_interval(item[:1] - row[2], row[5], row[6], row[7]))
                    inside = 0 <= item[0] - row[2] < row[3]
                    seen = (row[4] + first, row[4] + (stop if inside else 0), row[4] + row[5])
                expected.append((row[0] + 16 * at, *seen))
        direction = 1 if number % 2 else -1
        assert sorted(map(tuple, walked_by_keys(tables, item, direction).tolist())) == sorted(expected)


def _tiles(runs: np.ndarray, run: int, n_tiles: int) -> list[tuple[np.ndarray, int]]:
    """Each of so many tiles as its run's row and its place in the run."""
    found: list[tuple[np.ndarray, int]] = []
    while len(found) < n_tiles:
        found += [(runs[run], at) for at in range(runs[run][1])]
        run += 1
    return found
