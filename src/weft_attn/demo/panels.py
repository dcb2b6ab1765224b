"""What pictures of zigzag ranks show: every rank's plan over the gathered keys, coloured by document and chunk."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weft_attn.demo.documents import Pack
from weft_attn.plan.draw import Panel, Span
from weft_attn.plan.layouts import Zigzag
from weft_attn.plan.slices import Plan

IntArray = NDArray[np.int64]


def names_of(pack: Pack) -> list[str]:
    """The documents' names and lengths, for a legend."""
    return [f"{document.name}  ({len(document.tokens):,})" for document in pack.documents]


def zigzag_panels(cu_seqlens: IntArray, world_size: int) -> list[Panel]:
    """A panel for each rank: its rows against the gathered keys."""
    layout = Zigzag.of(cu_seqlens, world_size)
    spans = [_spans(layout, rank) for rank in range(world_size)]
    marks, key_spans, total = [], [], 0
    for rank, own in enumerate(spans):
        marks.append((total, f"rank {rank}'s keys"))
        key_spans += [Span(span.start + total, span.stop + total, span.document, span.late) for span in own]
        total += int(layout.rank_tokens[rank])
    plans = [Plan.zigzag(cu_seqlens, rank, world_size, kv_order="rank") for rank in range(world_size)]
    work = max(1, sum(plan.pairs for plan in plans))
    return [
        Panel(
            f"rank {rank}:  {plan.total_q:,} rows,  {plan.pairs:,} visible pairs,  {plan.pairs / work:.1%} of the work",
            plan,
            own,
            key_spans,
            marks,
        )
        for rank, (plan, own) in enumerate(zip(plans, spans, strict=True))
    ]


def _spans(layout: Zigzag, rank: int) -> list[Span]:
    """A rank's rows: of every document the early and the late chunk."""
    return [
        Span(int(start), int(start + layout.sizes[document, chunk]), document, late=index == 1)
        for document, starts in enumerate(layout.local_starts)
        for index, chunk in enumerate(layout.owned_chunks(rank))
        for start in (starts[chunk],)
    ]
