"""How many keys the queries of a plan's documents see, so that documents that see few and many can go different ways.

A document here is a component of the plan (`in_step.components`): slices that share queries or keys, directly or through others. What
kernels do for one touches no row of another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft_attn.plan.in_step import components
from weft_attn.plan.slices import K_LEN, K_START, Q_LEN, Q_START, count_pairs

IntArray = NDArray[np.int64]

# Documents whose queries see so many keys or more, and fewer than so many, in the mean. Rows that see nothing, and keys that nobody sees,
# are with those that see 0.
Seen = tuple[float, float]


@dataclass(frozen=True)
class Documents:
    """The documents of a plan.

    Attributes:
        of_slice: (slices,) which document each slice belongs to.
        queries, keys: (documents,) rows that its slices cover.
        seen: (documents,) keys that its queries see, in the mean.
    """

    of_slice: IntArray
    queries: IntArray
    keys: IntArray
    seen: NDArray[np.float64]

    def within(self, seen: Seen) -> NDArray[np.bool_]:
        """(documents,) which ones see so many keys."""
        least, below = seen
        return (self.seen >= least) & (self.seen < below)


def documents_of(table: IntArray) -> Documents:
    """Of a canonical slice table whose rows are queries."""
    of_slice = components(table)
    count = int(of_slice.max(initial=-1)) + 1
    queries, keys = (
        _covered(table[:, start], table[:, length], of_slice, count) for start, length in ((Q_START, Q_LEN), (K_START, K_LEN))
    )
    pairs = np.bincount(of_slice, weights=count_pairs(table), minlength=count)
    return Documents(of_slice, queries, keys, pairs / np.maximum(1, queries))


def _covered(start: IntArray, length: IntArray, of_slice: IntArray, count: int) -> IntArray:
    """How many places the intervals of each document cover; those of different documents have none in common."""
    order = np.argsort(start, kind="stable")
    stops = (start + length)[order]
    reached = np.concatenate([[0], np.maximum.accumulate(stops)[:-1]])
    new = np.maximum(0, stops - np.maximum(start[order], reached))
    return np.bincount(of_slice[order], weights=new, minlength=count).astype(np.int64)
