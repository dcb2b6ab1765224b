"""Context parallelism as its users write it today with what PyTorch ships, to measure Weft's beside it.

`allgather-2calls`: keys and values of all ranks are gathered at once, put back into sequence order, and attended to by two
launches of variable-length attention, one for a rank's early chunks on the documents' beginnings, one for its late ones. Autograd
adds the two launches' gradients up and reduces and scatters the sum, all in the inputs' dtype. It needs documents whose lengths
2 W divides. Twice: with FlashAttention-2 as PyTorch ships it, and with Weft's own kernels, which leaves only the difference that
the way of parallelism makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import _functional_collectives as functional

import weft_attn as weft
from weft_attn.bench import peers
from weft_attn.bench.group_ways import Attend
from weft_attn.bench.workload import Workload
from weft_attn.distributed.shard import ShardedBatch
from weft_attn.plan.build import concat_lengths

# Newer releases of torch have it under another name, and warn of the old one.
_all_gather = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd

IntArray = NDArray[np.int64]


class GroupPeer(Protocol):
    """A way of context parallelism that is not Weft's."""

    name: str
    note: str

    def supports(self, workload: Workload, device: torch.device, /) -> str | None:
        """Why this peer cannot run the workload on the device, or None when it can; the same on every rank."""

    def prepare(self, batch: ShardedBatch, device: torch.device, /) -> Attend:
        """Attention of a rank's own rows: q, k, v as `ContextParallel.shard` orders them -> out."""


@dataclass(frozen=True)
class Half:
    """The early or the late chunks of a rank's documents.

    Attributes:
        rows: which of the rank's rows; keys: which keys in sequence order, the documents' beginnings up to the chunks' ends.
        cu_rows, cu_keys: (documents + 1,).
    """

    rows: torch.Tensor
    keys: torch.Tensor
    cu_rows: IntArray
    cu_keys: IntArray


# Causal attention of a half's rows to its keys, a document's last row aligned with its last key; packed (T, H, D).
HalfAttend = Callable[[Half, torch.device], Attend]


class AllGatherTwoCalls:
    """See the module."""

    def __init__(self, name: str, of_half: HalfAttend, *, needs_flash: bool) -> None:
        self.name, self._of_half, self._needs_flash = name, of_half, needs_flash
        self.note = "one gather, reordered; two launches; gradients added, reduced and scattered in the inputs' dtype"

    def supports(self, workload: Workload, device: torch.device, /) -> str | None:
        return needs_flash(workload, device) if self._needs_flash else needs_equal_shares(workload)

    def prepare(self, batch: ShardedBatch, device: torch.device, /) -> Attend:
        halves = [(half, self._of_half(half, device)) for half in rank_halves(batch, device)]
        # Every rank has as many rows: what it takes in the buffer is what it has.
        to_sequence = torch.from_numpy(batch.gathered_rows).to(device)
        group = dist.group.WORLD
        assert group is not None
        to_packed = torch.cat([half.rows for half, _ in halves]).argsort()

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            kv = torch.stack([k, v], dim=1)
            gathered = _all_gather(kv, 0, group)
            # Using it waits for it.
            in_sequence = gathered.index_select(0, to_sequence)
            outs = []
            for half, attend_half in halves:
                k_half, v_half = in_sequence.index_select(0, half.keys).unbind(dim=1)
                outs.append(attend_half(q.index_select(0, half.rows), k_half, v_half))
            return torch.cat(outs).index_select(0, to_packed)

        return attend


def needs_equal_shares(workload: Workload) -> str | None:
    """Why a peer whose chunks are all of one length cannot run a workload, or None."""
    if workload.layout != "zigzag":
        return "it is written for the zigzag layout"
    if any(length % (2 * workload.world_size) for length in workload.lengths):
        return "it needs documents that 2 x ranks divides"
    return None


def needs_flash(workload: Workload, device: torch.device) -> str | None:
    """Why a peer of equal chunks cannot run a workload on FlashAttention-2, or None."""
    if device.type != "cuda":
        return "needs a CUDA device"
    return "takes 16-bit inputs only" if workload.model.dtype_bits != 16 else needs_equal_shares(workload)


def rank_halves(batch: ShardedBatch, device: torch.device) -> tuple[Half, ...]:
    """The two halves of a rank's work under the zigzag layout."""
    layout, documents = batch.layout, batch.layout.cu_seqlens[:-1]

    def ranges(starts: IntArray, sizes: IntArray) -> torch.Tensor:
        found = [np.arange(start, start + size) for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *found])).to(device)

    halves = []
    for chunk in layout.owned_chunks(batch.rank):
        sizes, stops = layout.sizes[:, chunk], layout.starts[:, chunk] + layout.sizes[:, chunk]
        rows, keys = ranges(layout.local_starts[:, chunk], sizes), ranges(documents, stops)
        halves.append(Half(rows, keys, concat_lengths(sizes.tolist()), concat_lengths(stops.tolist())))
    return tuple(halves)


def weft_half(half: Half, _device: torch.device) -> Attend:
    """Weft's kernels on a plan that is built once."""
    plan = weft.Plan.from_cu_seqlens(half.cu_rows, half.cu_keys, causal=True)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = weft.plan_attention(q, k, v, plan)
        assert isinstance(out, torch.Tensor)
        return out

    return attend


def flash_half(half: Half, device: torch.device) -> Attend:
    """FlashAttention-2's operator, its cu_seqlens on the device already."""
    rows, keys = (torch.from_numpy(cu).to(device, torch.int32) for cu in (half.cu_rows, half.cu_keys))
    longest = int(np.diff(half.cu_rows).max()), int(np.diff(half.cu_keys).max())
    return lambda q, k, v: peers.flash_varlen(q, k, v, rows, keys, *longest, True)


TWO_CALLS: tuple[GroupPeer, ...] = (
    AllGatherTwoCalls("allgather-2calls-weft", weft_half, needs_flash=False),
    AllGatherTwoCalls("allgather-2calls-flash", flash_half, needs_flash=True),
)
