"""What a pass over a plan launches, decided once and kept with the plan.

Everything that a pass decides depends on the plan and on how its tensors lie in memory, never on their values. A call with tensors
that lie alike follows the recipe; what is left of the host's work is to look it up and to launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from weft_attn.launch.select import current_overrides
from weft_attn.plan.slices import Plan
from weft_attn.plan.stream import DeviceStream

if TYPE_CHECKING:
    from weft_attn.kernels.call import BoundCall, KernelCall

Tensors = dict[str, torch.Tensor | None]

# Tables that captured graphs read, which live as long as the process: nobody tells when a graph is gone.
_of_graphs: dict[int, Sequence[DeviceStream]] = {}
# Recipes that a plan keeps: one for each layout of tensors and pair of scalars that a program uses it with.
MAX_RECIPES = 64


class Step:
    """One launch of a pass: put together in full the first time, bound from then on."""

    def __init__(self, make: Callable[[Any], KernelCall]) -> None:
        self._make = make
        self._bound: BoundCall | None = None

    def run(self, tensors: Tensors, addresses: dict[str, int | None], stream: int) -> None:
        if self._bound is not None:
            self._bound.launch(addresses, stream)
            return
        from weft_attn.kernels.call import BoundCall

        # Objects of their own, so that a tensor passed under two names (k as v) is two arguments that may differ next time.
        own = {name: None if x is None else x.detach() for name, x in tensors.items()}
        call = self._make(own)
        compiled = call.launch()
        if compiled is not None:
            self._bound = BoundCall(call, compiled, own)


class Counter:
    """The counter of persistent grids, which each launch leaves at zero: one for each CUDA stream, whose launches run one after
    the other. A graph gets its own, zeroed in it, because it may be replayed on another stream.
    """

    def __init__(self) -> None:
        self._of_stream: dict[int, torch.Tensor] = {}

    def on(self, device: torch.device, stream: int, captures: bool) -> torch.Tensor:
        """The counter for a launch on the current stream, whose handle is given, and whether a graph is captured on it."""
        found = None if captures else self._of_stream.get(stream)
        if found is None:
            from weft_attn.kernels.hopper.schedule import COUNTER_SIZE

            found = torch.zeros(COUNTER_SIZE, dtype=torch.int32, device=device)
            if not captures:
                self._of_stream[stream] = found
        return found


class Scratch(NamedTuple):
    """Memory that a pass needs between its launches: a tensor, not written."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Recipe:
    """A pass over a plan, decided: the tables it reads, the memory it needs in between, its launches.

    Attributes:
        streams: the tables; joined before the launches.
        scratch: that memory, by name.
        steps: launches in order.
        counter: what persistent grids count with, where there are any.
        before, after: launches in front of them and behind, which touch neither keys and values nor their gradients.
    """

    streams: Sequence[DeviceStream]
    scratch: dict[str, Scratch]
    steps: Sequence[Step]
    counter: Counter | None = None
    before: Sequence[Step] = ()
    after: Sequence[Step] = ()

    def begin(self, tensors: Tensors, addresses: dict[str, int | None], device: torch.device) -> Run:
        """Take the memory and make the launches of `before`.

        Args:
            tensors: by name; what the launches write in between is put with them.
            addresses: where each of them lies.
            device: theirs.
        """
        stream, captures = 0, False
        if device.type == "cuda":
            # Kernels are launched on the current device: make it the tensors' own.
            if device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    return self.begin(tensors, addresses, device)
            from weft_attn.kernels.replay import current_stream

            stream = current_stream(device)
            for table in self.streams:
                table.join(stream)
            captures = torch.cuda.is_current_stream_capturing()
            if captures:
                _of_graphs[id(self.streams)] = self.streams
        for name, (shape, dtype) in self.scratch.items():
            tensors[name] = scratch = torch.empty(shape, dtype=dtype, device=device)
            addresses[name] = scratch.data_ptr()
        if self.counter is not None:
            tensors["counter"] = counter = self.counter.on(device, stream, captures)
            addresses["counter"] = counter.data_ptr()
        run = Run(self, tensors, addresses, device, stream)
        for step in self.before:
            step.run(tensors, addresses, stream)
        return run


class Run(NamedTuple):
    """A recipe that has begun on some tensors: `launch` its steps, then what is after them, on the stream that it began on."""

    recipe: Recipe
    tensors: Tensors
    addresses: dict[str, int | None]
    device: torch.device
    stream: int

    def launch(self, steps: Sequence[Step]) -> None:
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self.launch(steps)
            return
        for step in steps:
            step.run(self.tensors, self.addresses, self.stream)


def begin_recipe(plan: Plan, key: tuple[Any, ...], tensors: Tensors, device: torch.device, make: Callable[[], Recipe]) -> Run:
    """Begin the plan's recipe for a pass named by `key` over tensors that lie like these, made where there is none."""
    addresses: dict[str, int | None] = {}
    layouts: list[Any] = []
    for name, x in tensors.items():
        if x is None:
            addresses[name] = None
            layouts.append(None)
        else:
            addresses[name] = address = x.data_ptr()
            layouts += (x.shape, x.stride(), x.dtype, address % 16)
    key = (*key, *layouts, device, current_overrides())
    found = plan._recipes.get(key)
    if found is None:
        if len(plan._recipes) >= MAX_RECIPES:
            plan._recipes.clear()
        found = plan._recipes[key] = make()
    return found.begin(tensors, addresses, device)
