"""Launches of a compiled kernel without Triton's work around them: the one file that knows how Triton launches.

`compiled[grid](*arguments)` runs Triton's `CudaLauncher`, which walks over the arguments in Python, encodes each descriptor anew (a
driver call) and calls hooks, before one call of a C function. On the host all that takes several times as long as the C function.
What the launcher hands to the C function follows from the arguments: it is recorded once, and replayed with other addresses.

Used of Triton, alike in 3.6 and 3.9: a compiled kernel's `run` (the launcher), `src.signature`, `metadata`, `function` and
`packed_metadata`, which `launch_in_clusters` writes too; the launcher's `launch`, which is the C function or, for a kernel with
descriptors, what `wrap_handle_tensordesc` made of it. Where these are others (ROCm; a launcher that allocates memory), there is no replay.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from weft_attn.errors import Unsupported, require

Addresses = Mapping[str, int | None]

# Encoded descriptors kept for each descriptor of a launch: one for each address that a program's tensors come to lie at.
MAX_ENCODED = 256

# Stands for the stream in a record.
_STREAM = object()

_NVIDIA = "triton.backends.nvidia.driver"
# Bytes that a launcher allocates for each launch: memory that a replay would not have.
_MEMORY = ("global_scratch_size", "profile_scratch_size")


def current_stream(device: torch.device) -> int:
    """The handle of the current stream of a CUDA or ROCm device with an index."""
    return int(driver.active.get_current_stream(device.index))


def launches_are_watched() -> bool:
    """Whether hooks (a profiler's) are told of each launch of Triton's."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def launch_in_clusters(compiled: Any, size: int) -> None:
    """Have Triton launch a kernel, compiled for programs that stand alone, as clusters of `size` of them for each of its grid.

    The launcher reads warps, programs of a cluster and bytes of shared memory from `packed_metadata`. Compiling for clusters would
    do more: every layout would have to say how the programs share its elements.
    """
    metadata = compiled.metadata
    known = [(metadata.num_warps, programs, metadata.shared) for programs in (metadata.num_ctas, size)]
    require(
        compiled.packed_metadata in known,
        "Triton packs what its launcher reads as Weft knows it",
        expected=f"one of {known}",
        given=compiled.packed_metadata,
        error=Unsupported,
    )
    compiled.packed_metadata = known[-1]


@dataclass(frozen=True)
class Arguments:
    """A kernel's arguments, and which of them change.

    Attributes:
        at: makes all of them, in order, with the tensors and descriptors at these addresses.
        tensors: (position, name) of the arguments that are an address.
        descriptors: (position, name, rank) of the arguments that are a descriptor.
    """

    at: Callable[[Addresses], list[Any]]
    tensors: list[tuple[int, str]]
    descriptors: list[tuple[int, str, int]]

    def place(self, at: int) -> int:
        """Where argument `at` stands once each descriptor has become an encoded one, its shape and its strides."""
        return at + sum(2 * rank for before, _, rank in self.descriptors if before < at)


class Replay:
    """Launches of one compiled kernel on one grid, each a call of the C function behind them. Made by `replay_of`."""

    def __init__(
        self,
        function: Callable[..., None],
        record: Callable[[list[Any]], list[Any]],
        arguments: Arguments,
        addresses: Addresses,
    ) -> None:
        self._function, self._record, self._arguments = function, record, arguments
        self._tensors = [(arguments.place(at), name) for at, name in arguments.tensors]
        self._descriptors: list[tuple[int, str, dict[int | None, Any]]] = [
            (arguments.place(at), name, {}) for at, name, _ in arguments.descriptors
        ]
        first = arguments.at(addresses)
        handed, count = record(first), arguments.place(len(first))
        # The kernel's arguments are handed over one by one (3.6), or as one sequence (3.9).
        self._as_one = isinstance(handed[-1], list | tuple) and len(handed[-1]) == count
        self._values = self._of_kernel(handed, count)
        head = handed[:-1] if self._as_one else handed[:-count]
        at = next(i for i, x in enumerate(head) if x is _STREAM)
        self._before, self._after = head[:at], head[at + 1 :]
        for where, _, _ in self._descriptors:
            # Of the first call's memory.
            self._values[where] = None

    def _of_kernel(self, handed: list[Any], count: int) -> list[Any]:
        return list(handed[-1]) if self._as_one else handed[-count:]

    def launch(self, addresses: Addresses, stream: int) -> None:
        """Run on the current device, on the stream of this handle."""
        values = self._values.copy()
        for at, name in self._tensors:
            values[at] = addresses[name]
        for at, name, encoded in self._descriptors:
            found = encoded.get(addresses[name])
            values[at] = self._encode(addresses)[at] if found is None else found
        if self._as_one:
            self._function(*self._before, stream, *self._after, values)
        else:
            self._function(*self._before, stream, *self._after, *values)

    def _encode(self, addresses: Addresses) -> list[Any]:
        """The kernel's arguments at addresses that are new; keeps the encoded descriptors."""
        values = self._of_kernel(self._record(self._arguments.at(addresses)), len(self._values))
        for at, name, encoded in self._descriptors:
            if len(encoded) >= MAX_ENCODED:
                encoded.clear()
            encoded[addresses[name]] = values[at]
        return values


def replay_of(compiled: Any, grid: tuple[int, ...], arguments: Arguments, addresses: Addresses) -> Replay | None:
    """The replay of a kernel that Triton's own launcher for NVIDIA launches, and None of another.

    Args:
        compiled: what a launch of Triton's returned.
        grid: three numbers of programs.
        arguments: of the kernel.
        addresses: where the tensors of a valid launch lie.
    """
    run: Any = getattr(compiled, "run", None)
    if type(run).__module__ != _NVIDIA or getattr(run, "gsan_enabled", False):
        return None
    if any(getattr(run, name, True) for name in _MEMORY):
        return None
    # Without its encoding a descriptor is taken apart: no copy engine.
    encodings = [x for x in getattr(compiled.metadata, "tensordesc_meta", None) or () if x is not None]
    if len(encodings) != len(arguments.descriptors):
        return None
    wrap = sys.modules[_NVIDIA].wrap_handle_tensordesc
    function = run.launch
    if inspect.isfunction(function):
        function = inspect.getclosurevars(function).nonlocals.get("launcher")
    if not callable(function):
        return None

    def record(values: list[Any]) -> list[Any]:
        handed: list[Any] = []
        recorder = copy.copy(run)
        recorder.launch = wrap(lambda *given: handed.extend(given), dict(compiled.src.signature), encodings)
        recorder(*grid, _STREAM, compiled.function, compiled.packed_metadata, None, None, None, *values)
        return handed

    return Replay(function, record, arguments, addresses)
