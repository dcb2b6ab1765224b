"""Plans of packed documents from cumulative lengths, their keys packed too or in the pages of a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from weft_attn.errors import require
from weft_attn.integrations import masks
from weft_attn.integrations.kept import kept
from weft_attn.integrations.kv_cache import pages_of
from weft_attn.integrations.masks import Window
from weft_attn.plan import Plan, build


@build.host_work
def documents_plan(
    cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any, causal: bool, window: Window
) -> Plan:
    """The plan of packed documents, kept with a device's cu_seqlens_q; max_seqlen (None: unsaid) covers the longest document."""

    def make() -> Plan:
        for name, cu_seqlens, most in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
            _check_longest(build.host_cu_seqlens(cu_seqlens, f"cu_seqlens_{name}"), most, f"max_seqlen_{name}")
        return Plan.from_cu_seqlens(cu_seqlens_q, cu_seqlens_k, causal=causal, window=window)

    return kept((cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k, causal, window), make)


@build.host_work
def paged_documents_plan(
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    block_table: torch.Tensor,
    count: int,
    page_size: int,
    causal: bool,
    window: Window,
) -> Plan:
    """As `documents_plan`, the keys of each document in its pages."""

    def make() -> Plan:
        lengths = []
        for name, cu_seqlens, most in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
            cu = build.host_cu_seqlens(cu_seqlens, f"cu_seqlens_{name}")
            _check_longest(cu, most, f"max_seqlen_{name}")
            lengths.append(np.diff(cu))
        require(
            len(lengths[0]) == len(lengths[1]),
            "cu_seqlens_q and cu_seqlens_k hold the same documents",
            expected=len(lengths[0]),
            given=len(lengths[1]),
        )
        pages = pages_of(block_table, len(lengths[0]))
        require(
            bool((lengths[1] <= pages.shape[1] * page_size).all()),
            "a document's keys fit its pages",
            expected=f"at most {pages.shape[1]} pages of {page_size} keys",
            given=int(lengths[1].max(initial=0)),
        )
        begins = np.zeros_like(lengths[1])
        return masks.paged(lengths[0], begins, lengths[1], pages, page_size, count * page_size, causal, window)

    key = (max_seqlen_q, max_seqlen_k, count, page_size, causal, window)
    return kept((cu_seqlens_q, cu_seqlens_k, block_table), key, make)


def _check_longest(cu_seqlens: masks.IntArray, most: Any, name: str) -> None:
    if most is None:
        return
    longest = int(np.diff(cu_seqlens).max(initial=0))
    most = build.host_integer(most, name, 0)
    require(longest <= most, f"{name} covers the longest document", expected=f">= {longest}", given=most)
