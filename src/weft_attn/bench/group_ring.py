"""A zigzag ring, as its users run it today: keys and values pass from rank to rank while attention runs on those that are there.

Rank r begins with its own keys, causal; then come those of ranks r-1, r-2, ... Of a lower rank's keys, all of r's rows see the
early chunks and none sees the late ones; of a higher rank's keys, only r's late rows see them, all of them. Partial outputs are
merged by their log-sum-exp in float32. In the backward, gradients of keys and values follow them round the ring in float32.
Attention is FlashAttention-2 as PyTorch ships it: no rounding but its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from weft_attn.bench.group_peers import IntArray, needs_flash, rank_halves
from weft_attn.bench.group_ways import Attend
from weft_attn.bench.workload import Workload
from weft_attn.distributed.shard import ShardedBatch
from weft_attn.plan.build import concat_lengths


@dataclass(frozen=True)
class Step:
    """What a rank does with the keys that are there.

    Attributes:
        rows, keys: which of its rows see which of those keys; None: all.
        cu_rows, cu_keys: (documents + 1,) int32 on the device, of those; longest_row, longest_key: their longest documents.
        causal: the rank's own keys; otherwise every row sees every key of its document.
    """

    rows: torch.Tensor | None
    keys: torch.Tensor | None
    cu_rows: torch.Tensor
    cu_keys: torch.Tensor
    longest_rows: int
    longest_keys: int
    causal: bool


class ZigzagRing:
    """See the module."""

    name = "zigzag-ring-flash"
    note = "keys and values pass round the ranks; outputs merged by log-sum-exp; gradients pass round in float32"

    def supports(self, workload: Workload, device: torch.device, /) -> str | None:
        if workload.world_size == 1:
            return "a ring has two ranks"
        return needs_flash(workload, device)

    def prepare(self, batch: ShardedBatch, device: torch.device, /) -> Attend:
        steps = ring_steps(batch, device)
        return lambda q, k, v: _Ring.apply(q, k, v, steps)  # type: ignore[no-untyped-call]


def ring_steps(batch: ShardedBatch, device: torch.device) -> list[Step]:
    """What a rank does with its own keys, then with those of the rank before it, and so on round the ring."""
    early, late = rank_halves(batch, device)
    # Every rank has as many rows of every document, half of them early.
    half = np.diff(early.cu_rows)

    def step(rows: torch.Tensor | None, keys: torch.Tensor | None, *, causal: bool = False) -> Step:
        lengths: list[IntArray] = [half if part is not None else 2 * half for part in (rows, keys)]
        cu_rows, cu_keys = (torch.from_numpy(concat_lengths(one.tolist())).to(device, torch.int32) for one in lengths)
        longest = [int(one.max(initial=0)) for one in lengths]
        return Step(rows, keys, cu_rows, cu_keys, longest[0], longest[1], causal)

    lower, higher = step(None, early.rows), step(late.rows, None)
    world_size = batch.layout.world_size
    return [step(None, None, causal=True), *(lower if s <= batch.rank else higher for s in range(1, world_size))]


# ---- FlashAttention-2's operators -----------------------------------------------------------------------------------------

Forward = tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]]


def flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Forward:
    """out (T, Hq, D), lse (Hq, T) float32, and what the backward wants of the operator besides."""
    out, lse, *rest = torch.ops.aten._flash_attention_forward(
        q, k, v, step.cu_rows, step.cu_keys, step.longest_rows, step.longest_keys, 0.0, step.causal, False
    )
    return out, lse, rest[:2]


def flash_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    step: Step,
    rest: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v of one step, under the whole ring's out and lse."""
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, step.cu_rows, step.cu_keys, step.longest_rows, step.longest_keys, 0.0, step.causal, *rest
    )
    return dq, dk, dv


# ---- the ring -------------------------------------------------------------------------------------------------------------


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, steps: list[Step]) -> torch.Tensor:
        own = torch.stack([k, v], dim=1)
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
        kv = own
        rest: Sequence[torch.Tensor] = ()
        for index, step in enumerate(steps):
            passed = _pass_on(kv) if index + 1 < len(steps) else None
            keys, values = _part(kv, step.keys).unbind(dim=1)
            block, block_lse, rest = flash_forward(_part(q, step.rows), keys, values, step)
            _merge(out, lse, block, block_lse, step.rows)
            if passed is not None:
                kv = passed.wait()
        rounded = out.to(q.dtype)
        ctx.save_for_backward(q, own, rounded, lse, *rest)
        ctx.steps = steps
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, kv, out, lse, *rest = ctx.saved_tensors
        dtype = kv.dtype
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dkv = torch.zeros(kv.shape, dtype=torch.float32, device=q.device)
        returned = None
        for index, step in enumerate(ctx.steps):
            passed = _pass_on(kv) if index + 1 < len(ctx.steps) else None
            keys, values = _part(kv, step.keys).unbind(dim=1)
            own_dout, own_q, own_out, own_lse = (_part(x, step.rows) for x in (dout, q, out, lse))
            dq_block, dk, dv = flash_backward(own_dout, own_q, keys, values, own_out, own_lse.T.contiguous(), step, rest)
            _add(dq, step.rows, dq_block)
            # Gradients of these keys come from the rank that had them before.
            dkv = dkv if returned is None else returned.wait()
            _add(dkv, step.keys, torch.stack([dk, dv], dim=1))
            if passed is not None:
                kv = passed.wait()
            returned = _pass_on(dkv)
        assert returned is not None
        dk, dv = returned.wait().to(dtype).unbind(dim=1)
        return dq.to(q.dtype), dk, dv, None


def _part(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return x if index is None else x.index_select(0, index)


def _add(total: torch.Tensor, index: torch.Tensor | None, part: torch.Tensor) -> None:
    if index is None:
        total += part
    else:
        total.index_add_(0, index, part.to(total.dtype))


def _merge(
    out: torch.Tensor, lse: torch.Tensor, block: torch.Tensor, block_lse: torch.Tensor, rows: torch.Tensor | None
) -> None:
    """Merge a block (T, H, D) and its lse (H, T) into rows of out (T, H, D) and lse (T, H)."""
    before, new = _part(lse, rows), block_lse.T
    merged = torch.logaddexp(before, new)
    # A row that has seen no key has lse -inf on both sides.
    weights = [torch.exp(x - merged).nan_to_num(0.0)[..., None] for x in (before, new)]
    total = _part(out, rows) * weights[0] + block * weights[1]
    if rows is None:
        out.copy_(total)
        lse.copy_(merged)
    else:
        out.index_copy_(0, rows, total)
        lse.index_copy_(0, rows, merged)


@dataclass(frozen=True)
class _Passed:
    """A tensor on its way to the next rank, and the one that comes in its place; the sent one is kept until it has left."""

    sent: torch.Tensor
    received: torch.Tensor
    pending: Sequence[Any]

    def wait(self) -> torch.Tensor:
        for one in self.pending:
            one.wait()
        return self.received


def _pass_on(x: torch.Tensor) -> _Passed:
    """Start to send a tensor to the next rank and to receive the one of the rank before."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(x)
    send = dist.P2POp(dist.isend, x, (rank + 1) % world_size)
    receive = dist.P2POp(dist.irecv, received, (rank - 1) % world_size)
    return _Passed(x, received, dist.batch_isend_irecv([send, receive]))
