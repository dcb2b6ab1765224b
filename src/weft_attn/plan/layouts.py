"""Where the zigzag layout puts each chunk of each document: the one place that holds its formula."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Zigzag:
    """The zigzag layout of a batch over `world_size` ranks.

    Document of L tokens: chunk j of 2W is rows [j*L // 2W, (j+1)*L // 2W); rank r owns chunks r and 2W-1-r of every document,
    packed document by document (early chunk, late chunk).

    Attributes:
        bounds: (documents, 2W + 1) chunk boundaries inside each document.
        local_starts: (documents, 2W) row of a chunk inside the packed rows of the rank that owns it.
        rank_tokens: (W,) rows that each rank owns.
    """

    world_size: int
    bounds: IntArray
    local_starts: IntArray
    rank_tokens: IntArray

    @classmethod
    def of(cls, cu_seqlens: IntArray, world_size: int) -> Zigzag:
        """Args: cu_seqlens (documents + 1,) int64, checked; world_size >= 1."""
        chunks = 2 * world_size
        lengths = np.diff(cu_seqlens)
        bounds = np.arange(chunks + 1)[None, :] * lengths[:, None] // chunks
        sizes = np.diff(bounds, axis=1)
        owned = sizes[:, :world_size] + sizes[:, : world_size - 1 : -1]
        before = np.cumsum(owned, axis=0) - owned
        early = before
        late = before + sizes[:, :world_size]
        local_starts = np.concatenate([early, late[:, ::-1]], axis=1)
        return cls(world_size, bounds, local_starts, owned.sum(axis=0))

    @property
    def sizes(self) -> IntArray:
        """(documents, 2W) rows of each chunk."""
        return np.diff(self.bounds, axis=1)

    def owner(self, chunk: IntArray) -> IntArray:
        """Rank that owns a chunk."""
        return np.minimum(chunk, 2 * self.world_size - 1 - chunk)

    def owned_chunks(self, rank: int) -> tuple[int, int]:
        """The early and the late chunk of a rank."""
        return rank, 2 * self.world_size - 1 - rank
