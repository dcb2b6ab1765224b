"""Gathered keys in symmetric memory, registered with a group's NCCL communicator.

NCCL reads and writes such memory in place. Where the group was made with NCCL_CTA_POLICY_ZERO it has the GPUs' copy engines gather, which
takes no multiprocessors from attention (docs/adr/0038); otherwise kernels of its own do. Registering is collective: every rank asks for the
same sizes in the same order. What is registered stays as long as its group, for no rank knows when the others have done with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from weft_attn.distributed.collectives import Ranks
from weft_attn.errors import Unsupported

# Where a tensor begins in a window, in bytes: more than any access asks for.
ALIGNMENT = 512


class Windows:
    """Room for what the ranks of a group gather, one window for each stream.

    A window that is too small is replaced by one of twice its size, or as large as needed, and kept as well: other ranks may be writing into
    it. So windows take as much as is asked for where sizes stay the same, and at most four times as much where they grow.

    Attributes:
        takes_multiprocessors: whether gathers run on multiprocessors, as far as the group's options say.
    """

    def __init__(self, group_name: Any, takes_multiprocessors: bool) -> None:
        # No reference to the group, which keeps this alive, not the other way round.
        self._group_name = group_name
        self.takes_multiprocessors = takes_multiprocessors
        self._windows: dict[tuple[torch.device, int], list[torch.Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Windows:
        """The same: a window belongs to the group."""
        return self

    def take(self, counts: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """One-dimensional tensors of so many elements each, in this stream's window: what lay there before is overwritten in its order.

        Collective where the stream has no window of that size yet.

        Raises:
            Unsupported: a CUDA graph is being captured.
        """
        starts, end = [], 0
        for count in counts:
            starts.append(end)
            end += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        held = self._windows.setdefault((device, self._stream(device)), [])
        if not held or len(held[-1]) < end:
            held.append(self._register(max(end, 2 * len(held[-1])) if held else max(end, ALIGNMENT), device))
        return [
            held[-1][start : start + count * dtype.itemsize].view(dtype) for start, count in zip(starts, counts, strict=True)
        ]

    def _stream(self, device: torch.device) -> int:
        if torch.cuda.is_current_stream_capturing():
            raise Unsupported(
                "gathers into symmetric memory are not captured: expected no CUDA graph, given one being captured"
            )
        return torch.cuda.current_stream(device).cuda_stream

    def _register(self, n_bytes: int, device: torch.device) -> torch.Tensor:
        import torch.distributed._symmetric_memory as symmetric

        window = symmetric.empty(n_bytes, dtype=torch.uint8, device=device)
        symmetric.rendezvous(window, group=self._group_name)
        return window


_OF_GROUPS: WeakKeyDictionary[Any, Windows] = WeakKeyDictionary()


def windows_of(ranks: Ranks) -> Windows:
    """The windows of a group, the same for all that use it, until the group is gone; collective where it has none yet.

    Raises:
        Unsupported: a group without NCCL, or a PyTorch without symmetric memory for it.
    """
    backend = "none, of one rank" if ranks.group is None else dist.get_backend(ranks.group)
    if "nccl" not in backend:
        raise Unsupported(
            f"symmetric memory is NCCL's: expected a group of several GPUs over NCCL, given the backend {backend}"
        )
    if ranks.group not in _OF_GROUPS:
        _enable()
        # A window cannot be registered as the first thing that a group does (pytorch/pytorch#188567).
        ranks.meet(ranks.control_device)
        _OF_GROUPS[ranks.group] = Windows(ranks.group.group_name, takes_multiprocessors(ranks.group))
    return _OF_GROUPS[ranks.group]


def _enable() -> None:
    try:
        import torch.distributed._symmetric_memory as symmetric

        if symmetric.get_backend(torch.device("cuda")) != "NCCL":
            symmetric.set_backend("NCCL")
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Unsupported(
            f"symmetric memory of NCCL: expected a PyTorch that has it (2.11 or newer), given {torch.__version__}: {error}"
        ) from error


def takes_multiprocessors(group: Any) -> bool:
    """Whether a group's gathers of symmetric memory run on multiprocessors, as far as its options say."""
    zero = getattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO", None)
    options = getattr(group._get_backend(torch.device("cuda")), "options", None)
    policy = getattr(getattr(options, "config", None), "cta_policy", None)
    return zero is None or policy != zero
