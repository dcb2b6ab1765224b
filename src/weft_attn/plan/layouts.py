"""Which rank owns which rows of which document: the one place that holds the layouts' formulas.

A layout cuts every document into chunks; chunk c of a document is its rows start, start + step, ... . A rank owns the same chunks
of every document, and packs them document by document, a document's chunks in rising order. Documents may have any length, 0
included; chunks and whole ranks may be empty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from weft_attn.errors import require

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Layout(ABC):
    """A batch of documents over `world_size` ranks.

    Attributes:
        cu_seqlens: (documents + 1,) of the whole batch.
        starts: (documents, chunks) first row of a chunk inside its document.
        sizes: (documents, chunks) rows of a chunk.
        local_starts: (documents, chunks) row of a chunk inside the packed rows of the rank that owns it.
        rank_tokens: (W,) rows that each rank owns.
    """

    world_size: int
    cu_seqlens: IntArray
    starts: IntArray
    sizes: IntArray
    local_starts: IntArray
    rank_tokens: IntArray

    @staticmethod
    @abstractmethod
    def cut(lengths: IntArray, world_size: int) -> tuple[IntArray, IntArray]:
        """(documents, chunks) starts and sizes of the chunks of documents of these lengths, (documents, 1)."""

    @staticmethod
    @abstractmethod
    def chunks_of_ranks(world_size: int) -> IntArray:
        """(W, chunks of a rank) the chunks that each rank owns, rising."""

    @property
    def step(self) -> int:
        """Rows of the document from one row of a chunk to the next."""
        return 1

    @classmethod
    def of(cls, cu_seqlens: IntArray, world_size: int) -> Self:
        """Args: cu_seqlens (documents + 1,) int64, checked; world_size >= 1."""
        starts, sizes = cls.cut(np.diff(cu_seqlens)[:, None], world_size)
        owned = cls.chunks_of_ranks(world_size)
        # (documents, W, chunks of a rank)
        sizes_by_rank = sizes[:, owned]
        document_rows = sizes_by_rank.sum(axis=2)
        before = np.cumsum(document_rows, axis=0) - document_rows
        local_starts = np.empty_like(sizes)
        local_starts[:, owned] = before[:, :, None] + np.cumsum(sizes_by_rank, axis=2) - sizes_by_rank
        return cls(world_size, cu_seqlens, starts, sizes, local_starts, document_rows.sum(axis=0))

    def owner(self, chunk: IntArray) -> IntArray:
        """Rank that owns a chunk."""
        owned = self.chunks_of_ranks(self.world_size)
        owners = np.empty(owned.size, dtype=np.int64)
        owners[owned] = np.arange(self.world_size)[:, None]
        return owners[chunk]

    def owned_chunks(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank, rising."""
        return tuple(self.chunks_of_ranks(self.world_size)[rank].tolist())

    def positions(self, rank: int) -> IntArray:
        """(rank_tokens[rank],) the place of a rank's rows inside their documents, in its packed order."""
        return self._rows(rank, np.zeros_like(self.cu_seqlens[:-1]))

    def tokens(self, rank: int) -> IntArray:
        """(rank_tokens[rank],) the batch's tokens that are a rank's rows, in its packed order."""
        return self._rows(rank, self.cu_seqlens[:-1])

    def _rows(self, rank: int, document_starts: IntArray) -> IntArray:
        chunks = self.chunks_of_ranks(self.world_size)[rank]
        first = (document_starts[:, None] + self.starts[:, chunks]).ravel()
        size = self.sizes[:, chunks].ravel()
        inside = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        return np.repeat(first, size) + self.step * inside


class Zigzag(Layout):
    """An early and a late chunk for every rank: causal work is balanced over ranks.

    Document of L tokens: chunk j of 2W is rows [j*L // 2W, (j+1)*L // 2W); rank r owns chunks r and 2W-1-r.
    """

    @staticmethod
    def cut(lengths: IntArray, world_size: int) -> tuple[IntArray, IntArray]:
        return _equal_cuts(lengths, 2 * world_size)

    @staticmethod
    def chunks_of_ranks(world_size: int) -> IntArray:
        early = np.arange(world_size)
        return np.stack([early, 2 * world_size - 1 - early], axis=1)

    @property
    def bounds(self) -> IntArray:
        """(documents, 2W + 1) chunk boundaries inside each document."""
        return np.concatenate([self.starts, np.diff(self.cu_seqlens)[:, None]], axis=1)


class Contiguous(Layout):
    """One chunk of neighbours for every rank: rank r owns rows [r*L // W, (r+1)*L // W) of a document of L tokens."""

    @staticmethod
    def cut(lengths: IntArray, world_size: int) -> tuple[IntArray, IntArray]:
        return _equal_cuts(lengths, world_size)

    @staticmethod
    def chunks_of_ranks(world_size: int) -> IntArray:
        return np.arange(world_size)[:, None]


class Striped(Layout):
    """Every W-th row: rank r owns rows r, r + W, r + 2W, ... of every document."""

    @staticmethod
    def cut(lengths: IntArray, world_size: int) -> tuple[IntArray, IntArray]:
        ranks = np.arange(world_size)[None, :]
        return np.broadcast_to(ranks, (len(lengths), world_size)), (lengths - ranks + world_size - 1) // world_size

    @staticmethod
    def chunks_of_ranks(world_size: int) -> IntArray:
        return np.arange(world_size)[:, None]

    @property
    def step(self) -> int:
        return self.world_size


def _equal_cuts(lengths: IntArray, chunks: int) -> tuple[IntArray, IntArray]:
    bounds = np.arange(chunks + 1)[None, :] * lengths // chunks
    return bounds[:, :-1], np.diff(bounds, axis=1)


LAYOUTS: dict[str, type[Layout]] = {"zigzag": Zigzag, "contiguous": Contiguous, "striped": Striped}


def layout_named(name: Any) -> type[Layout]:
    """The layout of a name; refuses what is none."""
    require(
        isinstance(name, str) and name in LAYOUTS, "layout is known", expected=f"one of {sorted(LAYOUTS)}", given=repr(name)
    )
    return LAYOUTS[name]
