"""A kernel launch as data: run it on a device, run it again with other tensors, or compile it for a target that is not there."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from weft_attn.kernels.replay import Addresses, Arguments, launch_in_clusters, launches_are_watched, replay_of

# Held from the compilation of a kernel that runs in clusters to its launch.
_TOLD = threading.Lock()


@dataclass(frozen=True)
class KernelCall:
    """What a launcher would launch.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs along the first axis (and more, if any).
        arguments: run-time arguments by name: tensors, descriptors, numbers, None.
        constants: constexpr arguments by name.
        num_warps, num_stages: launch parameters.
        max_registers: registers a thread is compiled for; None: the compiler's choice.
        cluster: programs that are launched for each of `grid`, as a cluster on neighbouring multiprocessors.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    cluster: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Compile options. Multiply-adds are fused whatever the Triton release's default."""
        options: dict[str, Any] = dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)
        return options if self.max_registers is None else options | dict(maxnreg=self.max_registers)

    def launch(self) -> Any:
        """Run on the device of the arguments; an empty grid is no launch.

        Returns:
            The compiled kernel; None where nothing was compiled (an empty grid, Triton's interpreter).
        """
        if 0 in self.grid:
            return None
        if self.cluster == 1:
            return self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
        # Two threads that compile a kernel at the same time get an object each: the one that is launched must be the one that was told.
        with _TOLD:
            compiled = self.kernel.warmup(**self.arguments, **self.constants, **self.options, grid=self.grid)
            launch_in_clusters(compiled, self.cluster)
            return self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


class BoundCall:
    """A launched `KernelCall` that runs again at other addresses, without asking Triton to inspect each argument once more.

    Which arguments change is read off the call: those that are one of the named tensors, and descriptors over one. The caller
    sees to it that the tensors of a later launch have the shapes, strides, dtypes, device and 16-byte alignment of the first.
    """

    def __init__(self, call: KernelCall, compiled: Any, tensors: Mapping[str, torch.Tensor | None]) -> None:
        values = call.arguments | call.constants
        self._values = [values[name] for name in call.kernel.arg_names]
        names = {id(tensor): name for name, tensor in tensors.items() if tensor is not None}
        self._tensors = [(at, names[id(x)]) for at, x in enumerate(self._values) if id(x) in names]
        self._descriptors = [
            (at, names[id(x.base)], x) for at, x in enumerate(self._values) if is_descriptor(x) and id(x.base) in names
        ]
        # Nothing of the first call is kept alive.
        for at, _ in self._tensors:
            self._values[at] = None
        for at, _, descriptor in self._descriptors:
            self._values[at] = descriptor.base = None
        grid = (*call.grid, 1, 1)[:3]
        self._launch = compiled[grid]
        ranks = [(at, name, len(descriptor.shape)) for at, name, descriptor in self._descriptors]
        addresses = {name: None if x is None else x.data_ptr() for name, x in tensors.items()}
        self._replay = replay_of(compiled, grid, Arguments(self._arguments, self._tensors, ranks), addresses)

    def _arguments(self, addresses: Addresses) -> list[Any]:
        arguments = self._values.copy()
        for at, name in self._tensors:
            arguments[at] = addresses[name]
        for at, name, template in self._descriptors:
            descriptor = copy.copy(template)
            descriptor.base = Memory(addresses[name])
            arguments[at] = descriptor
        return arguments

    def launch(self, addresses: Addresses, stream: int) -> None:
        """Run on the current device, on its current stream, whose handle is given, with the tensors at these addresses."""
        if self._replay is None or launches_are_watched():
            self._launch(*self._arguments(addresses))
        else:
            self._replay.launch(addresses, stream)


class Memory:
    """What a descriptor is over, where nothing but the address is asked for."""

    __slots__ = ("_address",)

    def __init__(self, address: int | None) -> None:
        self._address = address

    def data_ptr(self) -> int | None:
        return self._address


def is_descriptor(x: object) -> bool:
    """Whether an argument is a tensor descriptor: Triton's, or Gluon's, which is another class."""
    return hasattr(x, "block_shape") and hasattr(x, "base")


def tensor_descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A 2-D descriptor over [tokens, heads * dim] of (tokens, heads, dim) with boxes of one head's `rows` rows.

    No copy: the box of head h begins at column h * stride(1). Needs a base and row stride of whole 16 bytes, a contiguous last
    dimension, and a head dim that is a power of two.
    """
    tokens, heads, dim = x.shape
    return TensorDescriptor(x, [tokens, (heads - 1) * x.stride(1) + dim], [x.stride(0), 1], [rows, dim])


def vector_descriptor(x: torch.Tensor, length: int) -> TensorDescriptor:
    """A 1-D descriptor over all elements of a contiguous tensor, with boxes of `length` of them."""
    return TensorDescriptor(x, [x.numel()], [1], [length])
