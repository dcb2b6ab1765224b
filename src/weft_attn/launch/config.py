"""Every launch parameter is a field of one of these frozen configs: the techniques of the kernels, as switches.

Tiles are powers of two. `cache_modifier` is the cache operator of the streamed tiles' loads ("" the default, ".cg" bypasses L1;
without meaning for tensor-descriptor loads). `use_tma` reads interior tiles through tensor descriptors (Hopper and later; where
the tensors' alignment forbids it the same kernel reads through pointers, and the choice says so). `wave_bytes` bounds the bytes
of the streamed tensors that the heads in flight touch together, so that they stay in the L2 cache; Hopper's kernels that walk by keys
have no such bound, because their programs walk in step (ADR 19).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from weft_attn.errors import WeftError, require

CACHE_MODIFIERS = ("", ".ca", ".cg")
# The widest head whose dK and dV of 64 keys one warp group of Hopper's fused backward holds in its registers.
WIDEST_PAIR = 128
# The widest head of which the two leave registers for a third warp group, which has dQ.
WIDEST_NARROW = 64
# Registers a thread that a producer keeps: the fewest that a warp group can have, which has them by eights.
PRODUCER_REGISTERS = 24
# Rows that a consumer of Hopper's kernels multiplies at a time.
ROWS_PER_CONSUMER = 64


class InvalidConfig(WeftError):
    """A launch config breaks a rule of its own or cannot run on the device."""


def _check_tile(name: str, value: int) -> None:
    require(
        isinstance(value, int) and value >= 16 and value & (value - 1) == 0,
        f"{name} is a tile size",
        expected="a power of two >= 16",
        given=value,
        error=InvalidConfig,
    )


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """What all configs share. Subclasses name their kernel."""

    kernel: ClassVar[str]

    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("block_"):
                _check_tile(field.name, value)
            if field.name == "cache_modifier":
                require(
                    value in CACHE_MODIFIERS,
                    "cache_modifier is known",
                    expected=f"one of {CACHE_MODIFIERS}",
                    given=repr(value),
                    error=InvalidConfig,
                )
        require(
            self.num_warps in (1, 2, 4, 8, 16),
            "num_warps is a power of two",
            expected="1, 2, 4, 8 or 16",
            given=self.num_warps,
            error=InvalidConfig,
        )
        require(
            1 <= self.num_stages <= 8, "num_stages is in range", expected="1..8", given=self.num_stages, error=InvalidConfig
        )


@dataclass(frozen=True, kw_only=True)
class StreamConfig(LaunchConfig):
    """A kernel that keeps one tile and walks a stream of others."""

    block_q: int
    block_k: int
    cache_modifier: str = ""
    use_tma: bool = False
    wave_bytes: int = 32 * 2**20

    @property
    def cut(self) -> tuple[int, int]:
        """Rows of an item, and columns of a streamed tile."""
        return self.block_q, self.block_k


@dataclass(frozen=True, kw_only=True)
class ForwardConfig(StreamConfig):
    """Forward: `block_q` rows against key tiles of `block_k`.

    identity_dot keeps Q in registers by multiplying it with the identity (an Ampere-era trick). programs_per_sm: programs that
    run on a multiprocessor at a time, what split-KV aims at when query rows are few.
    """

    kernel: ClassVar[str] = "forward"

    identity_dot: bool = False
    programs_per_sm: int = 1


@dataclass(frozen=True, kw_only=True)
class BackwardDkdvConfig(StreamConfig):
    """dK and dV: `block_k` keys against query tiles of `block_q`."""

    kernel: ClassVar[str] = "backward_dkdv"

    @property
    def cut(self) -> tuple[int, int]:
        return self.block_k, self.block_q


@dataclass(frozen=True, kw_only=True)
class BackwardDqConfig(StreamConfig):
    """dQ: `block_q` rows against key tiles of `block_k`; identity_dot as in the forward."""

    kernel: ClassVar[str] = "backward_dq"

    identity_dot: bool = False


@dataclass(frozen=True, kw_only=True)
class HopperConfig(LaunchConfig):
    """A warp-specialised kernel of sm_90 (Gluon): a producer and consumers of 64 rows each, in a persistent grid.

    A row of a table serves one head dim, its own. num_warps are those of a warp group; num_stages: streamed tiles on their way.
    max_registers: what a thread is compiled for; consumer_registers: what a consumer's thread gets once the producer has given up
    its share. Where a consumer runs in the launch's own warps (ADR 12), that one gets what the others and the producer leave.
    """

    consumer_registers: int = 240
    max_registers: int = 168

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("consumer_registers", "max_registers"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and PRODUCER_REGISTERS <= value <= 256 and value % 8 == 0,
                f"{name} are what a thread can have",
                expected=f"{PRODUCER_REGISTERS}..256, a multiple of 8",
                given=value,
                error=InvalidConfig,
            )

    @property
    def rows_per_item(self) -> int:
        """Rows of an item, those of all consumers, where there are two."""
        return 2 * ROWS_PER_CONSUMER

    @property
    def cut(self) -> tuple[int, int]:
        """Rows of an item, and columns of a streamed tile."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PairedConfig(HopperConfig):
    """A kernel whose programs may work in pairs.

    cluster: 2 has pairs of programs take two query heads of a KV head and fetch each tile of K and V once for both (ADR 23).
    """

    cluster: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.cluster in (1, 2),
            "a cluster is one program or two",
            expected="1 or 2",
            given=self.cluster,
            error=InvalidConfig,
        )


@dataclass(frozen=True, kw_only=True)
class HopperForwardConfig(PairedConfig):
    """Forward on Hopper: 64 query rows for each consumer against key tiles of `block_k`.

    consumers: two, or three in turn, which share the registers of a multiprocessor. q_in_registers: keep Q as a register operand,
    which frees its shared memory for the next item's. value_stages: stages of V where they are not K's num_stages (0: they are).
    """

    kernel: ClassVar[str] = "hopper_forward"

    block_k: int
    consumers: int = 2
    value_stages: int = 0
    q_in_registers: bool = True
    wave_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.consumers in (2, 3), "consumers are two or three", expected="2 or 3", given=self.consumers, error=InvalidConfig
        )
        require(
            0 <= self.value_stages <= 8,
            "value_stages is in range",
            expected="0..8",
            given=self.value_stages,
            error=InvalidConfig,
        )

    @property
    def rows_per_item(self) -> int:
        return ROWS_PER_CONSUMER * self.consumers

    @property
    def cut(self) -> tuple[int, int]:
        return self.rows_per_item, self.block_k


@dataclass(frozen=True, kw_only=True)
class HopperBackwardConfig(HopperConfig):
    """All gradients on Hopper in one kernel, deterministic only in turn: `block_k` keys against query tiles of `block_q`, 64.

    block_k is 128, 64 for each of two consumers; up to WIDEST_NARROW a third one has dQ (ADR 34). For head dims above WIDEST_PAIR it is 64,
    which three consumers share. in_turn: where a deterministic backward is asked for, programs that own 128 keys add to dQ in turn (ADR 24).
    """

    kernel: ClassVar[str] = "hopper_backward"

    block_q: int
    block_k: int = 128
    in_turn: bool = False

    @property
    def third_registers(self) -> int:
        """What a third consumer's thread gets: what two others and the producer leave."""
        return 4 * self.max_registers - 2 * self.consumer_registers - PRODUCER_REGISTERS

    @property
    def cut(self) -> tuple[int, int]:
        return self.block_k, self.block_q


@dataclass(frozen=True, kw_only=True)
class HopperBackwardDkdvConfig(HopperConfig):
    """dK and dV on Hopper: 128 keys against query tiles of `block_q`."""

    kernel: ClassVar[str] = "hopper_backward_dkdv"

    block_q: int

    @property
    def cut(self) -> tuple[int, int]:
        return self.rows_per_item, self.block_q


@dataclass(frozen=True, kw_only=True)
class HopperBackwardDqConfig(PairedConfig):
    """dQ on Hopper: 128 query rows against key tiles of `block_k`."""

    kernel: ClassVar[str] = "hopper_backward_dq"

    block_k: int
    wave_bytes: int = 32 * 2**20

    @property
    def cut(self) -> tuple[int, int]:
        return self.rows_per_item, self.block_k


@dataclass(frozen=True, kw_only=True)
class CombineConfig(LaunchConfig):
    """Combining split items: `block_slots` parts are read at a time."""

    kernel: ClassVar[str] = "combine"

    block_slots: int = 16


@dataclass(frozen=True, kw_only=True)
class DeltaConfig(LaunchConfig):
    """Row statistics of the backward: `block_rows` rows of one head a program."""

    kernel: ClassVar[str] = "delta"

    block_rows: int = 64


@dataclass(frozen=True, kw_only=True)
class FinishDqConfig(LaunchConfig):
    """Summed dQ to its dtype: `block_rows` rows of one head a program."""

    kernel: ClassVar[str] = "finish_dq"

    block_rows: int = 64


CONFIGS: dict[str, type[LaunchConfig]] = {
    c.kernel: c
    for c in (
        ForwardConfig,
        BackwardDkdvConfig,
        BackwardDqConfig,
        CombineConfig,
        DeltaConfig,
        FinishDqConfig,
        HopperForwardConfig,
        HopperBackwardConfig,
        HopperBackwardDkdvConfig,
        HopperBackwardDqConfig,
    )
}
