"""Boolean masks as plans: a band with segments and padding, or any cells at all. Host integers only.

A batch of B sequences is packed into B * rows query rows and B * keys keys. The first row of a sequence stands `shift` positions
after its first key.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from weft_attn.errors import InvalidPlan, require
from weft_attn.plan import Plan, build

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Window = tuple[int | None, int | None]

# Columns of a table of runs: sequence, first index in the sequence, length, segment.
SEQUENCE, START, LENGTH, SEGMENT = range(4)


@lru_cache(maxsize=256)
def band(batch: int, rows: int, keys: int, shift: int, window: Window) -> Plan:
    """Whole sequences: a row sees the `left` keys before its position and the `right` keys after it. One plan a shape, kept.

    Example:
        >>> from weft_attn.integrations.masks import band
        >>> band(1, 2, 4, 2, (1, 0)).to_mask().int().tolist()
        [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    return segmented_band(one_segment(batch, rows), one_segment(batch, keys), None, shift, window)


def one_segment(batch: int, length: int) -> IntArray:
    """(B, length) segment numbers of sequences that are one segment each."""
    return np.zeros((batch, length), np.int64)


def are_segments(numbers: IntArray) -> bool:
    """Whether each number is one stretch of its sequence."""
    runs = _runs(numbers)
    return len(np.unique(runs[:, [SEQUENCE, SEGMENT]], axis=0)) == len(runs)


def segmented_band(
    row_segments: IntArray, key_segments: IntArray, visible: BoolArray | None, shift: int, window: Window
) -> Plan:
    """As `band`, but rows see keys of their own segment only, and no key that is padding.

    Args:
        row_segments: (B, rows), key_segments: (B, keys) numbers; each number is one stretch of its sequence.
        visible: (B, keys), False where a key is padding; None: nowhere.
        shift, window: as in `band`.

    Raises:
        InvalidPlan: a number comes back after another one.
    """
    for name, numbers in (("rows", row_segments), ("keys", key_segments)):
        require(
            are_segments(numbers),
            f"a segment of the {name} is one stretch",
            expected="every number in one place of its sequence",
            given="a number that comes back",
            error=InvalidPlan,
        )
    (batch, rows), keys = row_segments.shape, key_segments.shape[1]
    row_runs, key_runs = _runs(row_segments), _runs(key_segments, visible)
    # Each run of keys belongs to the one run of rows with its sequence and segment, if there is one.
    place = {(s, g): i for i, (s, g) in enumerate(row_runs[:, [SEQUENCE, SEGMENT]].tolist())}
    owner = np.array([place.get((s, g), -1) for s, g in key_runs[:, [SEQUENCE, SEGMENT]].tolist()], dtype=np.int64)
    key_runs, row_runs = key_runs[owner >= 0], row_runs[owner[owner >= 0]]
    lo, hi = build.band(row_runs[:, START] + shift - key_runs[:, START], False, window)
    table = [
        row_runs[:, SEQUENCE] * rows + row_runs[:, START],
        row_runs[:, LENGTH],
        key_runs[:, SEQUENCE] * keys + key_runs[:, START],
        key_runs[:, LENGTH],
        lo,
        hi,
    ]
    return Plan._from_table(np.stack(table, axis=1), batch * rows, batch * keys)


def _runs(numbers: IntArray, visible: BoolArray | None = None) -> IntArray:
    """The longest stretches of one number, (n, 4); with `visible` those of visible entries only."""
    batch, length = numbers.shape
    if batch * length == 0:
        return np.zeros((0, 4), np.int64)
    flat = numbers.ravel()
    begins = np.ones(len(flat), dtype=bool)
    begins[1:] = flat[1:] != flat[:-1]
    if visible is not None:
        begins[1:] |= visible.ravel()[1:] != visible.ravel()[:-1]
    begins[::length] = True
    starts = np.flatnonzero(begins)
    runs = np.stack([starts // length, starts % length, np.diff(np.append(starts, len(flat))), flat[starts]], axis=1)
    return runs if visible is None else runs[visible.ravel()[starts]]


def cells(mask: BoolArray) -> Plan:
    """Any mask: one slice for each interval of keys that consecutive rows see under one band.

    Args:
        mask: (B, rows, keys), True where the row sees the key.

    Memory: a few times the mask. A mask without structure takes a slice per row and interval: it is right, and slow.

    Example:
        >>> import numpy as np
        >>> from weft_attn.integrations.masks import cells
        >>> cells(np.tril(np.ones((1, 5, 5), dtype=bool))).slices
        (Slice(q_start=0, q_len=5, k_start=0, k_len=5, lo=-4, hi=0),)
    """
    batch, rows, keys = mask.shape
    edges = np.diff(np.pad(mask.reshape(batch * rows, keys), ((0, 0), (1, 1))).astype(np.int8), axis=1)
    first, stop = np.nonzero(edges == 1)[1], np.nonzero(edges == -1)[1]
    counts = (edges == 1).sum(axis=1)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    table = [np.zeros((0, 6), np.int64)]
    for begin, end in _bands_of_rows(first, stop, counts, offsets, rows):
        n, intervals = end - begin, int(counts[begin])
        if intervals == 0:
            continue
        starts = first[offsets[begin] : offsets[end]].reshape(n, intervals)
        stops = stop[offsets[begin] : offsets[end]].reshape(n, intervals)
        k_start, k_stop = starts[0], stops[-1]
        columns = [
            np.full(intervals, begin),
            np.full(intervals, n),
            begin // rows * keys + k_start,
            k_stop - k_start,
            starts[-1] - k_start - (n - 1),
            stops[0] - k_start - 1,
        ]
        table.append(np.stack(columns, axis=1))
    return Plan._from_table(np.concatenate(table), batch * rows, batch * keys)


def _bands_of_rows(first: IntArray, stop: IntArray, counts: IntArray, offsets: IntArray, rows: int) -> list[tuple[int, int]]:
    """[begin, end) of consecutive rows of one sequence whose intervals are, one by one, a band's.

    A band's interval starts flat, then moves by one key a row; it ends moving, then flat.
    """
    groups, begin = [], 0
    moved_first = moved_stop = None
    total = len(counts)
    for row in range(1, total + 1):
        joins = row < total and row % rows != 0 and counts[row] == counts[row - 1]
        if joins:
            here, before = slice(offsets[row], offsets[row + 1]), slice(offsets[row - 1], offsets[row])
            start_step, stop_step = first[here] - first[before], stop[here] - stop[before]
            steps_of_a_band = ((start_step | stop_step) & ~1 == 0).all()
            keeps_first = moved_first is None or (start_step >= moved_first).all()
            keeps_stop = moved_stop is None or (stop_step <= moved_stop).all()
            # Slices that share rows have disjoint keys: no interval grows into where its neighbour began.
            k_start = first[offsets[begin] : offsets[begin + 1]]
            disjoint = (stop[here][:-1] <= k_start[1:]).all()
            joins = bool(steps_of_a_band and keeps_first and keeps_stop and disjoint)
        if joins:
            moved_first, moved_stop = start_step, stop_step
        else:
            groups.append((begin, row))
            begin, moved_first, moved_stop = row, None, None
    return groups


def paged(
    row_lengths: IntArray,
    key_begins: IntArray,
    key_ends: IntArray,
    pages: IntArray,
    page_size: int,
    total_keys: int,
    causal: bool,
    window: Window,
) -> Plan:
    """Sequences whose keys lie in pages: keys begin .. end of each, the last row aligned with the last key.

    Args:
        row_lengths: (B,) rows of each sequence, packed one after the other.
        key_begins, key_ends: (B,) keys [begin, end) of each, counted from the start of its first page.
        pages: (B, n) the page that holds keys [i * page_size, (i + 1) * page_size); unread beyond the last key.
        page_size, total_keys: keys of a page and of all pages.
        causal, window: as in `Plan.dense`.

    Raises:
        InvalidPlan: a page beyond the last one, or twice in a sequence.
    """
    first = np.arange(pages.shape[1], dtype=np.int64)[None] * page_size
    begins = np.maximum(first, key_begins[:, None])
    ends = np.minimum(first + page_size, key_ends[:, None])
    sequence, page = np.nonzero(ends > begins)
    begins, ends = begins[sequence, page], ends[sequence, page]
    rows = row_lengths[sequence]
    lo, hi = build.band(key_ends[sequence] - rows - begins, causal, window)
    k_start = pages[sequence, page] * page_size + begins - page * page_size
    q_start = np.cumsum(row_lengths) - row_lengths
    table = np.stack([q_start[sequence], rows, k_start, ends - begins, lo, hi], axis=1)
    bad = np.flatnonzero((pages[sequence, page] < 0) | (k_start + ends - begins > total_keys))
    if len(bad):
        raise InvalidPlan(
            f"a page is one of the cache's: expected 0 <= page < {total_keys // page_size}, "
            f"given {int(pages[sequence[bad[0]], page[bad[0]]])}"
        )
    plan = Plan._from_table(table, int(row_lengths.sum()), total_keys)
    plan.check()
    return plan
