"""Context parallelism as its users write it today with what PyTorch ships, to measure Weft's beside it.

`allgather-2calls`: keys and values of all ranks are gathered at once, put back into sequence order, and attended to by two
launches of variable-length attention, one for a rank's early chunks on the documents' beginnings, one for its late ones. Autograd
adds the two launches' gradients up and reduces and scatters the sum, all in the inputs' dtype. It needs documents whose lengths
2 W divides. Twice: with FlashAttention-2 as PyTorch ships it, and with Weft's own kernels, which leaves only the difference that
the way of parallelism makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from weft_attn.errors import InvalidInput
from weft_attn.plan.build import concat_lengths

# Newer releases of torch have it under another name, and warn of the old one.
_all_gather = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd

IntArray = NDArray[np.int64]
# q, k, v, cu_seqlens_q, cu_seqlens_k -> out: causal, a document's last row aligned with its last key; packed (T, H, D).
Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, IntArray, IntArray], torch.Tensor]


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


class AllGatherTwoCalls:
    """See the module."""

    def __init__(self, name: str, varlen: Varlen, *, needs_cuda: bool) -> None:
        self.name, self._varlen, self._needs_cuda = name, varlen, needs_cuda
        self.note = "one gather, reordered; two launches; gradients added, reduced and scattered in the inputs' dtype"

    def supports(self, workload: Workload, device: torch.device, /) -> str | None:
        if workload.layout != "zigzag":
            return "it is written for the zigzag layout"
        if any(length % (2 * workload.world_size) for length in workload.lengths):
            return "it needs documents that 2 x ranks divides"
        if self._needs_cuda and device.type != "cuda":
            return "needs a CUDA device"
        return "takes 16-bit inputs only" if self._needs_cuda and workload.model.dtype_bits != 16 else None

    def prepare(self, batch: ShardedBatch, device: torch.device, /) -> Attend:
        halves = rank_halves(batch, device)
        # Every rank has as many rows: what it takes in the buffer is what it has.
        to_sequence = torch.from_numpy(batch.gathered_rows).to(device)
        group = dist.group.WORLD
        assert group is not None
        to_packed = torch.cat([half.rows for half in halves]).argsort()

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            kv = torch.stack([k, v], dim=1)
            gathered = _all_gather(kv, 0, group)
            in_sequence = functional.wait_tensor(gathered).index_select(0, to_sequence)
            outs = []
            for half in halves:
                k_half, v_half = in_sequence.index_select(0, half.keys).unbind(dim=1)
                outs.append(self._varlen(q.index_select(0, half.rows), k_half, v_half, half.cu_rows, half.cu_keys))
            return torch.cat(outs).index_select(0, to_packed)

        return attend


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


def _weft_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_rows: IntArray, cu_keys: IntArray) -> torch.Tensor:
    out = weft.varlen_attention(q, k, v, cu_rows, cu_keys, causal=True)
    assert isinstance(out, torch.Tensor)
    return out


class _FlashVarlen:
    """FlashAttention-2's operator, its cu_seqlens copied to the device once."""

    def __init__(self) -> None:
        self._on_device: dict[tuple[bytes, torch.device], torch.Tensor] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_rows: IntArray, cu_keys: IntArray) -> torch.Tensor:
        rows, keys = (self._copied(cu, q.device) for cu in (cu_rows, cu_keys))
        return peers.flash_varlen(q, k, v, rows, keys, int(np.diff(cu_rows).max()), int(np.diff(cu_keys).max()), True)

    def _copied(self, cu_seqlens: IntArray, device: torch.device) -> torch.Tensor:
        key = (cu_seqlens.tobytes(), device)
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(cu_seqlens).to(device, torch.int32)
        return self._on_device[key]


GROUP_PEERS: tuple[GroupPeer, ...] = (
    AllGatherTwoCalls("allgather-2calls-weft", _weft_varlen, needs_cuda=False),
    AllGatherTwoCalls("allgather-2calls-flash", _FlashVarlen(), needs_cuda=True),
)


def chosen_group_peers(wanted: Sequence[str] | None) -> list[GroupPeer]:
    """The peers of these names, None: all.

    Raises:
        InvalidInput: a name that is no peer's.
    """
    known = {peer.name: peer for peer in GROUP_PEERS}
    for name in wanted or ():
        if name not in known:
            raise InvalidInput(f"the peer is known: expected one of {sorted(known)}, given {name!r}")
    return [peer for name, peer in known.items() if wanted is None or name in wanted]
