"""What a config needs of a device, computed: a config that cannot launch is found here, not on a user's GPU.

Shared memory is an upper bound of what Triton allocates, from the tiles a kernel keeps and streams (a test compiles every table
row and compares). Registers are the accumulators' share, which cannot be spilled without ruin.
"""

from __future__ import annotations

from dataclasses import dataclass

from weft_attn.launch.config import (
    BackwardDkdvConfig,
    BackwardDqConfig,
    ForwardConfig,
    LaunchConfig,
)
from weft_attn.launch.device import Device


@dataclass(frozen=True)
class Shape:
    """Head dims and dtype width of a problem."""

    head_dim: int
    head_dim_v: int
    dtype_bits: int

    @property
    def widest(self) -> int:
        return max(padded(self.head_dim), padded(self.head_dim_v))


def padded(head_dim: int) -> int:
    """Columns of a head's tile: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def shared_memory(config: LaunchConfig, shape: Shape) -> int:
    """Bytes of shared memory a program of this config needs, an upper bound."""
    size = shape.dtype_bits // 8
    d, dv = padded(shape.head_dim), padded(shape.head_dim_v)
    if isinstance(config, ForwardConfig):
        kept = config.block_q * d * size
        staged = config.num_stages * config.block_k * (d + dv) * size
        scratch = config.block_q * config.block_k * size
        epilogue = config.block_q * dv * 4
        return max(kept + staged + scratch, epilogue) + 2048
    if isinstance(config, BackwardDqConfig):
        kept = config.block_q * (d + dv) * size
        staged = config.num_stages * config.block_k * (d + dv) * size
        scratch = config.block_q * config.block_k * size
        return max(kept + staged + scratch, config.block_q * d * 4) + 2048
    if isinstance(config, BackwardDkdvConfig):
        kept = config.block_k * (d + dv) * size
        staged = config.num_stages * config.block_q * ((d + dv) * size + 8)
        scratch = config.block_q * config.block_k * size
        return max(kept + staged + scratch, config.block_k * max(d, dv) * 4) + 2048
    return 16 * 1024


def accumulator_registers(config: LaunchConfig, shape: Shape, threads_per_warp: int) -> int:
    """32-bit registers a thread needs for what lives across the stream, plus one tile of scores."""
    d, dv = padded(shape.head_dim), padded(shape.head_dim_v)
    threads = config.num_warps * threads_per_warp
    if isinstance(config, ForwardConfig):
        return config.block_q * (dv + config.block_k) // threads
    if isinstance(config, BackwardDqConfig):
        return config.block_q * (d + 2 * config.block_k) // threads
    if isinstance(config, BackwardDkdvConfig):
        return config.block_k * (d + dv + 2 * config.block_q) // threads
    return 0


def shortfall(config: LaunchConfig, shape: Shape, device: Device) -> str:
    """What `device` lacks to run `config`, in words; empty when it fits."""
    needed = shared_memory(config, shape)
    if needed > device.shared_memory:
        return f"expected at most {device.shared_memory} bytes of shared memory, needs {needed}"
    registers = accumulator_registers(config, shape, device.threads_per_warp)
    if registers > device.registers_per_thread:
        return f"expected at most {device.registers_per_thread} registers a thread, its accumulators alone need {registers}"
    return ""
