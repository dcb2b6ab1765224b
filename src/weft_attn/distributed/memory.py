"""How many KV heads are gathered at a time, and the memory that takes."""

from __future__ import annotations

from dataclasses import dataclass

from weft_attn.errors import require

# What a call may take where nothing is said: at 128 x 2 dims, bf16 keys and fp32 gradients, one head of a million tokens.
DEFAULT_GATHER_BYTES = 4 * 2**30
# Gathering one group overlaps attention on another, so there are two wherever there are two heads.
LEAST_GROUPS = 2
BUFFERS_IN_TURN = 2


@dataclass(frozen=True)
class Memory:
    """Bytes that context parallelism takes on a rank beyond the rank's own tensors.

    With W ranks, S rows of the largest rank, G heads in a group, B = 2 buffers in turn (1 where there is one group), E = D + Dv
    and bytes e of an element of K, r of a gradient:

        gathered   B * W * S * G * E * e           keys and values of a group, of all ranks
        gradients  B * (W + 1) * S * G * E * r     their gradients, and this rank's sum of all ranks'
        kept       W * S * Hkv * E * e             with keep_gathered: held from a call's forward to its backward, instead of
                                                   `gathered`; not part of the cap

    Attributes:
        heads_per_group: G, the most KV heads gathered at a time.
        groups: how many groups the KV heads make.
        gathered, gradients, kept: bytes as above; 0 in a world of one rank.
        limit: the cap that `forward` and `backward` keep.
    """

    heads_per_group: int
    groups: int
    gathered: int
    gradients: int
    kept: int
    limit: int

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
    """The largest groups of heads that the cap allows.

    Args:
        rank_stride: rows of the largest rank.
        head_dims: D + Dv.
        limit: bytes; None: DEFAULT_GATHER_BYTES.

    Raises:
        InvalidInput: one head exceeds the cap.
    """
    limit = DEFAULT_GATHER_BYTES if limit is None else limit
    if world_size == 1:
        return Memory(kv_heads, 1, 0, 0, 0, limit)
    # Of one head and one buffer.
    keys = world_size * rank_stride * head_dims * element_bytes
    gradients = (world_size + 1) * rank_stride * head_dims * gradient_bytes
    in_turn = min(BUFFERS_IN_TURN, kv_heads)
    per_head = in_turn * ((0 if keep_gathered else keys) + gradients)
    require(
        per_head <= limit,
        "max_gather_bytes holds one KV head's keys, values and gradients",
        expected=f">= {per_head}",
        given=limit,
    )
    allowed = limit // per_head if per_head else kv_heads
    groups = len(head_groups(kv_heads, min(allowed, -(-kv_heads // LEAST_GROUPS))))
    most = -(-kv_heads // groups)
    return Memory(
        most,
        groups,
        0 if keep_gathered else in_turn * most * keys,
        in_turn * most * gradients,
        kv_heads * keys if keep_gathered else 0,
        limit,
    )


def head_groups(kv_heads: int, heads_per_group: int) -> list[slice]:
    """KV heads in groups of nearly equal size, none larger than heads_per_group."""
    count = -(-kv_heads // heads_per_group)
    return [slice(i * kv_heads // count, (i + 1) * kv_heads // count) for i in range(count)]
