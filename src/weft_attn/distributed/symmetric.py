"""Gathered keys in symmetric memory, registered with a group's NCCL communicator.

NCCL reads and writes such memory in place. Where the group was made with NCCL_CTA_POLICY_ZERO it has the GPUs' copy engines gather, which
takes no multiprocessors from attention (docs/adr/0038); otherwise kernels of its own do. What is registered stays as long as its group, for
no rank knows when the others have done with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from weft_attn.distributed.collectives import Pending, Ranks
from weft_attn.errors import Unsupported

# Where a tensor begins in a window, in bytes: more than any access asks for.
ALIGNMENT = 512


class Windows:
    """Room for what the ranks of a group gather, one window for each device.

    A window that is too small is replaced by one of twice its size, or as large as needed, and kept as well: other ranks may be writing into
    it. So windows take as much as is asked for where sizes stay the same, and at most four times as much where they grow.

    Attributes:
        takes_multiprocessors: whether gathers run on multiprocessors, as far as the group's options say.
        under_way: gathers into windows that nobody has waited for.
    """

    def __init__(self, takes_multiprocessors: bool) -> None:
        self.takes_multiprocessors = takes_multiprocessors
        self.under_way: list[Pending] = []
        self._windows: dict[torch.device, list[torch.Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Windows:
        """The same: a window belongs to the group."""
        return self

    def require_gpu(self, device: torch.device) -> None:
        """Raises: Unsupported: tensors that are on no GPU."""
        if device.type != "cuda":
            raise Unsupported(f"symmetric memory is a GPU's: expected CUDA tensors, given {device.type!r}")

    def require_no_capture(self) -> None:
        """A window may grow in any call, which a CUDA graph cannot.

        Raises:
            Unsupported: one is being captured.
        """
        if torch.cuda.is_current_stream_capturing():
            raise Unsupported(
                "gathers into symmetric memory are not captured: expected no CUDA graph, given one being captured"
            )

    def take(self, counts: Sequence[int], dtype: torch.dtype, device: torch.device, ranks: Ranks) -> list[torch.Tensor]:
        """One-dimensional tensors of so many elements each, in this device's window: what lay there before is overwritten.

        Collective where the window is too small, or the first: every rank asks for the same sizes in the same order.

        Raises:
            Unsupported: as `require_gpu` and `require_no_capture`.
            RuntimeError: a rank has no room for the window; on all of them.
        """
        self.require_gpu(device)
        self.require_no_capture()
        starts, end = [], 0
        for count in counts:
            starts.append(end)
            end += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        held = self._windows.setdefault(device, [])
        # Tensors that are made in inference mode, of other memory or of this, could not be saved for a backward later.
        with torch.inference_mode(False):
            if not held or len(held[-1]) < end:
                held.append(self._register(max(end, 2 * len(held[-1]) if held else ALIGNMENT), device, ranks))
            # Those of a call that failed: they would be written over what the next one puts there.
            while self.under_way:
                self.under_way.pop().wait()
            self._succeed(device)
            sizes = (count * dtype.itemsize for count in counts)
            return [held[-1][start : start + size].view(dtype) for start, size in zip(starts, sizes, strict=True)]

    def _succeed(self, device: torch.device) -> None:
        """Where another stream had the window last, the current one waits for the kernels that it was given, which may still read there."""
        stream = torch.cuda.current_stream(device)
        last = self._streams.get(device, stream)
        if last != stream:
            stream.wait_stream(last)
        self._streams[device] = stream

    def _register(self, n_bytes: int, device: torch.device, ranks: Ranks) -> torch.Tensor:
        window, failure = None, None
        try:
            require_backend()
            window = _allocate(n_bytes, device)
        except (RuntimeError, Unsupported) as error:
            failure = error
        # A rank that waits for others in the registration waits on the host, without a limit: none begins it unless all can. And nothing can be
        # registered as the first collective of a group (pytorch/pytorch#188567).
        is_everywhere = ranks.holds_everywhere(window is not None, device)
        if window is None or not is_everywhere:
            lacking = "none on another rank" if failure is None else f"none on this one: {failure}"
            raise RuntimeError(f"symmetric memory: expected {n_bytes:,} bytes on every rank, given {lacking}") from failure
        ranks.register(window)
        return window


def _allocate(n_bytes: int, device: torch.device) -> torch.Tensor:
    import torch.distributed._symmetric_memory as symmetric

    try:
        return symmetric.empty(n_bytes, dtype=torch.uint8, device=device)
    except RuntimeError:
        # NCCL's allocator does not ask PyTorch's for what that keeps for later.
        torch.cuda.empty_cache()
        return symmetric.empty(n_bytes, dtype=torch.uint8, device=device)


_OF_GROUPS: WeakKeyDictionary[Any, Windows] = WeakKeyDictionary()


def windows_of(ranks: Ranks) -> Windows:
    """The windows of a group, the same for all that use it, until the group is gone.

    Raises:
        Unsupported: a group whose GPUs do not communicate over NCCL, or a PyTorch without symmetric memory for it.
    """
    backends = dist.get_backend_config(ranks.group)
    if "cuda:nccl" not in backends.split(","):
        raise Unsupported(f"symmetric memory is NCCL's: expected a group whose GPUs use NCCL, given {backends!r}")
    require_backend()
    if ranks.group not in _OF_GROUPS:
        _OF_GROUPS[ranks.group] = Windows(takes_multiprocessors(ranks.group))
    return _OF_GROUPS[ranks.group]


def require_backend() -> None:
    """Have PyTorch take symmetric memory from NCCL, in this process as a whole.

    Raises:
        Unsupported: a PyTorch that cannot, or a process that takes it from elsewhere.
    """
    try:
        import torch.distributed._symmetric_memory as symmetric

        found, choose = symmetric.get_backend(torch.device("cuda")), symmetric.set_backend
    except (ImportError, AttributeError) as error:
        raise Unsupported(f"symmetric memory: expected PyTorch 2.11 or newer, given {torch.__version__}") from error
    if found == "NCCL":
        return
    try:
        choose("NCCL")
    except RuntimeError as error:
        raise Unsupported(
            f"PyTorch takes all symmetric memory of a process from one place: expected NCCL, given {found}, {error}"
        ) from error


def takes_multiprocessors(group: Any) -> bool:
    """Whether a group's gathers of symmetric memory run on multiprocessors, as far as its options say."""
    zero = getattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO", None)
    options = getattr(group._get_backend(torch.device("cuda")), "options", None)
    policy = getattr(getattr(options, "config", None), "cta_policy", None)
    # Policies are bits, of which this one wins.
    return not (zero and policy and policy & zero)
