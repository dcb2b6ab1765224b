"""What would run, with which numbers, and why: the answers of `weft doctor`."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass, fields
from importlib import metadata

import torch

from weft_attn.launch.config import HopperBackwardDqConfig, HopperConfig, LaunchConfig
from weft_attn.launch.device import Device, device_of
from weft_attn.launch.resources import accumulator_registers, shared_memory
from weft_attn.launch.select import (
    DKDV_KERNELS,
    DQ_KERNELS,
    FUSED_KERNEL,
    Choice,
    Problem,
    hopper_lacking,
    select,
    select_backward,
    select_first,
    select_in_turn,
)
from weft_attn.launch.splits import ForwardCut, cut_forward
from weft_attn.plan.slices import Plan
from weft_attn.plan.stream import host_stream

CUDA_DRIVER = "libcuda.so.1"
# The kernels beside the forward, each with those that may run in its place, the preferred one first.
OTHER_KERNELS = (("combine",), ("delta",), DKDV_KERNELS, DQ_KERNELS)


@dataclass(frozen=True)
class Machine:
    """What this machine has.

    Attributes:
        python, torch: versions.
        torch_build: what torch was built for, in words.
        triton: version, or None where it is not installed.
        cuda_driver: the newest CUDA that the driver serves, or None without one.
        devices: the GPUs that torch can use.
    """

    python: str
    torch: str
    torch_build: str
    triton: str | None
    cuda_driver: str | None
    devices: tuple[Device, ...]


@dataclass(frozen=True)
class KernelChoice:
    """A kernel's config and what it needs of the device.

    Attributes:
        shared_memory: bytes a program needs, an upper bound.
        registers: 32-bit registers a thread needs for its accumulators.
    """

    kernel: str
    choice: Choice
    shared_memory: int
    registers: int


@dataclass(frozen=True)
class Explanation:
    """How a plan's attention runs on a device.

    Attributes:
        cut: the forward's cut: heads packed in a tile, tokens and tiles of an item.
        items: programs of the forward for each pack of heads.
        split_tiles: row tiles whose keys are split over several items, whose parts the combine kernel joins; 0: it does not run.
        parts: items that those tiles are split into, together.
        kernels: what each kernel runs with.
        is_fused: without `deterministic`, one kernel computes all gradients.
        takes_turns: with it, that one does too where the plan lets its programs take turns.
        without_hopper: why the call is not one for Hopper's kernels; empty where it is.
    """

    device: Device
    cut: ForwardCut
    items: int
    split_tiles: int
    parts: int
    kernels: tuple[KernelChoice, ...]
    is_fused: bool
    takes_turns: bool
    without_hopper: str

    @property
    def hopper_in_words(self) -> str:
        """Whether the kernels for Hopper serve, on a GPU that they run on; empty on others."""
        if not self.device.has_hopper_kernels:
            return ""
        theirs = [each.kernel for each in self.kernels if isinstance(each.choice.config, HopperConfig)]
        if theirs:
            return f"Hopper's kernels: {', '.join(theirs)}"
        return f"Hopper's kernels: none, {self.without_hopper or 'for no row of the tables serves the call'}"

    @property
    def cut_in_words(self) -> str:
        """How the forward's rows and keys are cut."""
        rows, pack = self.cut.tiling.rows_per_tile, self.cut.pack
        shared = f"{pack} query heads share a tile of {rows} rows" if pack > 1 else f"a tile is {rows} rows of one head"
        if self.split_tiles == 0:
            return f"forward: {shared}; {self.items:,} tiles; keys are not split, so combine does not run"
        return (
            f"forward: {shared}; tiles whose keys are split: {self.split_tiles:,}, into {self.parts:,} parts "
            f"of at most {self.cut.tiling.max_tiles:,} key tiles, which combine joins"
        )

    @property
    def backward_in_words(self) -> str:
        """Which kernels compute the gradients, and when."""
        pair = " and ".join(each.kernel for each in self.kernels if each.kernel in (*DKDV_KERNELS, *DQ_KERNELS))
        if not self.is_fused:
            makes_statistics = any(isinstance(each.choice.config, HopperBackwardDqConfig) for each in self.kernels)
            delta = "; delta runs only where dQ is not wanted, whose kernel makes the row statistics itself"
            return f"backward: {pair}; deterministic" + (delta if makes_statistics else "")
        if not self.takes_turns:
            return f"backward: {FUSED_KERNEL} and finish_dq; {pair} for deterministic=True, or where only some gradients are wanted"
        return (
            f"backward: {FUSED_KERNEL} and finish_dq, for deterministic=True with programs that add in turn where that pays; "
            f"{pair} where it does not, or only some gradients are wanted"
        )


def inspect_machine() -> Machine:
    """Look at this machine. Does not import triton."""
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    else:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = tuple(device_of(torch.device("cuda", index)) for index in range(count))
    return Machine(platform.python_version(), torch.__version__, build, triton, cuda_driver(), devices)


def cuda_driver() -> str | None:
    """The newest CUDA version that the installed NVIDIA driver serves; None: there is no driver."""
    try:
        driver = ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def explain(plan: Plan, heads: int, kv_heads: int, problem: Problem, device: Device) -> Explanation:
    """What attention under `plan` would run on `device`.

    Raises:
        Unsupported: no config of some kernel fits the device.
    """
    cut = cut_forward(plan, heads, kv_heads, problem, device)
    stream = host_stream(plan, cut.tiling)
    choices = [cut.choice, *(select_first(kernels, problem, device) for kernels in OTHER_KERNELS)]
    fused, *others = select_backward(problem, device, deterministic=False)
    takes_turns = not others and select_in_turn(problem, device) is not None
    if not others:
        choices += [fused, select("finish_dq", problem, device)]
    kernels = tuple(
        KernelChoice(
            choice.config.kernel,
            choice,
            shared_memory(choice.config, problem.shape, device.arch),
            accumulator_registers(choice.config, problem.shape, device.threads_per_warp),
        )
        for choice in choices
    )
    lacking = hopper_lacking(problem, device)
    return Explanation(
        device, cut, len(stream.items), len(stream.combines), stream.slots, kernels, not others, takes_turns, lacking
    )


def numbers(config: LaunchConfig, *, brief: bool = False) -> str:
    """A config's numbers by the names of its fields, switches that are off left out; brief: only what differs from the defaults."""
    shown = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value is not False and value != "" and not (brief and value == field.default):
            shown.append(f"{field.name}={value}")
    return " ".join(shown)
