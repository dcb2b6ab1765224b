"""Context parallelism held to one process: cases, what a rank computes of them, and the comparison of all ranks with the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from weft_attn.distributed import context_parallel
from weft_attn.distributed.collectives import Ranks
from weft_attn.distributed.context_parallel import ContextParallel
from weft_attn.distributed.groups import Groups, Pass
from weft_attn.distributed.symmetric import Windows
from weft_attn.plan import Plan
from weft_attn.testing.cases import Case, Inputs, cumulative, make_inputs
from weft_attn.testing.compare import Results, assert_matches_oracle, baselines_of, evaluate, oracle_of
from weft_attn.testing.memory import memory_of_nan

# Uneven documents, an empty one, and one shorter than most worlds: some ranks have no row of it.
LENGTHS = (21, 0, 1, 34, 2, 13)


@dataclass(frozen=True)
class ParallelCase:
    """A batch, its layout, an attention over it, and how keys travel.

    Attributes:
        attention: head counts, dims, dtype and features; its own plan and size do not count.
        causal, window: of `ContextParallel.attention`.
        heads_per_group: what max_gather_bytes is set to allow; None: leave it.
        group_sizes: KV heads of each launch of the forward and of the backward; None: what `head_groups` chooses.
        merged: three of them share gathers and reduce-scatters as `Pass.between` says; otherwise each has its own.
        keep_gathered, grad_reduce_dtype, symmetric_memory: of `ContextParallel`; on CPUs, windows of ordinary memory.
        deterministic: of `ContextParallel.attention`; unlike there on by default, for bits are compared.
    """

    layout: str = "zigzag"
    lengths: tuple[int, ...] = LENGTHS
    attention: Case = field(default_factory=lambda: Case(heads=4, kv_heads=2))
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    heads_per_group: int | None = None
    group_sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    merged: bool = False
    keep_gathered: bool = False
    grad_reduce_dtype: torch.dtype = torch.float32
    symmetric_memory: bool = False
    deterministic: bool = True

    @property
    def cu_seqlens(self) -> list[int]:
        return cumulative(list(self.lengths))

    @property
    def whole_plan(self) -> Plan:
        return Plan.from_cu_seqlens(self.cu_seqlens, self.cu_seqlens, causal=self.causal, window=self.window)

    def parallel(self, group: Any = None) -> ContextParallel:
        """The case's ContextParallel on this rank."""
        over_nccl = dist.is_initialized() and "nccl" in dist.get_backend(group)
        ordinary = mock.patch.object(context_parallel, "windows_of", side_effect=lambda _ranks: OrdinaryWindows())
        with nullcontext() if over_nccl else ordinary:
            return self._parallel(group)

    def _parallel(self, group: Any) -> ContextParallel:
        settings: dict[str, Any] = {
            name: getattr(self, name) for name in ("keep_gathered", "grad_reduce_dtype", "symmetric_memory")
        }
        made = ContextParallel(group, self.layout, **settings)
        if self.heads_per_group is None:
            return made
        of = self.attention
        sizes: dict[str, Any] = dict(head_dim=of.head_dim, head_dim_v=of.dim_v, dtype=of.dtype)
        one_head = made.memory(self.cu_seqlens, heads=1, kv_heads=1, **sizes).backward
        # Two buffers take turns where there are several groups, one where there is one head.
        cap = max(1, 2 * one_head * self.heads_per_group)
        return ContextParallel(group, self.layout, max_gather_bytes=cap, **settings)

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """Inside, heads are grouped as the case says."""
        if self.group_sizes is None:
            yield
            return
        forward, backward = (
            Pass.between(*sizes)
            if self.merged and len(sizes) == 3
            else Pass.each(tuple(map(slice, (0, *accumulate(sizes)), accumulate(sizes))))
            for sizes in self.group_sizes
        )
        groups = Groups(forward, backward)
        with mock.patch.object(context_parallel, "head_groups", return_value=groups):
            yield

    def __str__(self) -> str:
        parts = [self.layout, str(self.attention).removeprefix("causal-")]
        for name in (
            "lengths",
            "causal",
            "window",
            "heads_per_group",
            "group_sizes",
            "merged",
            "keep_gathered",
            "symmetric_memory",
        ):
            if getattr(self, name) != getattr(_PLAIN, name):
                parts.append(f"{name}={getattr(self, name)}")
        return "-".join(parts)


_PLAIN = ParallelCase()


class OrdinaryWindows(Windows):
    """Windows that nobody has registered, for groups without NCCL."""

    def __init__(self) -> None:
        super().__init__(takes_multiprocessors=False)

    def require_gpu(self, device: torch.device) -> None: ...

    def require_no_capture(self) -> None: ...

    def _succeed(self, device: torch.device) -> None: ...

    def _register(self, n_bytes: int, device: torch.device, ranks: Ranks) -> torch.Tensor:  # noqa: ARG002
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)


def windows_of_nan() -> AbstractContextManager[Any]:
    """Inside, what windows give holds NaN, in any dtype, as fresh memory does."""
    take = Windows.take

    def filled(*given: Any, **named: Any) -> list[torch.Tensor]:
        found = take(*given, **named)
        for x in found:
            x.view(torch.uint8).fill_(0xFF)
        return found

    return mock.patch.object(Windows, "take", filled)


def owned_rows(layout: str, length: int, rank: int, world_size: int) -> list[int]:
    """Rows of one document that a rank owns, by the words of the design."""
    if layout == "striped":
        return list(range(rank, length, world_size))
    if layout == "contiguous":
        return list(range(rank * length // world_size, (rank + 1) * length // world_size))
    chunks = (rank, 2 * world_size - 1 - rank)
    return [t for c in chunks for t in range(c * length // (2 * world_size), (c + 1) * length // (2 * world_size))]


def owned(layout: str, lengths: Sequence[int], rank: int, world_size: int) -> list[tuple[int, int]]:
    """(document, position) of a rank's rows in its packed order."""
    return [(d, t) for d, n in enumerate(lengths) for t in owned_rows(layout, n, rank, world_size)]


@dataclass(frozen=True)
class RankResults:
    """What one rank computes of a case.

    Attributes:
        results: out, lse and gradients of the rank's rows; dsinks its part of them.
        positions, labels: of its rows; labels of the ids 0, 1, 2, ...
        whole: `unshard` of the rank's part of the ids.
    """

    results: Results
    positions: torch.Tensor
    labels: torch.Tensor
    whole: torch.Tensor

    def to(self, device: torch.device | str) -> RankResults:
        """The same on a device."""
        moved = Results(**{name: tensor.to(device) for name, tensor in self.results.items()})  # type: ignore[arg-type]
        return RankResults(moved, self.positions.to(device), self.labels.to(device), self.whole.to(device))


def run_case(case: ParallelCase, device: torch.device | str = "cpu", group: Any = None) -> RankResults:
    """A rank's part of a case, collective; fresh memory holds NaN, gathered padding too."""
    parallel, cu = case.parallel(group), case.cu_seqlens
    x = make_inputs(case.attention, case.whole_plan, device)
    q, k, v, dout = parallel.shard(cu, dict(q=x.q, k=x.k, v=x.v, dout=x.dout)).values()
    dlse = None if x.dlse is None else parallel.shard(cu, x.dlse.T).T

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found: Any = parallel.attention(
            q,
            k,
            v,
            cu,
            causal=case.causal,
            window=case.window,
            sinks=sinks,
            deterministic=case.deterministic,
            return_lse=True,
            **case.attention.options,
        )
        return found

    with memory_of_nan(), windows_of_nan(), case.grouped():
        results = evaluate(attention, Inputs(q, k, v, x.sinks, dout, dlse))
        ids = torch.arange(cu[-1], device=device)
        return RankResults(
            results, parallel.position_ids(cu), parallel.shift_labels(cu, ids), parallel.unshard(cu, parallel.shard(cu, ids))
        )


def run_cases(rank: int, world_size: int, cases: Sequence[ParallelCase]) -> list[RankResults]:  # noqa: ARG001
    """What `run_ranks` calls: all cases, one after the other."""
    return [run_case(case) for case in cases]


def assert_ranks_match_oracle(case: ParallelCase, ranks: Sequence[RankResults]) -> None:
    """Put the ranks' rows together and hold every result to the oracle's, and rows, positions and labels to their definition."""
    cu, world_size = case.cu_seqlens, len(ranks)
    owners = [owned(case.layout, case.lengths, rank, world_size) for rank in range(world_size)]
    last = {stop - 1 for start, stop in pairwise(cu) if stop > start}
    for rank, (rows, found) in enumerate(zip(owners, ranks, strict=True)):
        tokens = [cu[d] + t for d, t in rows]
        assert found.positions.tolist() == [t for _, t in rows], f"positions of rank {rank}"
        assert found.labels.tolist() == [-100 if t in last else t + 1 for t in tokens], f"labels of rank {rank}"
        assert found.whole.tolist() == list(range(cu[-1])), f"unshard on rank {rank}"
    order = torch.tensor([cu[d] + t for rows in owners for d, t in rows], dtype=torch.long)
    inputs, oracle, baselines = _exact(_without_travel(case))
    joined = _joined([found.results for found in ranks], order.argsort())
    assert_matches_oracle(joined, case.attention, case.whole_plan, inputs, oracle=oracle, baselines=baselines)


def _joined(ranks: Sequence[Results], order: torch.Tensor) -> Results:
    """All ranks' rows in the batch's order; dsinks summed."""

    def joined(name: str) -> torch.Tensor | None:
        parts = [getattr(rank, name) for rank in ranks if getattr(rank, name) is not None]
        if not parts:
            return None
        if name == "dsinks":
            return torch.stack(parts).sum(dim=0)
        return torch.cat(parts, dim=1)[:, order] if name == "lse" else torch.cat(parts)[order]

    return Results(**{f.name: joined(f.name) for f in fields(Results) if f.name != "terms"})  # type: ignore[arg-type]


def _without_travel(case: ParallelCase) -> ParallelCase:
    """The same attention: results depend on neither the layout nor how keys travel."""
    return replace(_PLAIN, lengths=case.lengths, attention=case.attention, causal=case.causal, window=case.window)


@lru_cache(maxsize=256)
def _exact(case: ParallelCase) -> tuple[Inputs, Results, list[Results]]:
    plan = case.whole_plan
    inputs = make_inputs(case.attention, plan)
    return inputs, oracle_of(case.attention, plan, inputs), baselines_of(case.attention, plan, inputs)
