"""Weft's context parallelism and its parts, each as a way to attend that a group of ranks runs together.

- the whole of it: gathers, kernels, reduce-scatters, overlapped;
- its kernels alone: one launch for all heads, on keys and values that are gathered already;
- the same, but no rank begins a call before the others do: what gathers that take no time would leave, of GPUs whose clocks swing;
- its communication alone: the same code with kernels that do nothing, so the same collectives, buffers and copies in the same order;
- the whole of it in other groups of KV heads than it chooses, where they are asked for;
- the ideal: the whole batch on every GPU for itself, over the ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

import weft_attn as weft
from weft_attn.bench.cases import Tensors
from weft_attn.bench.group_timing import Moment, now
from weft_attn.bench.oracle import Oracle
from weft_attn.bench.workload import Workload
from weft_attn.distributed import gathered
from weft_attn.distributed.collectives import Ranks
from weft_attn.distributed.groups import Groups, Pass, equal_groups
from weft_attn.distributed.shard import ShardedBatch
from weft_attn.errors import require
from weft_attn.ops import Backward
from weft_attn.testing.compare import Budget

WEFT, KERNELS, COMMUNICATION, IDEAL = "weft", "weft: kernels", "weft: communication", "ideal"
IN_STEP = "weft: kernels in step"
FORWARD, BOTH = "forward", "forward+backward"
OWN_PASSES = (FORWARD, BOTH)

# q, k, v -> out, differentiable.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Way:
    """One way to attend, ready to be timed; every rank runs it at the same time.

    Attributes:
        tensors: its q, k, v and gradient of the output.
        oracle: what its sampled rows and keys must come out as; None: nothing is checked.
        compared: which of "out", "dq", "dk", "dv" it gives in full.
        around: entered around each call.
        is_peer: it is not Weft's own.
        is_whole: context parallelism with everything that belongs to it, of which `watched_launches` sees the launches.
        note: what a reader has to know of it.
    """

    name: str
    attend: Attend
    tensors: Tensors
    oracle: Oracle | None
    compared: tuple[str, ...] = ("out", "dq", "dk", "dv")
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    is_peer: bool = False
    is_whole: bool = False
    note: str = ""

    def forward(self, _turn: int = 0) -> torch.Tensor:
        """out, without autograd's bookkeeping."""
        with self.around(), torch.no_grad():
            return self.attend(self.tensors.q, self.tensors.k, self.tensors.v)

    def both(self, _turn: int = 0) -> dict[str, torch.Tensor]:
        """A forward and its backward: the output and the three gradients."""
        leaves = [x.detach().requires_grad_() for x in (self.tensors.q, self.tensors.k, self.tensors.v)]
        with self.around():
            out = self.attend(*leaves)
            gradients = torch.autograd.grad(out, leaves, self.tensors.dout)
        return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))

    def call(self, pass_name: str) -> Callable[[int], object]:
        """The pass as it is timed."""
        return self.forward if pass_name == FORWARD else self.both

    def check(self, pass_name: str) -> dict[str, Budget]:
        """Run the pass and compare what it gives; empty where nothing is checked."""
        found = {"out": self.forward()} if pass_name == FORWARD else self.both()
        if self.oracle is None:
            return {}
        budgets = self.oracle.check_forward(found["out"], None) if "out" in self.compared else {}
        return budgets | self.oracle.check_gradients(
            {name: found[name] for name in self.compared if name in found and name != "out"}
        )


@dataclass(frozen=True, order=True)
class Grouping:
    """Other groups of KV heads than Weft chooses.

    Attributes:
        numbers: one: as many equal groups, each gathered, attended to and reduced by itself. Three: heads of a backward's first, middle
            and last launch, 0 for none, as `Pass.between` has them; the forward has the first ones' and all others'.
    """

    numbers: tuple[int, ...]

    @classmethod
    def named(cls, text: str) -> Grouping:
        """Of "4" or "1+6+1".

        Raises:
            InvalidInput: something else.
        """
        parts = text.split("+")
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        require(
            len(numbers) == len(parts) and len(parts) in (1, 3) and sum(numbers) > 0 and (len(parts) == 1 or numbers[1] > 0),
            "groups of heads are a number of them, or heads of a first, a middle and a last launch",
            expected="N >= 1, or A+B+C with B >= 1",
            given=repr(text),
        )
        return cls(numbers)

    def __str__(self) -> str:
        if len(self.numbers) > 1:
            return "+".join(map(str, self.numbers)) + " heads"
        return f"{self.numbers[0]} group{'' if self.numbers[0] == 1 else 's'}"

    @property
    def way(self) -> str:
        """The name of Weft's way in these groups."""
        return f"{WEFT}: {self}"

    def obstacle(self, heads: int, largest: int) -> str:
        """Why so many KV heads, of which `largest` may be gathered together, are not grouped so; empty where they may be."""
        least = -(-heads // largest)
        if len(self.numbers) == 1:
            if least <= self.numbers[0] <= heads:
                return ""
            return f"{heads} KV heads, of which {largest} may be gathered together, make {least} to {heads} groups"
        if sum(self.numbers) == heads == largest:
            return ""
        return f"of {heads} KV heads, {largest} may be gathered together: expected all {sum(self.numbers)} of the groups"

    def groups(self, heads: int) -> Groups:
        if len(self.numbers) == 1:
            equal = Pass.each(equal_groups(heads, self.numbers[0]))
            return Groups(equal, equal)
        first, middle, last = self.numbers
        return Groups(Pass.between(first, middle + last, 0), Pass.between(first, middle, last))


def weft_ways(
    workload: Workload,
    parallel: weft.ContextParallel,
    batch: ShardedBatch,
    own: Tensors,
    whole: Tensors,
    own_oracle: Oracle | None,
    whole_oracle: Oracle | None,
    groupings: Sequence[Grouping] = (),
) -> list[Way]:
    """Weft first, then its parts.

    Args:
        batch: the workload as this rank sees it.
        groupings: groups of KV heads to try beside what Weft chooses, none with an obstacle.
        own, own_oracle: tensors of this rank's tokens, in its order; whole, whole_oracle: of the whole batch.
    """
    cu_seqlens, ranks = workload.cu_seqlens, Ranks.of()
    # Built once, as a batch's plans are for all of its layers.
    plan, whole_plan = parallel.plan(cu_seqlens, causal=True), weft.Plan.from_cu_seqlens(cu_seqlens, cu_seqlens, causal=True)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _only(parallel.attention(q, k, v, cu_seqlens, causal=True))

    def attend_gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _only(weft.plan_attention(q, k, v, plan))

    def attend_in_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ranks.meet(q.device)
        return attend_gathered(q, k, v)

    def attend_whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _only(weft.plan_attention(q, k, v, whole_plan))

    # One rank gathers nothing: its call is a launch and no more.
    is_whole = workload.world_size > 1
    where = (
        "keys are gathered into symmetric memory, which the peak leaves out" if is_whole and parallel.symmetric_memory else ""
    )
    ways = [Way(WEFT, attend, own, own_oracle, is_whole=is_whole, note=where)]
    here = Tensors(own.q, (gathered_keys_and_values(batch, whole),), own.dout)
    note = "one launch of all heads on gathered keys and values; dK and dV are this rank's part of the sum"
    ways.append(Way(KERNELS, attend_gathered, here, own_oracle, compared=("out", "dq"), note=note))
    if is_whole:
        note = "the same launch once all ranks have come to it, by a sum of one number over them"
        ways.append(Way(IN_STEP, attend_in_step, here, own_oracle, compared=("out", "dq"), note=note))
        for grouping in groupings:
            groups = grouping.groups(workload.model.kv_heads)
            note = "; ".join(filter(None, ("these groups of KV heads, whatever `distributed/groups.py` says", where)))
            around = partial(in_groups, groups)
            ways.append(Way(grouping.way, attend, own, own_oracle, around=around, is_whole=True, note=note))
        note = "the same gathers, reduce-scatters and copies around kernels that do nothing: no result to check"
        ways.append(Way(COMMUNICATION, attend, own, None, around=without_kernels, note=note))
    note = "every GPU does the whole batch for itself; its time over the ranks, the mean of the GPUs"
    ways.append(Way(IDEAL, attend_whole, whole, whole_oracle, note=note))
    return ways


def without_kernels() -> contextlib.AbstractContextManager[None]:
    """Inside, context parallelism does everything but compute."""
    return _exchanged(gathered, attention_into=_nothing, begin_backward=_begin_nothing)


@contextlib.contextmanager
def watched_launches(device: torch.device) -> Iterator[list[tuple[Moment, Moment]]]:
    """Inside, the attention launches of context parallelism on this rank are noted: when each began and ended."""
    seen: list[tuple[Moment, Moment]] = []

    def watched(launch: Callable[..., object]) -> Callable[..., Any]:
        def run(*arguments: object) -> object:
            first = now(device)
            result = launch(*arguments)
            seen.append((first, now(device)))
            return result

        return run

    attend, begin = (watched(getattr(gathered, name)) for name in ("attention_into", "begin_backward"))

    def begin_watched(*arguments: object) -> Backward:
        return Backward(*map(watched, begin(*arguments)))

    with _exchanged(gathered, attention_into=attend, begin_backward=begin_watched):
        yield seen


def in_groups(groups: Groups) -> contextlib.AbstractContextManager[None]:
    """Inside, context parallelism goes through KV heads in these groups."""
    # Late: it brings torch._dynamo and Triton along, which a command that only lists its options does without.
    from weft_attn.distributed import context_parallel

    def chosen(*_arguments: object) -> Groups:
        return groups

    return _exchanged(context_parallel, head_groups=chosen)


@contextlib.contextmanager
def _exchanged(module: ModuleType, **functions: Callable[..., object]) -> Iterator[None]:
    """Inside, the module has these functions in place of its own."""
    # By hand: it is timed, and a mock takes the host longer than a small collective.
    own = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in own.items():
            setattr(module, name, function)


def gathered_keys_and_values(batch: ShardedBatch, whole: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch's keys and values as a gather of all heads leaves them: views (W * rank_stride, Hkv, D) of one buffer."""
    rows = batch.layout.world_size * batch.rank_stride
    both = torch.cat([whole.k.flatten(1), whole.v.flatten(1)], dim=1)
    buffer = both.new_zeros(rows, both.shape[1]).index_copy_(0, batch.on(both.device, "gathered_rows"), both)
    return gathered.keys_beside_values(buffer, whole.k.shape[2], whole.v.shape[2])


def _nothing(*_arguments: object) -> None:
    pass


def _begin_nothing(*_arguments: object) -> Backward:
    return Backward(_nothing, _nothing)


def _only(result: object) -> torch.Tensor:
    assert isinstance(result, torch.Tensor)
    return result
