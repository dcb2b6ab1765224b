"""What a config needs of a device, computed: a config that cannot launch is found here, not on a user's GPU.

Shared memory is an upper bound of what Triton allocates, from the tiles a kernel keeps and streams (`weft compile` compiles every
table row and compares; the tests do so for what selection gives bfloat16). Registers are the accumulators' share, which cannot be spilled without ruin.
"""

from __future__ import annotations

from dataclasses import dataclass

from weft_attn.launch.config import (
    PRODUCER_REGISTERS,
    ROWS_PER_CONSUMER,
    WIDEST_NARROW,
    WIDEST_PAIR,
    BackwardDkdvConfig,
    BackwardDqConfig,
    ForwardConfig,
    HopperBackwardConfig,
    HopperBackwardDkdvConfig,
    HopperBackwardDqConfig,
    HopperConfig,
    HopperForwardConfig,
    LaunchConfig,
    PairedConfig,
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


@dataclass(frozen=True)
class Tiles:
    """A stream kernel by its tiles: `own` rows are kept, `block` rows are staged at a time."""

    own: int
    own_columns: int
    block: int
    block_columns: int
    widest: int
    stats: int


def _tiles(config: LaunchConfig, shape: Shape) -> Tiles | None:
    d, dv = padded(shape.head_dim), padded(shape.head_dim_v)
    if isinstance(config, ForwardConfig):
        return Tiles(config.block_q, d, config.block_k, d + dv, max(d, dv), 0)
    if isinstance(config, BackwardDqConfig):
        return Tiles(config.block_q, d + dv, config.block_k, d + dv, max(d, dv), 0)
    if isinstance(config, BackwardDkdvConfig):
        # lse and delta of each staged query row, float32.
        return Tiles(config.block_k, d + dv, config.block_q, d + dv, max(d, dv), 8)
    return None


# Kernels that walk no stream use shared memory for reductions only.
SMALL_KERNEL = 16 * 1024
# Barriers and tables.
RESERVE = 2048
# A buffer of barriers whose addresses are known (kernels/hopper/addresses.py: make_words): two programs have one in common, and where dQ is
# apart, warps arrive by themselves at the barriers of three.
WORDS = 1024
# What Hopper's kernels by keys hold of lse and delta of a staged query row: both in parts (kernels/hopper/statistics.py: make_parts).
STATISTICS = 2 * 16 * 2
# 32-bit registers of a Hopper multiprocessor.
REGISTER_FILE = 65536


def shared_memory(config: LaunchConfig, shape: Shape, arch: str) -> int:
    """Bytes of shared memory a program of this config needs on `arch`, an upper bound of what Triton allocates."""
    if isinstance(config, HopperConfig):
        of_pairs = WORDS if isinstance(config, PairedConfig) and config.cluster > 1 else 0
        return _hopper_shared_memory(config, shape) + of_pairs + RESERVE
    tiles = _tiles(config, shape)
    if tiles is None:
        return SMALL_KERNEL
    size = shape.dtype_bits // 8
    # AMD keeps operands that do not change in registers.
    kept = 0 if arch.startswith("gfx") else tiles.own * tiles.own_columns * size
    staged = config.num_stages * tiles.block * (tiles.block_columns * size + tiles.stats)
    scores = tiles.own * tiles.block * size
    scratch = scores
    if tiles.stats:
        # A second layout of one streamed tile, where it is not pipelined.
        scratch += tiles.block * tiles.widest * size
    if arch in ("sm_100", "sm_103"):
        # The fifth-generation tensor cores read every operand from shared memory: the scores too, and a transposed tile.
        scratch = 2 * scores + max(tiles.own, tiles.block) * tiles.widest * size
    epilogue = tiles.own * tiles.widest * 4
    return max(kept + staged + scratch, epilogue) + RESERVE


def _hopper_shared_memory(config: HopperConfig, shape: Shape) -> int:
    """The tiles that a program keeps and those on their way."""
    row = shape.head_dim * (shape.dtype_bits // 8)
    own = config.rows_per_item * row
    if isinstance(config, HopperForwardConfig):
        # The result has room of its own where q's is given to the next item.
        stages = config.num_stages + (config.value_stages or config.num_stages)
        return own * (2 if config.q_in_registers else 1) + stages * config.block_k * row
    if isinstance(config, HopperBackwardDkdvConfig):
        return 2 * own + config.num_stages * config.block_q * (2 * row + STATISTICS)
    if isinstance(config, HopperBackwardConfig):
        # dS of two steps, or P and dS of one; where dQ is apart dS of three (kernels/hopper/backward_narrow.py: DSCORES_STAGES).
        exchanged = (3 if is_narrow(shape) else 2) * config.block_k * config.block_q * (shape.dtype_bits // 8)
        kept = 2 * config.block_k * row + exchanged
        if is_wide(shape):
            # One slot of dout, two boxes of 64 columns of dQ in float32 on their way out.
            return kept + config.num_stages * config.block_q * (row + STATISTICS) + config.block_q * (row + 2 * 64 * 4)
        # Three boxes of dQ (NARROW_PLACES), or one of each consumer.
        boxes = 3 if is_narrow(shape) else 2
        kept += 3 * WORDS if is_narrow(shape) else 0
        return kept + config.num_stages * config.block_q * (2 * row + STATISTICS) + config.block_q * boxes * 64 * 4
    assert isinstance(config, HopperBackwardDqConfig)
    # q, dout and out.
    return 3 * own + config.num_stages * 2 * config.block_k * row


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
    if isinstance(config, HopperForwardConfig):
        return ROWS_PER_CONSUMER * (dv + config.block_k) // threads
    if isinstance(config, HopperBackwardConfig) and is_wide(shape):
        # A consumer holds one gradient and no tile of scores.
        return config.block_k * d // threads
    if isinstance(config, HopperBackwardConfig | HopperBackwardDkdvConfig):
        # Keys and values too, two elements a register, where they are operands.
        operands = (d + dv) // 2 if isinstance(config, HopperBackwardConfig) and is_narrow(shape) else 0
        return ROWS_PER_CONSUMER * (d + dv + 2 * config.block_q + operands) // threads
    if isinstance(config, HopperBackwardDqConfig):
        return ROWS_PER_CONSUMER * (d + 2 * config.block_k) // threads
    return 0


def is_narrow(shape: Shape) -> bool:
    """Whether a warp group of its own has dQ in Hopper's backward of all gradients: the others leave it registers."""
    return shape.head_dim <= WIDEST_NARROW


def is_wide(shape: Shape) -> bool:
    """Whether Hopper's fused backward needs a warp group for each of dK and dV: both of 64 keys do not fit the registers of one."""
    return shape.head_dim > WIDEST_PAIR


def _has_three_consumers(config: HopperConfig, shape: Shape) -> bool:
    if isinstance(config, HopperForwardConfig):
        return config.consumers == 3
    return isinstance(config, HopperBackwardConfig) and (is_wide(shape) or is_narrow(shape))


def shortfall(config: LaunchConfig, shape: Shape, device: Device) -> str:
    """What `device` lacks to run `config`, in words; empty when it fits."""
    if isinstance(config, HopperBackwardConfig) and config.block_k != (64 if is_wide(shape) else 128):
        return f"expected items of 128 keys, or of 64 for head dims above {WIDEST_PAIR}, given {config.block_k} at {shape.head_dim}"
    if isinstance(config, HopperBackwardConfig) and shape.head_dim not in (WIDEST_NARROW, WIDEST_PAIR, 2 * WIDEST_PAIR):
        return f"expected head dims {WIDEST_NARROW}, {WIDEST_PAIR} or {2 * WIDEST_PAIR}, given {shape.head_dim}"
    if isinstance(config, HopperBackwardConfig) and config.block_q != ROWS_PER_CONSUMER:
        return f"expected query tiles of {ROWS_PER_CONSUMER}, a box of dQ's rows, given {config.block_q}"
    if isinstance(config, HopperBackwardConfig) and config.in_turn and is_wide(shape):
        return f"expected in_turn for head dims up to {WIDEST_PAIR} only, given it at {shape.head_dim}"
    if isinstance(config, HopperConfig):
        threads = 32 * config.num_warps * (1 + (3 if _has_three_consumers(config, shape) else 2))
        if threads * config.max_registers > REGISTER_FILE:
            return (
                f"expected at most {REGISTER_FILE // threads} max_registers for {threads} threads, given {config.max_registers}"
            )
    if (
        isinstance(config, HopperBackwardConfig)
        and _has_three_consumers(config, shape)
        and config.third_registers < PRODUCER_REGISTERS
    ):
        return (
            f"expected consumer_registers that leave a third consumer {PRODUCER_REGISTERS} or more, given "
            f"{config.consumer_registers} of {config.max_registers}, which leave {config.third_registers}"
        )
    if isinstance(config, HopperBackwardConfig) and config.num_stages < 2:
        return "expected two stages or more, because a step asks for the next one's queries before it releases its own, given 1"
    needed = shared_memory(config, shape, device.arch)
    if needed > device.shared_memory:
        return f"expected at most {device.shared_memory} bytes of shared memory, needs {needed}"
    registers = accumulator_registers(config, shape, device.threads_per_warp)
    if registers > device.registers_per_thread:
        return f"expected at most {device.registers_per_thread} registers a thread, its accumulators alone need {registers}"
    return ""
