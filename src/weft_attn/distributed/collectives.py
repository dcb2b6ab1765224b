"""The ranks of a process group, and the only calls of torch.distributed's collectives.

Every collective is started and waited for by its caller, so that computation runs in between; a wait lasts at most the process
group's timeout, then torch raises. The calls are the same for NCCL and gloo: both gather in place and both reduce and scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from weft_attn.errors import InvalidInput, require

# Newer releases of torch have these under another name, and warn of the old one.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# A GPU's clock cycles that a collective needs to begin, with room: some 12 microseconds.
HEAD_START_CYCLES = 20_000


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> Any: ...


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a batch, and which of them this process is.

    Attributes:
        group: the process group; None where there is one rank, which needs none.
    """

    group: Any
    rank: int
    world_size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """The same: a copy of what holds it, as of a model, is on the same ranks."""
        return self

    def __reduce__(self) -> Any:
        if self.group is None:
            return Ranks, (None, self.rank, self.world_size)
        raise TypeError("a process group belongs to its process and cannot be pickled: make a ContextParallel in each process")

    @classmethod
    def of(cls, group: Any = None) -> Ranks:
        """Args: group: a process group, a device mesh of one dimension, or None: the default group, if there is one.

        Raises:
            InvalidInput: something else, a mesh of several dimensions, or a group that this process is not part of.
        """
        from torch.distributed.device_mesh import DeviceMesh

        if group is None:
            if not (dist.is_available() and dist.is_initialized()):
                return cls(None, 0, 1)
            group = dist.group.WORLD
        elif isinstance(group, DeviceMesh):
            require(
                group.ndim == 1,
                "a device mesh has one dimension",
                expected='one dimension of it, such as mesh["cp"]',
                given=f"{group.ndim} dimensions, {group.mesh_dim_names}",
            )
            if group.get_coordinate() is None:
                raise InvalidInput("this process is part of the group: expected one of the mesh's ranks, given another process")
            group = group.get_group()
        require(
            isinstance(group, dist.ProcessGroup),
            "group is a process group or a device mesh that this process is part of",
            expected="None, a ProcessGroup or a DeviceMesh",
            given=repr(group),
        )
        rank = dist.get_rank(group)
        if rank < 0:
            raise InvalidInput("this process is part of the group: expected one of its ranks, given another process")
        return cls(group, rank, dist.get_world_size(group))

    def require_current(self) -> None:
        """Refuse ranks that were counted before there was a process group: each process would take itself for the only one.

        Raises:
            InvalidInput: there is a default group of several ranks now.
        """
        if self.group is None and dist.is_available() and dist.is_initialized():
            require(
                dist.get_world_size() == 1,
                "a ContextParallel is made after init_process_group",
                expected=f"one of the {dist.get_world_size()} ranks, or of a group of this process alone",
                given="one of a single rank that was made before",
            )

    @property
    def control_device(self) -> torch.device:
        """Where the group exchanges small tensors that belong to no device: the CPU if it can, else this process's GPU."""
        backend = dist.get_backend(self.group)
        return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")

    def meet(self, device: torch.device) -> None:
        """Let no rank go on before all are here: on a GPU what its current stream is given next waits, not the host."""
        dist.all_reduce(torch.zeros(1, device=device), group=self.group)

    def holds_everywhere(self, holds: bool, device: torch.device) -> bool:
        """Whether something holds on every rank; collective, on this device, and the host waits."""
        failing = torch.full((1,), int(not holds), dtype=torch.int32, device=device)
        dist.all_reduce(failing, group=self.group)
        return failing.item() == 0

    def register(self, window: torch.Tensor) -> None:
        """Register symmetric memory with the group's communicator; collective, and the host waits for all ranks without a limit."""
        import torch.distributed._symmetric_memory as symmetric

        symmetric.rendezvous(window, group=self.group.group_name)

    def own_rows(self, buffer: torch.Tensor) -> torch.Tensor:
        """This rank's part of a buffer (W * rows, ...) that holds the same number of rows of every rank."""
        rows = len(buffer) // self.world_size
        return buffer[self.rank * rows : (self.rank + 1) * rows]

    def all_gather(self, buffer: torch.Tensor) -> Pending:
        """Start to fill a contiguous buffer (W * rows, ...) with every rank's own rows of it; this rank's are there already."""
        pending: Pending = _all_gather(buffer, self.own_rows(buffer), group=self.group, async_op=True)
        return pending

    def let_start(self, device: torch.device) -> None:
        """Let a collective that is ready now begin before what the device's compute stream is given next.

        A kernel that takes every multiprocessor until its end would otherwise win or lose a race with it: where it wins, the other
        ranks' part of the collective holds multiprocessors of theirs and waits.
        """
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda._sleep(HEAD_START_CYCLES)

    def reduce_scatter(self, output: torch.Tensor, buffer: torch.Tensor) -> Pending:
        """Start to add up this rank's rows of every rank's buffer (W * rows, ...) into output (rows, ...); both contiguous."""
        pending: Pending = _reduce_scatter(output, buffer, group=self.group, async_op=True)
        return pending
