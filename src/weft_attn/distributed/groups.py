"""Which KV heads travel and are attended to together: the groups of a pass, those that a model of it says take least time.

In the model a GPU computes and its links carry side by side, each in the order of the code (gathered.py). For a group of n KV heads

    gather     n * gather, once its buffer is free
    attention  STARTUP + n * attention + tail, and no less than `shortest`; once the group is gathered
    reduce     n * reduce, in a backward, after the group's attention

with the times of one KV head on a rank: of its attention, of the gather of its keys and values, of the reduce-scatter of their
gradients. Three things follow. What comes before the first attention and after the last is hidden by nothing, so those groups are
small. A small group hides little, so that what runs beside it is no longer than its attention. And every group costs a launch, at
whose end multiprocessors wait for each other, so there are few, and none so small that its work items do not fill the GPU.

Only ratios of those times decide, so constants of one GPU serve others. There are two groups at least, whatever the model says: with one,
all transfers would be exposed where links are slower than its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from weft_attn.plan.cost import BACKWARD_OVER_FORWARD

# Gathering one group overlaps attention on another, so there are two wherever there are two heads.
LEAST_GROUPS = 2
# What is carried and computed in a millisecond, on an H200 with NVLink: what the packaged rates of `weft simulate` come to.
FLOPS_PER_MS = 6.0e11
BYTES_PER_MS = 2.2e8
# A launch and a collective until they work, milliseconds.
STARTUP = 0.02
# Multiprocessors, and rows of a work item: a tile of rows of one head, what a multiprocessor works on at a time.
PROGRAMS = 132
ITEM_ROWS = 128


@dataclass(frozen=True)
class Launch:
    """What a group's launches cost beside their work, in work items of the mean length.

    Attributes:
        tail: what the end leaves idle.
        shortest: how long they take at least, however few heads there are.
    """

    tail: float
    shortest: float


# A forward's items end with the shortest, of which many fit where one long one did. The longest is twice the mean under a causal mask.
FORWARD_LAUNCH = Launch(tail=0.125, shortest=2.0)
# A backward's are long: key tiles of all query heads that share them.
BACKWARD_LAUNCH = Launch(tail=0.125, shortest=3.0)


@dataclass(frozen=True)
class HeadTimes:
    """Milliseconds of one KV head in a pass on a rank, as far as the same on every rank.

    Attributes:
        attention: of its kernels; tail, shortest: as `Launch`, of a group however many heads it has.
        gather, reduce: of its keys and values, and of their gradients (0 in a forward).
    """

    attention: float
    tail: float
    shortest: float
    gather: float
    reduce: float = 0.0


@dataclass(frozen=True)
class Groups:
    """The groups of a forward and of its backward, each all KV heads in order of work.

    Where the backward takes the keys that the forward gathered, it goes through the forward's groups from the last to the first.
    """

    forward: tuple[slice, ...]
    backward: tuple[slice, ...]


def head_times(
    *,
    world_size: int,
    rank_stride: int,
    pairs: int,
    heads_each: int,
    head_dims: int,
    element_bytes: int,
    gradient_bytes: int,
) -> tuple[HeadTimes, HeadTimes]:
    """Of a forward and of a backward.

    Args:
        rank_stride: rows of the largest rank.
        pairs: visible pairs of all ranks.
        heads_each: query heads that share a KV head.
        head_dims: D + Dv.
        element_bytes, gradient_bytes: of an element of K, and of its gradient on its way.
    """
    attention = 2 * head_dims * heads_each * pairs / world_size / FLOPS_PER_MS
    elements = (world_size - 1) * rank_stride * head_dims
    gather, reduce = (elements * each / BYTES_PER_MS for each in (element_bytes, gradient_bytes))

    def times(attention: float, rows: int, launch: Launch, reduce: float) -> HeadTimes:
        item = attention * PROGRAMS / max(1, -(-rows // ITEM_ROWS))
        return HeadTimes(attention, launch.tail * item, launch.shortest * item, gather, reduce)

    # A forward's items are query tiles of each query head, a backward's key tiles with all query heads that share them.
    return (
        times(attention, heads_each * rank_stride, FORWARD_LAUNCH, 0.0),
        times(BACKWARD_OVER_FORWARD * attention, world_size * rank_stride, BACKWARD_LAUNCH, reduce),
    )


@lru_cache(maxsize=64)
def head_groups(
    kv_heads: int, largest: int, in_turn: int | None, kept: bool, forward: HeadTimes, backward: HeadTimes
) -> Groups:
    """The groups that take least time, of equally good ones the fewest.

    Args:
        largest, in_turn: of `Memory`.
        kept: the backward takes the keys that the forward gathered.
    """
    # Without anything to carry, in a world of one rank, there is nothing to overlap.
    least = min(LEAST_GROUPS if forward.gather else 1, kv_heads)
    found = [sizes for sizes in _candidates(kv_heads, largest) if len(sizes) >= least]
    if kept:
        given = replace(backward, gather=0.0)
        # A forward gathers every group into a buffer of its own then.
        best = min(found, key=lambda sizes: pass_ms(sizes, None, forward) + pass_ms(sizes[::-1], in_turn, given))
        of_forward = _slices(best)
        return Groups(of_forward, of_forward[::-1])
    return Groups(*(_slices(min(found, key=lambda sizes: pass_ms(sizes, in_turn, times))) for times in (forward, backward)))


def pass_ms(sizes: Sequence[int], in_turn: int | None, times: HeadTimes) -> float:
    """Milliseconds of a pass over groups of so many heads each, by the model."""
    return overlapped_ms(
        [STARTUP + max(n * times.attention + times.tail, times.shortest) for n in sizes],
        [n * times.gather for n in sizes],
        [n * times.reduce for n in sizes],
        in_turn,
    )


def overlapped_ms(
    attention: Sequence[float], gathers: Sequence[float], reduces: Sequence[float], in_turn: int | None = None
) -> float:
    """When the last of a pass's launches and collectives ends, one of each for every group.

    Args:
        in_turn: buffers that groups take turns with; None: each has its own.
    """
    count = len(attention) if in_turn is None else in_turn
    computed = carried = 0.0
    gathered: list[float] = []
    reduced: list[float] = []
    for group, milliseconds in enumerate(attention):
        # Collectives run in the order in which they are queued: gathers for as long as there are free buffers, then each after
        # the reduce-scatter of the group whose buffer it takes.
        while len(gathered) < min(len(attention), group + count):
            carried = (max(carried, computed) if group else carried) + gathers[len(gathered)]
            gathered.append(carried)
        free = reduced[group - count] if group >= count else 0.0
        computed = max(computed, gathered[group], free) + milliseconds
        if any(reduces):
            carried = max(carried, computed) + reduces[group]
        reduced.append(carried if any(reduces) else 0.0)
    return max(computed, carried)


def _candidates(kv_heads: int, largest: int) -> list[tuple[int, ...]]:
    """Groups of at most `largest` heads, fewest first: small ones at the ends or none, and equal ones between, no more than one
    more than there have to be.
    """
    ends = [0, *(2**power for power in range(kv_heads.bit_length()) if 2**power <= min(largest, kv_heads // 2))]
    found = {
        (*(n for n in (first,) if n), *_equal(middle, count), *(n for n in (last,) if n))
        for first in ends
        for last in ends
        for middle in (kv_heads - first - last,)
        if middle > 0
        for count in (-(-middle // largest), -(-middle // largest) + 1)
        if count <= middle
    }
    return sorted(found, key=lambda sizes: (len(sizes), sizes))


def _equal(heads: int, count: int) -> list[int]:
    """Sizes of `count` groups of nearly as many heads."""
    return [(i + 1) * heads // count - i * heads // count for i in range(count)]


def equal_groups(kv_heads: int, count: int) -> tuple[slice, ...]:
    """So many groups of nearly as many heads each; count <= kv_heads."""
    return _slices(_equal(kv_heads, count))


def _slices(sizes: Sequence[int]) -> tuple[slice, ...]:
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(slice(stop - n, stop) for n, stop in zip(sizes, stops, strict=True))
