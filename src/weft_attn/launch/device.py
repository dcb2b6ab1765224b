"""What a device can hold: the numbers that feasibility and selection need, for devices that are here and targets that are not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from weft_attn.errors import Unsupported

KIB = 1024


@dataclass(frozen=True)
class Device:
    """A GPU, or a target to compile for.

    Attributes:
        name: as the driver reports it; for a target, its architecture.
        arch: "sm_90" style for NVIDIA, "gfx942" style for AMD.
        multiprocessors: number of SMs or CUs.
        shared_memory: bytes that one program may use.
        registers_per_thread: most 32-bit registers a thread may use.
        threads_per_warp: 32, or 64 on AMD's data-centre GPUs.
        interpreted: Triton's interpreter, which has no Gluon.
    """

    name: str
    arch: str
    multiprocessors: int
    shared_memory: int
    registers_per_thread: int = 255
    threads_per_warp: int = 32
    interpreted: bool = False

    @property
    def has_tma(self) -> bool:
        return self.arch.startswith("sm_") and int(self.arch[3:]) >= 90

    @property
    def has_hopper_kernels(self) -> bool:
        return self.arch == "sm_90" and not self.interpreted


# Offline targets: shared memory a block may opt into (CUDA programming guide, compute capabilities; CDNA3 ISA for gfx942), and
# the multiprocessors of a common member.
TARGETS = {
    "sm_80": Device("sm_80", "sm_80", 108, 163 * KIB),
    "sm_86": Device("sm_86", "sm_86", 82, 99 * KIB),
    "sm_89": Device("sm_89", "sm_89", 128, 99 * KIB),
    "sm_90": Device("sm_90", "sm_90", 132, 227 * KIB),
    "sm_100": Device("sm_100", "sm_100", 148, 227 * KIB),
    "sm_120": Device("sm_120", "sm_120", 170, 99 * KIB),
    "gfx942": Device("gfx942", "gfx942", 304, 64 * KIB, registers_per_thread=512, threads_per_warp=64),
}

# What kernels see in Triton's interpreter, which has neither shared memory nor registers: an A100's room, so that its tables apply.
INTERPRETER = Device("interpreter", "sm_80", 4, 163 * KIB, interpreted=True)


@cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Device(properties.name, arch, properties.multi_processor_count, 64 * KIB, 512, properties.warp_size)
    major, minor = properties.major, properties.minor
    return Device(
        properties.name,
        f"sm_{major}{minor}",
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def device_of(device: torch.device) -> Device:
    """The `Device` behind a torch device: probed when first used, never at import."""
    if device.type == "cuda":
        return _cuda_device(device.index if device.index is not None else torch.cuda.current_device())
    if device.type == "cpu":
        return INTERPRETER
    raise Unsupported(f"kernels run on CUDA or ROCm devices: expected a 'cuda' tensor, given {device.type!r}")


def target(arch: str) -> Device:
    """The offline target of an architecture name."""
    try:
        return TARGETS[arch]
    except KeyError:
        raise Unsupported(f"the target is known: expected one of {sorted(TARGETS)}, given {arch!r}") from None
