"""Rows of the whole batch to rows of a rank and back: index maps from a layout, built once per batch."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable

from weft_attn.distributed.collectives import Ranks
from weft_attn.plan.layouts import Layout, layout_named
from weft_attn.plan.slices import Plan

IntArray = NDArray[np.int64]
Window = tuple[int | None, int | None]

IGNORED_LABEL = -100


class ShardedBatch:
    """A batch under a layout, as one rank sees it; what is built from it is kept with it.

    Attributes:
        layout: who owns what.
        rank_stride: rows of the largest rank, what every rank takes in a gathered buffer.
    """

    def __init__(self, name: str, cu_seqlens: IntArray, rank: int, world_size: int) -> None:
        self.layout: Layout = layout_named(name).of(cu_seqlens, world_size)
        self.name = name
        self.rank = rank
        self.rank_stride = int(self.layout.rank_tokens.max())
        self._plans: dict[tuple[bool, Window], Plan] = {}
        self._pairs: dict[tuple[bool, Window], int] = {}
        self._on_device: dict[tuple[str, torch.device], torch.Tensor] = {}

    @property
    def total(self) -> int:
        """Tokens of the whole batch."""
        return int(self.layout.cu_seqlens[-1])

    @property
    def local(self) -> int:
        """Tokens of this rank."""
        return int(self.layout.rank_tokens[self.rank])

    @cached_property
    def tokens(self) -> IntArray:
        """(local,) the batch's tokens that are this rank's rows."""
        return self.layout.tokens(self.rank)

    @cached_property
    def positions(self) -> IntArray:
        """(local,) their places inside their documents."""
        return self.layout.positions(self.rank)

    @cached_property
    def gathered_rows(self) -> IntArray:
        """(total,) the row of each of the batch's tokens in a buffer whose ranks are rank_stride apart."""
        rows = np.empty(self.total, dtype=np.int64)
        for rank, count in enumerate(self.layout.rank_tokens.tolist()):
            rows[self.layout.tokens(rank)] = rank * self.rank_stride + np.arange(count)
        return rows

    @cached_property
    def last_tokens(self) -> IntArray:
        """The last token of every document that has one."""
        cu = self.layout.cu_seqlens
        return cu[1:][np.diff(cu) > 0] - 1

    def on(self, device: torch.device, name: str) -> torch.Tensor:
        """An index map of this batch by its name, as a tensor on a device; copied there once."""
        key = (name, device)
        found = self._on_device.get(key)
        if found is None:
            # What is made in inference mode may be differentiated with afterwards.
            with torch.inference_mode(False):
                found = torch.from_numpy(getattr(self, name)).to(device)
            # A tensor of a mode that only traces is of no use outside of it.
            if type(found) is torch.Tensor:
                self._on_device[key] = found
        return found

    def plan(self, causal: bool, window: Window) -> Plan:
        """This rank's rows over the gathered keys. One rank alone has the documents as they are, like `varlen_attention`."""
        key = (causal, window)
        if key not in self._plans:
            cu, world_size = self.layout.cu_seqlens, self.layout.world_size
            self._plans[key] = (
                Plan.from_cu_seqlens(cu, cu, causal=causal, window=window)
                if world_size == 1
                else Plan.sharded(self.name, cu, self.rank, world_size, self.rank_stride, causal=causal, window=window)
            )
        return self._plans[key]

    def pairs(self, causal: bool, window: Window) -> int:
        """Visible pairs of all ranks: the same on each, unlike the pairs of its plan."""
        key = (causal, window)
        if key not in self._pairs:
            cu = self.layout.cu_seqlens
            self._pairs[key] = Plan.from_cu_seqlens(cu, cu, causal=causal, window=window).pairs
        return self._pairs[key]


@lru_cache(maxsize=16)
def sharded_batch(layout: str, cu_seqlens: bytes, rank: int, world_size: int) -> ShardedBatch:
    """The batch of these cu_seqlens, the bytes of a checked int64 array; the last few are kept."""
    return ShardedBatch(layout, np.frombuffer(cu_seqlens, dtype=np.int64), rank, world_size)


def shard_rows(batch: ShardedBatch, x: torch.Tensor) -> torch.Tensor:
    """(total, ...) -> (local, ...), differentiable."""
    return x.index_select(0, batch.on(x.device, "tokens"))


def unshard_rows(batch: ShardedBatch, local: torch.Tensor, ranks: Ranks, grad_reduce_dtype: torch.dtype) -> torch.Tensor:
    """(local, ...) of every rank -> (total, ...) on every rank, differentiable; collective, forward and backward."""
    whole: torch.Tensor = _Unshard.apply(local, batch, ranks, grad_reduce_dtype)  # type: ignore[no-untyped-call]
    return whole


def next_tokens(batch: ShardedBatch, ids: torch.Tensor) -> torch.Tensor:
    """(total,) the token that follows each in its document; IGNORED_LABEL for a document's last."""
    return ids.roll(-1).index_fill(0, batch.on(ids.device, "last_tokens"), IGNORED_LABEL)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, batch: ShardedBatch, ranks: Ranks, grad_reduce_dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.batch, ctx.ranks, ctx.grad_reduce_dtype = batch, ranks, grad_reduce_dtype
        buffer = local.new_empty(ranks.world_size * batch.rank_stride, *local.shape[1:])
        ranks.own_rows(buffer)[: batch.local].copy_(local)
        # As bytes: not every backend knows every dtype.
        ranks.all_gather(buffer.flatten().view(torch.uint8)).wait()
        return buffer.index_select(0, batch.on(local.device, "gathered_rows"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        batch: ShardedBatch = ctx.batch
        ranks: Ranks = ctx.ranks
        shape = (ranks.world_size * batch.rank_stride, *gradient.shape[1:])
        dtype = torch.promote_types(gradient.dtype, ctx.grad_reduce_dtype)
        buffer = torch.zeros(shape, dtype=dtype, device=gradient.device)
        buffer.index_copy_(0, batch.on(gradient.device, "gathered_rows"), gradient.to(buffer.dtype))
        summed = torch.empty_like(ranks.own_rows(buffer))
        ranks.reduce_scatter(summed, buffer).wait()
        return summed[: batch.local].to(gradient.dtype), None, None, None
