"""Constants of the kernels: the layout of their tables (plan/stream.py writes them) and of their arithmetic.

Kernels name them through this module (`layout.ITEM_ROW`): Triton compares every constant that a kernel takes from its own module's
globals at every launch, which costs more host time than the launch. The price: Triton's compilation cache does not see them. So
every kernel has a constexpr LAYOUT_DIGEST, which its launcher fills with `DIGEST`, and a changed constant is a new kernel.
"""

from __future__ import annotations

import zlib

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Triton's interpreter multiplies the bits of bfloat16 operands as integers; their float32 product is the same number exactly.
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# ITEM_FIELDS
ITEM_WIDTH = tl.constexpr(8)
ITEM_ROW = tl.constexpr(0)
ITEM_N_ROWS = tl.constexpr(1)
ITEM_INTERIOR_RUN = tl.constexpr(2)
ITEM_INTERIOR_TILES = tl.constexpr(3)
ITEM_EDGE_RUN = tl.constexpr(4)
ITEM_EDGE_TILES = tl.constexpr(5)
ITEM_SLOT = tl.constexpr(6)
ITEM_LATE_EDGES = tl.constexpr(6)
ITEM_WALK = tl.constexpr(7)

# Codes of a walk (plan/in_step.py)
WALK_BY_ITEM = tl.constexpr(1)
WALK_UP_IN_EVEN = tl.constexpr(2)

# RUN_FIELDS; rows and columns as the kernel sees them (the dK/dV kernel walks the transposed plan)
RUN_WIDTH = tl.constexpr(8)
RUN_COL = tl.constexpr(0)
RUN_N_TILES = tl.constexpr(1)
RUN_ROW_START = tl.constexpr(2)
RUN_ROW_LEN = tl.constexpr(3)
RUN_COL_START = tl.constexpr(4)
RUN_COL_LEN = tl.constexpr(5)
RUN_LO = tl.constexpr(6)
RUN_HI = tl.constexpr(7)

# COMBINE_FIELDS
COMBINE_WIDTH = tl.constexpr(4)
COMBINE_ROW = tl.constexpr(0)
COMBINE_N_ROWS = tl.constexpr(1)
COMBINE_FIRST_SLOT = tl.constexpr(2)
COMBINE_N_SLOTS = tl.constexpr(3)

# An item's late edges are told as the number of its other edge runs times this, plus how many tiles they have.
LATE_TILES = tl.constexpr(2**15)
# Words that say whose turn it is, for each row of a head at most.
MOST_TURNS = tl.constexpr(2)

# Arguments whose values follow the batch: a kernel compiled for multiples of 16 of them would be compiled again in the middle of
# a training run.
OF_THE_BATCH = (
    "n_items",
    "heads_per_wave",
    "last_heads",
    "total_q",
    "stride_lse_h",
    "stride_dlse_h",
    "stride_copy",
    "stride_stats_copy",
    "stride_stats_h",
    "n_turns",
)

DIGEST = zlib.crc32(repr(sorted((n, c.value) for n, c in list(globals().items()) if isinstance(c, tl.constexpr))).encode())
