"""In which order a persistent grid takes a plan's items and which way it walks each, so that programs read the same tiles at the same time.

What programs read together is read from memory once. An item begins when a program is free and then takes a tile a step; two items
that see the same tiles up to a common last one are in step

    walking down from that tile    if they begin together
    walking up to it               if they end together

The host foresees when items begin, well enough to say which is nearer. What follows for the list:

- A wave has as many heads as make whole rounds of the grid, so that programs begin the next wave in step too (ADR 19).
- Items of documents that share nothing are listed document by document, largest first, where there are enough of them, one head a wave:
  the items of a document and head then begin together, and its tiles are in the cache while they last. Few heads end too unevenly so;
  a wave has as many then as make a round of the largest document.
- Inside a document, items that see all of the same tiles come first and so stay together, before those that see fewer and fewer,
  which begin and end one by one.
- The last items of the list, of whatever document, are taken longest first, so that programs end together. Where they still would
  end much less evenly than with all items longest first, that is the list.
- Items without a tile, keys that nobody sees, come last and count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft_attn.plan.slices import K_LEN, K_START, Q_LEN, Q_START

IntArray = NDArray[np.int64]

# Codes of an item's walk. BY_ROUND: down and up in turn, as `kernels/triton/tiles.py: direction_of_round` says. Otherwise BY_ITEM, plus
# UP_IN_EVEN and UP_IN_ODD where it is walked up in even waves of heads, or in odd ones.
BY_ROUND, BY_ITEM, UP_IN_EVEN, UP_IN_ODD = 0, 1, 2, 4
# Rounds of a head's items from which on documents are listed one after the other. With fewer, longest first is in step by itself, as far
# as a document is a round; small documents are not.
ROUNDS_BY_DOCUMENT, ROUNDS_BY_SMALL_DOCUMENT = 2.5, 1.5
# Rounds that are nearly two or three: half a round less than two, and as little above three as leaves programs in step.
FEW_ROUNDS = (1.5, 3.25)
# How much of a launch programs may wait at its end, longer than with items taken longest first: what is saved on memory is more.
UNEVEN = 0.03
# Steps that an item takes beside its tiles.
ITEM_STEPS = 1
# Items that are foreseen to begin at once: one of so many of all, and no fewer programs than that, however many heads an item has.
FORESEEN_TOGETHER, LEAST_PROGRAMS = 128, 16


@dataclass(frozen=True)
class Grid:
    """A persistent grid that takes the items of a wave of heads, each item's heads one after the other, then those of the next wave.

    Attributes:
        programs: that run at a time.
        heads: of all waves.
    """

    programs: int
    heads: int


@dataclass(frozen=True)
class Arrangement:
    """How a grid goes through a plan's items.

    Attributes:
        order: (items,) of them.
        walks: (items,) of each, in that order.
        heads_per_wave: heads of a wave.
    """

    order: IntArray
    walks: IntArray
    heads_per_wave: int


def components(table: IntArray) -> IntArray:
    """(slices,) which slices of a slice table belong together, directly or through others: they share rows or columns. Numbered from 0."""
    rows = _overlapping(table[:, Q_START], table[:, Q_LEN])
    columns = _overlapping(table[:, K_START], table[:, K_LEN])
    found = np.arange(rows.max(initial=-1) + 1)
    while True:
        of_columns = np.full(columns.max(initial=-1) + 1, len(found))
        np.minimum.at(of_columns, columns, found[rows])
        lower = found.copy()
        np.minimum.at(lower, rows, of_columns[columns])
        # Whoever had the number before has it too; a chain then shortens by half.
        np.minimum.at(lower, found[rows], of_columns[columns])
        lower = lower[lower]
        if np.array_equal(lower, found):
            return np.unique(found[rows], return_inverse=True)[1].astype(np.int64)
        found = lower


def _overlapping(start: IntArray, length: IntArray) -> IntArray:
    """Numbers of the groups of intervals that overlap, directly or through others."""
    order = np.argsort(start, kind="stable")
    reach = np.maximum.accumulate((start + length)[order])
    begins = np.concatenate([[False], start[order][1:] >= reach[:-1]])
    found = np.empty(len(start), np.int64)
    found[order] = np.cumsum(begins)
    return found


def heads_in_step(n_items: int, programs: int, heads: int) -> int:
    """Heads of a wave whose items come nearest to two or three whole rounds; where none come near, those nearest to two."""
    rounds = {n: n * n_items / programs for n in range(1, heads + 1)}
    whole = [(abs(x - round(x)), n) for n, x in rounds.items() if FEW_ROUNDS[0] <= x <= FEW_ROUNDS[1]]
    return min(whole)[1] if whole else max(1, min(heads, round(2 * programs / max(1, n_items))))


def arrange(
    steps: IntArray, is_flat: NDArray[np.bool_], component: IntArray, grid: Grid, heads_apart: bool = True
) -> Arrangement:
    """How to go through a plan's items.

    Args:
        steps: (items,) tiles of each item.
        is_flat: whether it has no edge tiles.
        component: which items may see the same tiles (`components`).
        heads_apart: whether documents listed one after the other may have waves of one head.
    """
    work, empty = np.flatnonzero(steps > 0), np.flatnonzero(steps == 0)
    found = _arrange(steps[work], is_flat[work], np.unique(component[work], return_inverse=True)[1], grid, heads_apart)
    return Arrangement(
        np.concatenate([work[found.order], empty]),
        np.concatenate([found.walks, np.full(len(empty), BY_ROUND)]),
        # The device counts rounds of the whole list.
        found.heads_per_wave if found.walks.any() else heads_in_step(len(steps), grid.programs, grid.heads),
    )


def _arrange(steps: IntArray, is_flat: NDArray[np.bool_], component: IntArray, grid: Grid, heads_apart: bool) -> Arrangement:
    """Of items with tiles, components numbered from 0."""
    programs = grid.programs
    plain = Arrangement(
        np.argsort(-steps, kind="stable"),
        np.full(len(steps), BY_ROUND),
        heads_in_step(len(steps), programs, grid.heads),
    )
    largest = int(np.bincount(component).max(initial=0))
    rounds = ROUNDS_BY_SMALL_DOCUMENT if 2 * largest <= programs else ROUNDS_BY_DOCUMENT
    by_document = largest < len(steps) and len(steps) >= rounds * programs
    is_mixed = is_flat.any() and not is_flat.all()
    if not (by_document or is_mixed):
        return plain
    most = _waiting(steps[plain.order], plain.heads_per_wave, grid) + UNEVEN
    if by_document:
        # Sorted at the end: half a round, or a whole one. Of one head a wave, so that those of a document and head are neighbours, or of a
        # round of the largest document where that ends too unevenly.
        round_of_largest = max(1, min(grid.heads, programs // largest))
        for last in (-(-programs // 2), programs):
            for heads in dict.fromkeys((1, round_of_largest) if heads_apart else (round_of_largest,)):
                order = _in_order(steps, is_flat, component, heads, programs)
                order[-last:] = order[-last:][np.argsort(-steps[order[-last:]], kind="stable")]
                if _waiting(steps[order], heads, grid) <= most:
                    return Arrangement(order, _walks(steps[order], component[order], programs, heads), heads)
    if is_mixed:
        together = np.zeros_like(component)
        for order in (_in_order(steps, is_flat, together, plain.heads_per_wave, programs), plain.order):
            if _waiting(steps[order], plain.heads_per_wave, grid) <= most:
                return Arrangement(order, _walks(steps[order], together, programs, plain.heads_per_wave), plain.heads_per_wave)
    return plain


def _in_order(steps: IntArray, is_flat: NDArray[np.bool_], component: IntArray, heads: int, programs: int) -> IntArray:
    """Components one after the other, that of the longest item first, in each the flat items before the others, longest first.

    Only where the others are enough to fill the grid: they make programs end together.
    """
    longest = np.zeros(component.max(initial=-1) + 1, np.int64)
    np.maximum.at(longest, component, steps)
    late = ~is_flat & (np.bincount(component, weights=~is_flat) * heads >= programs)[component]
    order: IntArray = np.lexsort((-steps, late, component, -longest[component]))
    return order


def _waiting(steps: IntArray, heads: int, grid: Grid) -> float:
    """How much longer a launch takes than with programs that end all at once, as a share of that."""
    lengths, waves = steps + ITEM_STEPS, -(-grid.heads // heads)
    even = waves * float(lengths.sum()) / _at_a_time(grid.programs, heads)
    ends = max(int((begins + lengths).max()) for begins in _begins(lengths, grid.programs, heads, waves))
    return ends / even - 1.0


def _walks(steps: IntArray, component: IntArray, programs: int, heads: int) -> IntArray:
    """The walk of each item of a list."""
    lengths, count = steps + ITEM_STEPS, len(steps)
    # As `kernels/triton/tiles.py: place_in_list` has them.
    rounds = max(1, (count * heads + programs // 2) // programs)
    of_round = np.arange(count) * heads // -(-count * heads // rounds)
    # Items of a component and a round, one after the other, decide together.
    edges = (component[1:] != component[:-1]) | (of_round[1:] != of_round[:-1])
    first = np.flatnonzero(np.concatenate([[True], edges]))
    sizes = np.diff(np.append(first, count))
    walks = np.full(count, BY_ITEM)
    for begin, up in zip(_begins(lengths, programs, heads, waves=2), (UP_IN_EVEN, UP_IN_ODD), strict=True):
        walks += np.repeat(np.where(_spread(begin + lengths, first, sizes) < _spread(begin, first, sizes), up, 0), sizes)
    return walks


def _spread(times: IntArray, first: IntArray, sizes: IntArray) -> NDArray[np.float64]:
    """How far apart the times of each segment are: the mean distance from their mean."""
    means = np.add.reduceat(times, first) / sizes
    spread: NDArray[np.float64] = np.add.reduceat(np.abs(times - np.repeat(means, sizes)), first) / sizes
    return spread


def _begins(lengths: IntArray, programs: int, heads: int, waves: int) -> list[IntArray]:
    """When each item of a wave's list begins, for one wave after the other: whoever is free first takes the next."""
    free = np.zeros(_at_a_time(programs, heads), np.int64)
    together = min(len(free), max(1, -(-waves * len(lengths) // FORESEEN_TOGETHER)))
    found = []
    for _ in range(waves):
        begins = np.empty_like(lengths)
        for at in range(0, len(lengths), together):
            free.sort()
            taken = lengths[at : at + together]
            begins[at : at + together] = free[: len(taken)]
            free[: len(taken)] += taken
        found.append(begins)
    return found


def _at_a_time(programs: int, heads: int) -> int:
    """Items that run at a time: an item's heads begin together."""
    return max(min(programs, LEAST_PROGRAMS), programs // heads)
