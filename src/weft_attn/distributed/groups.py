"""Which KV heads travel and are attended to together: the groups of a pass, those that a model of it says take least time.

In the model a GPU computes and its links carry side by side, each in the order of the code (gathered.py). For n KV heads

    gather     n * gather, once their buffer is free
    attention  STARTUP + n * attention + tail, and no less than `shortest`; once they are gathered
    reduce     n * reduce, in a backward, after their attention

with the times of one KV head on a rank: of its attention, of the gather of its keys and values, of the reduce-scatter of their
gradients. Three things follow. What comes before the first attention and after the last is hidden by nothing (in a backward by
what needs no keys, docs/adr/0032, which is not in the model), so those groups are small. A small group hides little, so that what runs beside it is no longer than its attention. And every group costs a launch, at
whose end multiprocessors wait for each other, so there are few, and none so small that its work items do not fill the GPU.

What is not in the model: a collective that becomes ready while an attention kernel runs has no multiprocessors until that ends, but may
have them on another rank, where it waits and holds them (docs/adr/0015). So where long attention hides everything, no more than
one runs beside a launch, from its start: of a group between two small ones, keys are gathered with the last group's, and
gradients reduced with the first one's. Where links are as slow as attention, groups still have collectives of their own.

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
# Multiprocessors, and rows of a work item: a tile of rows of one head, what a multiprocessor works on at a time (192 in a few plans at head
# dim 64).
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
# A backward's are long: key tiles of all query heads that share them. Timed without communication, more launches cost less than 1%
# (docs/notes/2026-11-26-turns-and-masks.md).
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
class Pass:
    """All KV heads of a pass, in the order of its work.

    Attributes:
        attention: heads of each launch.
        gathers: of each gather: those of whole launches.
        reduces: of each reduce-scatter: those of whole launches; a forward has none, whatever is said here.
    """

    attention: tuple[slice, ...]
    gathers: tuple[slice, ...]
    reduces: tuple[slice, ...]

    @classmethod
    def each(cls, groups: tuple[slice, ...]) -> Pass:
        """Every group is gathered, attended to and reduced by itself."""
        return cls(groups, groups, groups)

    @classmethod
    def between(cls, first: int, middle: int, last: int) -> Pass:
        """Three launches, or fewer where there are no heads of one: gathered are the first's and all others', reduced the last's
        and all others'.
        """
        attention, gathers, reduces = (
            _slices([n for n in sizes if n])
            for sizes in ((first, middle, last), (first, middle + last), (first + middle, last))
        )
        return cls(attention, gathers, reduces)

    def gather_of(self, group: int) -> int:
        """Which gather brings a launch's keys."""
        return _holder(self.gathers, self.attention[group])

    def reduce_of(self, group: int) -> int:
        """Which reduce-scatter takes a launch's gradients away."""
        return _holder(self.reduces, self.attention[group])

    def ends_reduce(self, group: int) -> bool:
        """Whether a launch is the last of its reduce-scatter."""
        return self.attention[group].stop == self.reduces[self.reduce_of(group)].stop


def _holder(parts: tuple[slice, ...], heads: slice) -> int:
    return next(at for at, part in enumerate(parts) if part.start <= heads.start and heads.stop <= part.stop)


@dataclass(frozen=True)
class Groups:
    """Of a forward and of its backward. A backward that takes the keys that the forward gathered has the forward's `gathers`."""

    forward: Pass
    backward: Pass


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
    """The groups that take least time.

    Args:
        largest, in_turn: of `Memory`.
        kept: the backward takes the keys that the forward gathered.
    """
    # Without anything to carry, in a world of one rank, there is nothing to overlap.
    least = min(LEAST_GROUPS if forward.gather else 1, kv_heads)
    found = [one for one in _candidates(kv_heads, largest) if len(one.attention) >= least]
    if in_turn is None:
        # Without buffers that take turns.
        found += [one for one in _between(kv_heads) if len(one.attention) >= least]
    # Of equally good ones the fewest launches, then the fewest collectives.
    found.sort(key=lambda one: (len(one.attention), len(one.gathers) + len(one.reduces)))
    # A forward gathers what it attends to together.
    of_forward = [one for one in found if one.gathers == one.attention]
    if kept:
        given = replace(backward, gather=0.0)
        # A forward gathers everything into a buffer of its own then.
        pairs = [(one, other) for one in of_forward for other in found if other.gathers == one.gathers]
        return Groups(*min(pairs, key=lambda pair: pass_ms(pair[0], None, forward) + pass_ms(pair[1], in_turn, given)))
    return Groups(
        min(of_forward, key=lambda one: pass_ms(one, in_turn, forward)),
        min(found, key=lambda one: pass_ms(one, in_turn, backward)),
    )


def pass_ms(groups: Pass, in_turn: int | None, times: HeadTimes) -> float:
    """Milliseconds of a pass over these groups, by the model."""
    attention, gathers, reduces = map(counts, (groups.attention, groups.gathers, groups.reduces))
    return overlapped_ms(
        groups,
        [STARTUP + max(n * times.attention + times.tail, times.shortest) for n in attention],
        [n * times.gather for n in gathers],
        [n * times.reduce for n in reduces],
        in_turn,
    )


def overlapped_ms(
    groups: Pass, attention: Sequence[float], gathers: Sequence[float], reduces: Sequence[float], in_turn: int | None = None
) -> float:
    """When the last of a pass's launches and collectives ends.

    Args:
        attention, gathers, reduces: milliseconds of each of `groups`'.
        in_turn: buffers that take turns, a group's to itself; None: each collective has its own.
    """
    count = len(gathers) if in_turn is None else in_turn
    computed = carried = 0.0
    gathered: list[float] = []
    reduced: list[float] = []
    for group, milliseconds in enumerate(attention):
        # Collectives run in the order in which they are queued: gathers for as long as there are free buffers, then each after
        # the reduce-scatter of the group whose buffer it takes.
        while len(gathered) < min(len(gathers), group + count):
            carried = (max(carried, computed) if group else carried) + gathers[len(gathered)]
            gathered.append(carried)
        free = reduced[group - count] if in_turn is not None and group >= count else 0.0
        computed = max(computed, gathered[groups.gather_of(group)], free) + milliseconds
        if any(reduces) and groups.ends_reduce(group):
            carried = max(carried, computed) + reduces[groups.reduce_of(group)]
            reduced.append(carried)
        elif in_turn is not None:
            reduced.append(0.0)
    return max(computed, carried)


def _candidates(kv_heads: int, largest: int) -> list[Pass]:
    """Groups of at most `largest` heads, each by itself: small ones at the ends or none, and equal ones between, no more than one
    more than there have to be.
    """
    ends = _ends(kv_heads, largest)
    found = {
        (*(n for n in (first,) if n), *_equal(middle, count), *(n for n in (last,) if n))
        for first in ends
        for last in ends
        for middle in (kv_heads - first - last,)
        if middle > 0
        for count in (-(-middle // largest), -(-middle // largest) + 1)
        if count <= middle
    }
    return [Pass.each(_slices(sizes)) for sizes in sorted(found)]


def _between(kv_heads: int) -> list[Pass]:
    """For buffers that hold all heads: all heads between small groups, or none, at the ends, with a gather and a reduce-scatter less than launches."""
    ends = _ends(kv_heads, kv_heads)
    return [
        Pass.between(first, kv_heads - first - last, last) for first in ends for last in ends if kv_heads - first - last > 0
    ]


def _ends(kv_heads: int, largest: int) -> list[int]:
    """Heads of a first or last group: none, or a power of two up to half of them."""
    return [0, *(2**power for power in range(kv_heads.bit_length()) if 2**power <= min(largest, kv_heads // 2))]


def _equal(heads: int, count: int) -> list[int]:
    """Sizes of `count` groups of nearly as many heads."""
    return [(i + 1) * heads // count - i * heads // count for i in range(count)]


def equal_groups(kv_heads: int, count: int) -> tuple[slice, ...]:
    """So many groups of nearly as many heads each; count <= kv_heads."""
    return _slices(_equal(kv_heads, count))


def counts(groups: Sequence[slice]) -> list[int]:
    """Heads of each."""
    return [heads.stop - heads.start for heads in groups]


def _slices(sizes: Sequence[int]) -> tuple[slice, ...]:
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(slice(stop - n, stop) for n, stop in zip(sizes, stops, strict=True))
