"""Where the keys of each sequence lie in a cache of rows or pages, and how new ones are written there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from weft_attn.errors import InvalidInput, Unsupported, require
from weft_attn.integrations import masks
from weft_attn.integrations.masks import IntArray, Window
from weft_attn.plan import Plan, build


@dataclass(frozen=True)
class CachePlace:
    """The keys of B sequences in a cache of shape (pages, page size, Hkv, D), a cache without a page table having one page each.

    Attributes:
        pages: (B, n) pages of each sequence.
        page_size, total_keys: keys of a page and of the cache.
        begins: (B,) the first key that is no padding.
        held: (B,) keys in the cache before new ones are written.
        ends: (B,) keys in the cache afterwards.
    """

    pages: IntArray
    page_size: int
    total_keys: int
    begins: IntArray
    held: IntArray
    ends: IntArray

    @classmethod
    def of(
        cls, batch: int, cache: torch.Tensor, new: int, seqlens: Any, batch_idx: Any, leftpad: Any, block_table: Any
    ) -> CachePlace:
        """From the arguments of `flash_attn_with_kvcache`; `new` keys are written for each sequence. Reads them on the host."""
        count, page_size = cache.shape[:2]
        if block_table is not None:
            if batch_idx is not None:
                raise Unsupported(
                    "a sequence has pages or a row of the cache: expected block_table or cache_batch_idx, given both"
                )
            pages = pages_of(block_table, batch)
        elif batch_idx is not None:
            pages = _per_sequence(batch_idx, "cache_batch_idx", batch)[:, None]
        else:
            require(count == batch, "each sequence has a row of the cache", expected=batch, given=count)
            pages = np.arange(batch, dtype=np.int64)[:, None]
        if seqlens is None:
            require(
                new == 0,
                "keys are written behind those held: cache_seqlens says how many",
                expected="cache_seqlens",
                given=None,
            )
            held = np.full(batch, pages.shape[1] * page_size)
        elif isinstance(seqlens, int | np.integer):
            held = np.full(batch, build.host_integer(seqlens, "cache_seqlens", 0))
        else:
            held = _per_sequence(seqlens, "cache_seqlens", batch)
        begins = np.zeros(batch, np.int64) if leftpad is None else _per_sequence(leftpad, "cache_leftpad", batch)
        ends = held + new
        room = pages.shape[1] * page_size
        for index in np.flatnonzero((begins < 0) | (begins > held) | (held < 0) | (ends > room)).tolist():
            raise InvalidInput(
                f"sequence {index} fits its cache: expected 0 <= cache_leftpad <= cache_seqlens and at most {room} keys, "
                f"given cache_leftpad={begins[index]}, cache_seqlens={held[index]} and {new} new keys"
            )
        return cls(pages, page_size, count * page_size, begins, held, ends)

    def plan(self, rows: int, causal: bool, window: Window) -> Plan:
        """`rows` rows of each sequence, the last one aligned with its last key."""
        lengths = np.full(len(self.held), rows)
        return masks.paged(
            lengths, self.begins, self.ends, self.pages, self.page_size, self.total_keys, causal=causal, window=window
        )

    def write(self, cache: torch.Tensor, new: torch.Tensor) -> None:
        """Put new (B, Snew, Hkv, D) behind the held keys of each sequence, in place."""
        places = self.held[:, None] + np.arange(new.shape[1])
        page = np.take_along_axis(self.pages, places // self.page_size, axis=1)
        within = places % self.page_size
        require(
            len(np.unique(page * self.page_size + within)) == places.size,
            "every new key has a place of its own",
            expected="no page or row of the cache that two sequences write to",
            given="one that is shared",
        )
        index = (torch.from_numpy(page).to(cache.device), torch.from_numpy(within).to(cache.device))
        cache.index_put_(index, new)


def _per_sequence(values: Any, name: str, batch: int) -> IntArray:
    numbers = build.host_integers(values, name)
    require(len(numbers) == batch, f"{name} has a number for each sequence", expected=batch, given=len(numbers))
    return numbers


def pages_of(table: Any, batch: int) -> IntArray:
    """(B, n) host integers of a block table."""
    require(
        isinstance(table, torch.Tensor) and table.ndim == 2 and table.shape[0] == batch,
        "block_table has a row of pages for each sequence",
        expected=f"a ({batch}, pages) tensor",
        given=tuple(table.shape) if isinstance(table, torch.Tensor) else type(table).__name__,
    )
    return build.host_integers(table.reshape(-1), "block_table").reshape(table.shape)
