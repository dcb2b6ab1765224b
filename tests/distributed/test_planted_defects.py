"""The comparison with the oracle catches what goes wrong in context parallelism: every defect planted here makes it fail.

Each defect changes the layer in all ranks, in ways that people have got it wrong; one spawn runs them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from weft_attn.distributed import context_parallel, gathered, shard
from weft_attn.distributed.collectives import Ranks
from weft_attn.distributed.groups import Groups, Pass, head_groups
from weft_attn.distributed.shard import ShardedBatch
from weft_attn.distributed.symmetric import Windows
from weft_attn.plan import Plan, build
from weft_attn.testing.cases import Case
from weft_attn.testing.parallel import ParallelCase, RankResults, assert_ranks_match_oracle, run_case
from weft_attn.testing.ranks import run_ranks

WORLD_SIZE = 3
ATTENTION = Case(heads=8, kv_heads=4, softcap=2.0, softmax_scale=0.3, sinks=True)
CASES = [
    ParallelCase(lengths=(17, 0, 1, 8), attention=ATTENTION, window=(6, None), heads_per_group=1),
    ParallelCase(lengths=(17, 0, 1, 8), attention=ATTENTION, heads_per_group=1, keep_gathered=True),
    ParallelCase(
        lengths=(17, 0, 1, 8),
        attention=replace(ATTENTION, heads=6, kv_heads=3),
        group_sizes=((1, 2), (1, 1, 1)),
        merged=True,
        symmetric_memory=True,
    ),
]

Defect = Callable[[], AbstractContextManager[Any]]


class Done:
    def wait(self) -> None: ...


def attribute(owner: Any, name: str, value: Any) -> Defect:
    return lambda: mock.patch.object(owner, name, value)


def around(owner: Any, name: str, wrap: Callable[..., Any]) -> Defect:
    """Replace a function: wrap(original, *its arguments)."""

    @contextmanager
    def planted() -> Iterator[None]:
        original = getattr(owner, name)
        with mock.patch.object(owner, name, lambda *args, **kwargs: wrap(original, *args, **kwargs)):
            yield

    return planted


def forward_and_backward(change: Callable[[dict[str, Any]], None], *, forward: bool = True, backward: bool = True) -> Defect:
    """Change named arguments of a group's attention and of its gradients."""
    names = ["q", "k", "v", "sinks"]
    forward_names = [*names, "plan", "softmax_scale", "softcap", "deterministic", "out", "lse"]
    backward_names = [
        "dout", "dlse", *names, "out", "lse", "plan", "softmax_scale", "softcap", "deterministic", "dq", "dk", "dv"
    ]  # fmt: skip

    def changed(argument_names: list[str]) -> Callable[..., Any]:
        def call(original: Callable[..., Any], *args: Any) -> Any:
            named = dict(zip(argument_names, args, strict=True))
            change(named)
            return original(**named)

        return call

    @contextmanager
    def planted() -> Iterator[None]:
        one = around(gathered, "attention_into", changed(forward_names)) if forward else nullcontext
        other = around(gathered, "begin_backward", changed(backward_names)) if backward else nullcontext
        with one(), other():
            yield

    return planted


def early_chunks_before_late_ones(self: ShardedBatch) -> Any:
    parts = []
    for chunk in self.layout.owned_chunks(self.rank):
        starts = self.layout.cu_seqlens[:-1] + self.layout.starts[:, chunk]
        parts += [np.arange(s, s + n) for s, n in zip(starts, self.layout.sizes[:, chunk], strict=True)]
    return np.concatenate(parts)


def without_gaps(self: ShardedBatch, causal: bool, window: Any) -> Plan:
    return Plan.sharded(self.name, self.layout.cu_seqlens, self.rank, WORLD_SIZE, None, causal=causal, window=window)


def labels_shifted_after_sharding(batch: ShardedBatch, ids: torch.Tensor) -> torch.Tensor:
    tokens = torch.from_numpy(batch.tokens)
    shifted = ids.clone()
    shifted[tokens] = ids[tokens].roll(-1)
    return shifted.index_fill(0, batch.on(ids.device, "last_tokens"), -100)


def own_part_only(self: Ranks, output: torch.Tensor, buffer: torch.Tensor) -> Done:
    output.copy_(self.own_rows(buffer))
    return Done()


def previous_groups_keys(original: Any, self: Any, group: int) -> Any:
    k, _ = original(self, group)
    before = self.turns.views(max(0, self.groups.gather_of(group) - 1))
    return tuple(x[:, : k.shape[1]] for x in before)


def gathered_before_it_is_read(original: Any, self: Any, group: int) -> None:
    original(self, group)
    early = group + len(self.turns.memory)
    self.start(early)
    if early in self.pending:
        self.pending[early].wait()


def without_the_last_group(*given: Any) -> Groups:
    groups = head_groups(*given)
    return Groups(*(replace(one, attention=one.attention[:-1]) for one in (groups.forward, groups.backward)))


def sums_of_a_group_late(original: Any, self: Any, group: int) -> None:
    at = self.groups.reduce_of(group)
    if at >= len(self.partial.memory):
        self.pending.pop(at - len(self.partial.memory)).wait()
    original(self, group)


def reduce_in_bfloat16(original: Any, self: Any, k: Any, v: Any, call: Any) -> None:
    original(self, k, v, replace(call, grad_reduce_dtype=torch.bfloat16))


def gradients_of_the_first_heads(original: Any, self: Any, at: int) -> None:
    own = self.groups
    self.groups = replace(own, reduces=own.reduces[:1] * len(own.reduces))
    original(self, at)
    self.groups = own


def one_on_the_other(original: Any, self: Any, counts: Sequence[int], *rest: Any, **named: Any) -> list[torch.Tensor]:
    longest = max(original(self, counts, *rest, **named), key=len)
    return [longest[:count] for count in counts]


def first_heads_of_a_buffer(views: Any, held: slice, heads: slice) -> Any:
    return tuple(x[:, : heads.stop - heads.start] for x in views)


DEFECTS: dict[str, Defect] = {
    "rows: all early chunks, then all late ones": attribute(ShardedBatch, "tokens", property(early_chunks_before_late_ones)),
    "rows: in reverse": around(ShardedBatch, "on", lambda original, self, device, name: original(self, device, name).flip(0)),
    "positions counted from the batch's start": attribute(ShardedBatch, "positions", property(lambda self: self.tokens)),
    "unshard leaves the gathered order": attribute(ShardedBatch, "gathered_rows", property(lambda self: np.arange(self.total))),
    "labels run into the next document": attribute(
        ShardedBatch, "last_tokens", property(lambda self: self.layout.cu_seqlens[-1:] - 1)
    ),
    "labels shifted after sharding": attribute(context_parallel, "next_tokens", labels_shifted_after_sharding),
    "plan: ranks without gaps in a padded buffer": attribute(ShardedBatch, "plan", without_gaps),
    "plan: chunks of other ranks at the wrong offset": around(
        build, "band", lambda original, diagonal, *rest: original(0 * diagonal, *rest)
    ),
    "plan: window dropped": around(
        ShardedBatch, "plan", lambda original, self, causal, window: original(self, causal, (None, None))
    ),
    "plan: causal dropped": around(ShardedBatch, "plan", lambda original, self, causal, window: original(self, False, window)),
    "gather: another group's buffer is read": around(gathered._Gather, "views", previous_groups_keys),
    "gather: a later group overwrites this one": around(gathered._Gather, "wait", gathered_before_it_is_read),
    "gather: kept keys are overwritten": around(
        gathered._Gather,
        "__init__",
        lambda original, self, k, v, call, groups, _: original(self, k, v, call, groups, 2),
    ),
    "gather: buffers of a window lie on each other": around(Windows, "take", one_on_the_other),
    "gather: other ranks' keys never come": attribute(Ranks, "all_gather", lambda self, buffer: Done()),
    "gather: the last head group is missing": attribute(context_parallel, "head_groups", without_the_last_group),
    "gradients: sums overwritten before they are put with the others": around(
        gathered._Reduce, "make_room", sums_of_a_group_late
    ),
    "gradients summed in bfloat16": around(gathered._Reduce, "__init__", reduce_in_bfloat16),
    "gradients: those of another rank": around(
        Ranks, "reduce_scatter", lambda original, self, output, buffer: original(self, output, buffer.roll(len(output), 0))
    ),
    "gather: a launch takes the first heads of its buffer": attribute(gathered, "heads_within", first_heads_of_a_buffer),
    "gradients: reduced after the first launch of theirs": attribute(
        Pass, "ends_reduce", lambda self, group: self.attention[group].start == self.reduces[self.reduce_of(group)].start
    ),
    "gradients not summed over ranks": attribute(Ranks, "reduce_scatter", own_part_only),
    "gradients written to the wrong heads": around(gathered._Reduce, "finish", gradients_of_the_first_heads),
    "gradients of the loss through lse dropped": forward_and_backward(lambda named: named.update(dlse=None), forward=False),
    "scale missing in the backward": forward_and_backward(lambda named: named.update(softmax_scale=1.0), forward=False),
    "softcap missing in the backward": forward_and_backward(lambda named: named.update(softcap=0.0), forward=False),
    "softcap dropped": forward_and_backward(lambda named: named.update(softcap=0.0)),
    "sinks dropped": forward_and_backward(lambda named: named.update(sinks=None)),
    "sinks of other heads": forward_and_backward(lambda named: named.update(sinks=named["sinks"].flip(0))),
}


def run_with_defects(rank: int, world_size: int, names: list[str]) -> dict[str, list[RankResults] | str]:
    """By defect, what this rank computes of the cases, or the error it raises."""
    found: dict[str, list[RankResults] | str] = {}
    for name in names:
        shard.sharded_batch.cache_clear()
        with DEFECTS[name]() if name in DEFECTS else nullcontext():
            try:
                found[name] = [run_case(case) for case in CASES]
            except Exception as error:  # noqa: BLE001 (a defect may raise anything)
                found[name] = repr(error)
    return found


def check(found: Sequence[Any]) -> None:
    for index, case in enumerate(CASES):
        assert_ranks_match_oracle(case, [results[index] for results in found])


def test_the_comparison_catches_every_defect_and_passes_without() -> None:
    """One test, because all defects run in one spawn."""
    # Some thirty times three cases: longer than most where cores are shared.
    ranks = run_ranks(run_with_defects, WORLD_SIZE, ["none", *DEFECTS], timeout=280)
    for name in ("none", *DEFECTS):
        found = [rank[name] for rank in ranks]
        # A defect that raises no longer fits the code: it is to compute something wrong.
        assert not [error for error in found if isinstance(error, str)], (name, found)
        if name == "none":
            check(found)
        else:
            with pytest.raises(AssertionError):
                check(found)
