"""Attention over the keys of all ranks, gathered a group of KV heads at a time, and its gradients scattered back.

    forward     gather later heads  |  attention on a group
    backward    gather later heads  |  gradients of a group  |  reduce-scatter earlier ones

What a backward needs before keys and what its dq needs after them (`begin_backward`) run beside its first gather and its last
reduce-scatter, which nothing else hides.

K lies beside V in one buffer (W * rank_stride, G * (D + Dv)) for the G heads of a collective, in place. Attention reads both as strided
views of it, in rank order: nothing is copied or reordered. Rows between a rank's last and its stride are padding: they hold
whatever memory held, and no slice of the plan reaches them.

Every collective has a buffer of its own where memory allows (memory.py), and all gathers are queued before the first attention. A collective
that becomes ready while other kernels run waits for their multiprocessors, so the first gather gets a head start before the copies for the
second one, that one before the first attention, and a reduce-scatter before what follows it; gathers that take no multiprocessors
(symmetric.py) need none. Otherwise two buffers take turns, and memory between a backward's launches is of one group at a time. Which heads
are attended to together, gathered and reduced: groups.py.

On a GPU the order of the compute stream keeps buffers that take turns apart: a collective starts after what was queued before it, and
what is queued after its `wait` starts after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch

from weft_attn.distributed.collectives import Pending, Ranks
from weft_attn.distributed.groups import Groups, Pass
from weft_attn.distributed.symmetric import Windows
from weft_attn.errors import Unsupported
from weft_attn.ops import Backward, attention_into, begin_backward
from weft_attn.plan.slices import Plan


@dataclass(frozen=True)
class Call:
    """Everything that a call is but its tensors.

    Attributes:
        plan: this rank's rows over the keys of all ranks, rank r's from row r * rank_stride.
        groups: of KV heads, of both passes.
        largest, in_turn: of `Memory`.
        keep_gathered: keep the gathered keys and values for the backward, instead of gathering again.
        grad_reduce_dtype: what partial gradients of keys and values are kept and summed in.
        windows: where gathered keys lie, if not in ordinary memory.
    """

    plan: Plan
    ranks: Ranks
    rank_stride: int
    groups: Groups
    largest: int
    in_turn: int | None
    softmax_scale: float
    softcap: float
    deterministic: bool
    keep_gathered: bool
    grad_reduce_dtype: torch.dtype
    windows: Windows | None = None


def gathered_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (T_local, Hq, Dv) and lse (Hq, T_local); collective, forward and backward; sinks float32 or None."""
    result: tuple[torch.Tensor, torch.Tensor] = _GatheredAttention.apply(q, k, v, sinks, call)  # type: ignore[no-untyped-call]
    return result


# ---- buffers --------------------------------------------------------------------------------------------------------------


def keys_beside_values(buffer: torch.Tensor, head_dim: int, head_dim_v: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, G, D) and (rows, G, Dv) views of (rows, G * (D + Dv)): the keys of all heads, then their values."""
    heads = buffer.shape[1] // (head_dim + head_dim_v)
    k, v = buffer.split([heads * head_dim, heads * head_dim_v], dim=1)
    return k.unflatten(1, (heads, head_dim)), v.unflatten(1, (heads, head_dim_v))


def heads_within(views: tuple[torch.Tensor, torch.Tensor], held: slice, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (rows, heads, D) and (rows, heads, Dv) of some of the heads that a buffer holds."""
    k, v = (x[:, heads.start - held.start : heads.stop - held.start] for x in views)
    return k, v


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy (rows, heads, dims) of one dtype, where both allow it in elements of 8 bytes: strided ones of 2 bytes take twice as long."""
    if _lies_in_words(target) and _lies_in_words(source):
        target, source = target.view(torch.int64), source.view(torch.int64)
    target.copy_(source)


def _lies_in_words(x: torch.Tensor) -> bool:
    """Whether each (row, head) is whole words of 8 bytes, at addresses that are multiples of 8."""
    each = torch.int64.itemsize // x.element_size()
    places = (x.shape[2], x.storage_offset(), *x.stride()[:2])
    return x.stride(2) == 1 and x.data_ptr() % torch.int64.itemsize == 0 and all(place % each == 0 for place in places)


def _ordinary_memory(counts: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    return [torch.empty(count, dtype=dtype, device=device) for count in counts]


class _Turns:
    """Buffers (rows, G * (D + Dv)) for the heads of one collective after another.

    Args:
        held: heads of each.
        in_turn: how many there are, of `largest` heads: one is taken again so many collectives later. None: one for each.
        take: what gives one-dimensional tensors of so many elements each.
    """

    def __init__(
        self,
        rows: int,
        k: torch.Tensor,
        v: torch.Tensor,
        held: tuple[slice, ...],
        largest: int,
        in_turn: int | None,
        dtype: torch.dtype,
        take: Callable[[Sequence[int], torch.dtype, torch.device], list[torch.Tensor]] = _ordinary_memory,
    ) -> None:
        self.dims = (k.shape[2], v.shape[2])
        self.widths = [(heads.stop - heads.start) * sum(self.dims) for heads in held]
        self.rows = rows
        widths = self.widths if in_turn is None else [largest * sum(self.dims)] * in_turn
        self.memory = take([rows * width for width in widths], dtype, k.device)

    def buffer(self, at: int) -> torch.Tensor:
        width = self.widths[at]
        return self.memory[at % len(self.memory)][: self.rows * width].view(self.rows, width)

    def views(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        return keys_beside_values(self.buffer(at), *self.dims)


class _Gather:
    """The keys and values of all ranks, some heads at a time."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, call: Call, groups: Pass, in_turn: int | None) -> None:
        self.k, self.v, self.call, self.groups = k, v, call, groups
        rows = call.ranks.world_size * call.rank_stride
        take = _ordinary_memory if call.windows is None else partial(call.windows.take, ranks=call.ranks)
        self.turns = _Turns(rows, k, v, groups.gathers, call.largest, in_turn, k.dtype, take)
        self.pending: dict[int, Pending] = {}
        # Memory of this call alone is kept by what is under way; a window is taken again by the next call.
        self.under_way = [] if call.windows is None else call.windows.under_way
        self.start(0)
        if len(self.turns.memory) > 1:
            self._let_start()
        for at in range(1, len(self.turns.memory)):
            self.start(at)

    def start(self, at: int) -> None:
        """Start the gather of this number, if there is one."""
        if at < len(self.groups.gathers):
            buffer = self.turns.buffer(at)
            own = keys_beside_values(self.call.ranks.own_rows(buffer), *self.turns.dims)
            for place, x in zip(own, (self.k, self.v), strict=True):
                copy_rows(place[: len(x)], x[:, self.groups.gathers[at]])
            self.pending[at] = self.call.ranks.all_gather(buffer)
            self.under_way.append(self.pending[at])

    def wait(self, group: int) -> None:
        """Until a group's keys and values are there; starts the gather whose turn it is to have the buffer of the group before.

        Buffers take turns by groups: where gathers are of several groups, each has its own, and none is left to start.
        """
        if group > 0:
            self.start(group - 1 + len(self.turns.memory))
        at = self.groups.gather_of(group)
        if at in self.pending:
            pending = self.pending.pop(at)
            pending.wait()
            self.under_way.remove(pending)
            if self.pending and at == 0:
                self._let_start()

    def _let_start(self) -> None:
        if self.call.windows is None or self.call.windows.takes_multiprocessors:
            self.call.ranks.let_start(self.k.device)

    def views(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a group's keys and values are once they are waited for."""
        at = self.groups.gather_of(group)
        return heads_within(self.turns.views(at), self.groups.gathers[at], self.groups.attention[group])


class _Kept:
    """The keys and values that the forward kept, by the groups of the backward, as `_Gather` gives them."""

    def __init__(self, buffers: list[torch.Tensor], dims: tuple[int, int], groups: Pass) -> None:
        self.buffers, self.dims, self.groups = buffers, dims, groups

    def wait(self, group: int) -> None:
        """They are there."""

    def views(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = self.groups.gather_of(group)
        views = keys_beside_values(self.buffers[at], *self.dims)
        return heads_within(views, self.groups.gathers[at], self.groups.attention[group])


class _Reduce:
    """Partial gradients of all ranks' keys and values, some heads at a time, summed over ranks into this rank's own."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, call: Call) -> None:
        self.call, self.groups = call, call.groups.backward
        self.dk, self.dv = k.new_empty(k.shape), v.new_empty(v.shape)
        stride, turns = call.rank_stride, (self.groups.reduces, call.largest, call.in_turn, call.grad_reduce_dtype)
        self.partial = _Turns(call.ranks.world_size * stride, k, v, *turns)
        self.sums = _Turns(stride, k, v, *turns)
        self.pending: dict[int, Pending] = {}

    def make_room(self, group: int) -> None:
        """Finish the reduce-scatter that had a group's buffer before."""
        self.finish(self.groups.reduce_of(group) - len(self.partial.memory))

    def views(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a group's dK and dV of all ranks' keys go."""
        at = self.groups.reduce_of(group)
        return heads_within(self.partial.views(at), self.groups.reduces[at], self.groups.attention[group])

    def start(self, group: int) -> None:
        """Start the reduce-scatter that a group is the last of."""
        if self.groups.ends_reduce(group):
            at = self.groups.reduce_of(group)
            self.pending[at] = self.call.ranks.reduce_scatter(self.sums.buffer(at), self.partial.buffer(at))
            # Before the next group's launch, or what dq still needs, if it needs anything.
            self.call.ranks.let_start(self.dk.device)

    def finish(self, at: int) -> None:
        """Wait for the sums of this number, if they are under way, and put them with those of the other heads."""
        if at in self.pending:
            self.pending.pop(at).wait()
            heads = self.groups.reduces[at]
            for whole, summed in zip((self.dk, self.dv), self.sums.views(at), strict=True):
                whole[:, heads].copy_(summed[: len(whole)])


# ---- autograd -------------------------------------------------------------------------------------------------------------


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups, share = call.groups.forward, q.shape[1] // k.shape[1]
        gather = _Gather(k, v, call, groups, None if call.keep_gathered else call.in_turn)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        for group, heads in enumerate(groups.attention):
            gather.wait(group)
            queries = query_heads(heads, share)
            attention_into(
                q[:, queries],
                *gather.views(group),
                None if sinks is None else sinks[queries],
                call.plan,
                call.softmax_scale,
                call.softcap,
                call.deterministic,
                out[:, queries],
                lse[queries],
            )
        kept = [gather.turns.buffer(at) for at in range(len(groups.gathers))] if call.keep_gathered else []
        ctx.save_for_backward(q, k, v, sinks, out, lse, *kept)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            grads = _GatheredAttention._gradients(ctx, dout, dlse)
        # With gradients enabled (create_graph=True) a second derivative may follow.
        if not torch.is_grad_enabled():
            return grads
        found: tuple[torch.Tensor | None, ...] = _Once.apply(torch.empty(0, requires_grad=True), *grads)  # type: ignore[no-untyped-call]
        return found

    @staticmethod
    def _gradients(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse, *kept = ctx.saved_tensors
        call: Call = ctx.call
        needs_q, needs_k, needs_v, needs_sinks, _ = ctx.needs_input_grad
        groups, share = call.groups.backward, q.shape[1] // k.shape[1]
        source = _Kept(kept, (k.shape[2], v.shape[2]), groups) if kept else _Gather(k, v, call, groups, call.in_turn)
        reduce = _Reduce(k, v, call) if needs_k or needs_v else None
        dout = torch.zeros_like(out) if dout is None else dout
        dq = q.new_empty(q.shape) if needs_q else None
        dsinks = torch.empty_like(sinks) if needs_sinks else None

        def begin(group: int) -> Backward:
            queries = query_heads(groups.attention[group], share)
            return begin_backward(
                dout[:, queries],
                None if dlse is None else dlse[queries],
                q[:, queries],
                *source.views(group),
                None if sinks is None else sinks[queries],
                out[:, queries],
                lse[queries],
                call.plan,
                call.softmax_scale,
                call.softcap,
                call.deterministic,
                None if dq is None else dq[:, queries],
                *((None, None) if reduce is None else reduce.views(group)),
            )

        def finish(group: int, backward: Backward) -> None:
            sinks_part = backward.finish()
            if dsinks is not None and sinks_part is not None:
                dsinks[query_heads(groups.attention[group], share)] = sinks_part

        at_once = call.in_turn is None
        begun = {group: begin(group) for group in range(len(groups.attention)) if at_once}
        for group in range(len(groups.attention)):
            source.wait(group)
            if reduce is not None:
                reduce.make_room(group)
            if not at_once:
                begun[group] = begin(group)
            begun[group].multiply()
            if reduce is not None:
                reduce.start(group)
            if not at_once:
                finish(group, begun.pop(group))
        for group in list(begun):
            # Its sums go back as soon as they are read.
            finish(group, begun.pop(group))
        if reduce is not None:
            # As late as that, so that the sums over ranks run beside the gradients of the groups that follow.
            for at in range(len(groups.reduces)):
                reduce.finish(at)
        return (
            dq,
            reduce.dk if reduce is not None and needs_k else None,
            reduce.dv if reduce is not None and needs_v else None,
            dsinks,
            None,
        )


class _Once(torch.autograd.Function):
    """Gradients as they are, which cannot be differentiated again.

    PyTorch's own `once_differentiable` says so only where the incoming gradients carry a graph; it would leave a penalty on a
    gradient of q, k or v out without a word.

    Args of `apply`: a tensor that requires a gradient, so that the results do; the gradients.
    """

    @staticmethod
    def forward(ctx: Any, _asks: torch.Tensor, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # noqa: ARG004
        return grads

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor | None) -> NoReturn:  # noqa: ARG004
        raise Unsupported("attention is differentiated once: expected a first derivative, given a second one")


def query_heads(kv_heads: slice, share: int) -> slice:
    """The query heads that share these KV heads, `share` each."""
    return slice(kv_heads.start * share, kv_heads.stop * share)
