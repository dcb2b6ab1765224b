"""How many KV heads' gathered keys and gradients a rank holds at a time, and the memory that takes."""

from __future__ import annotations

from dataclasses import dataclass

from weft_attn.errors import require

# What a call may take where nothing is said: at 128 x 2 dims, bf16 keys and fp32 gradients, one head of a million tokens.
DEFAULT_GATHER_BYTES = 4 * 2**30
# Where the cap does not hold all heads: one group is attended to while the next is gathered.
BUFFERS_IN_TURN = 2


@dataclass(frozen=True)
class Memory:
    """Bytes that context parallelism takes on a rank beyond the rank's own tensors, and beyond what a backward takes between its launches:
    row statistics, where it adds dq up (`weft.attention`) 4 * S * D for each query head, and a copy of what does not lie in rows, such as the
    gradient of a plain sum. That is of all heads, as on one rank, where every collective has a buffer of its own; of a group's where
    buffers take turns.

    With W ranks, S rows of the largest rank, H heads held at a time, E = D + Dv and bytes e of an element of K, r of a gradient:

        gathered   W * S * H * E * e           keys and values of H heads, of all ranks
        gradients  (W + 1) * S * H * E * r     their gradients, and this rank's sum of all ranks'
        kept       W * S * Hkv * E * e         with keep_gathered: held from a call's forward to its backward, instead of
                                               `gathered`; not part of the cap

    H is Hkv where the cap allows it: every collective (groups.py) then has a buffer of its own, however the heads are grouped.
    Under a smaller cap groups are as large as two of them may be, and take turns with two buffers.

    Attributes:
        heads_held: H.
        largest: the most KV heads of a group.
        gathered, gradients, kept: bytes as above; 0 in a world of one rank.
        limit: the cap that `forward` and `backward` keep.
    """

    heads_held: int
    largest: int
    gathered: int
    gradients: int
    kept: int
    limit: int

    @property
    def in_turn(self) -> int | None:
        """Buffers of `largest` heads that groups take turns with; None: each collective has one of its own size."""
        return None if self.heads_held == self.largest else BUFFERS_IN_TURN

    @property
    def forward(self) -> int:
        """Bytes under the cap while a call's forward runs."""
        return self.gathered

    @property
    def backward(self) -> int:
        """Bytes under the cap while a call's backward runs: the largest there is."""
        return self.gathered + self.gradients


def plan_memory(
    *,
    world_size: int,
    rank_stride: int,
    kv_heads: int,
    head_dims: int,
    element_bytes: int,
    gradient_bytes: int,
    limit: int | None,
    keep_gathered: bool,
) -> Memory:
    """As many heads at a time as the cap allows.

    Args:
        rank_stride: rows of the largest rank.
        head_dims: D + Dv.
        limit: bytes; None: DEFAULT_GATHER_BYTES.

    Raises:
        InvalidInput: one head exceeds the cap.
    """
    limit = DEFAULT_GATHER_BYTES if limit is None else limit
    if world_size == 1:
        return Memory(kv_heads, kv_heads, 0, 0, 0, limit)
    # Of one head.
    keys = world_size * rank_stride * head_dims * element_bytes
    gradients = (world_size + 1) * rank_stride * head_dims * gradient_bytes
    per_head = (0 if keep_gathered else keys) + gradients
    least = min(BUFFERS_IN_TURN, kv_heads) * per_head
    require(
        least <= limit,
        "max_gather_bytes holds one KV head's keys, values and gradients",
        expected=f">= {least}",
        given=limit,
    )
    allowed = limit // per_head if per_head else kv_heads
    held = largest = kv_heads
    if allowed < kv_heads:
        # No larger than that many equal groups are.
        largest = -(-kv_heads // -(-kv_heads // (allowed // BUFFERS_IN_TURN)))
        held = BUFFERS_IN_TURN * largest
    return Memory(
        held,
        largest,
        0 if keep_gathered else held * keys,
        held * gradients,
        kv_heads * keys if keep_gathered else 0,
        limit,
    )
