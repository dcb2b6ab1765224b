"""Which kernel, with which numbers. Does not import triton."""

from weft_attn.launch.config import (
    BackwardDkdvConfig,
    BackwardDqConfig,
    CombineConfig,
    DeltaConfig,
    FinishDqConfig,
    ForwardConfig,
    HopperBackwardConfig,
    HopperBackwardDkdvConfig,
    HopperBackwardDqConfig,
    HopperForwardConfig,
    InvalidConfig,
)
from weft_attn.launch.select import override

__all__ = [
    "BackwardDkdvConfig",
    "BackwardDqConfig",
    "CombineConfig",
    "DeltaConfig",
    "FinishDqConfig",
    "ForwardConfig",
    "HopperBackwardConfig",
    "HopperBackwardDkdvConfig",
    "HopperBackwardDqConfig",
    "HopperForwardConfig",
    "InvalidConfig",
    "override",
]
