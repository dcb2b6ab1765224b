"""Timing over the ranks of a process group: a call takes as long as its slowest rank.

Every measurement begins at a barrier, so that no rank is billed for another's lateness before it; the ranks' figures are
exchanged after it, so that all ranks count the same repeats and none waits in a collective that another has skipped.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from weft_attn.bench.timing import Call, Clock, Pace, Samples, interleave, rounds_of
from weft_attn.distributed.collectives import Ranks


@dataclass(frozen=True)
class GroupSamples:
    """Milliseconds of one call by round and rank."""

    by_rank: tuple[tuple[float, ...], ...]

    @property
    def slowest(self) -> Samples:
        """The slowest rank of each round: what the call costs the group."""
        return Samples(tuple(max(ranks) for ranks in self.by_rank))

    @property
    def of_slowest_rank(self) -> Samples:
        """The rank whose median is the largest, in every round: for work that no rank shares with another."""
        by_round = np.array(self.by_rank)
        return Samples(tuple(by_round[:, int(np.argmax(np.median(by_round, axis=0)))].tolist()))

    @property
    def mean(self) -> Samples:
        """The ranks' mean of each round: for work that no rank shares with another."""
        return Samples(tuple(float(np.mean(ranks)) for ranks in self.by_rank))

    @property
    def spread_ms(self) -> float:
        """Slowest less fastest rank, the median over the rounds."""
        return float(np.median([max(ranks) - min(ranks) for ranks in self.by_rank]))


class GroupClock:
    """A clock on every rank, read together; `history` holds what each rank measured, one entry a measurement."""

    def __init__(self, clock: Clock, ranks: Ranks, device: torch.device) -> None:
        self._clock, self._ranks, self._device = clock, ranks, device
        self.history: list[tuple[float, ...]] = []

    def measure(self, call: Callable[[], object], repeats: int) -> float:
        """Milliseconds of one call on the slowest rank, the same figure on every rank."""
        # A gather of one number is a barrier: nobody has it before everybody came.
        self._exchanged(0.0)
        self.history.append(self._exchanged(self._clock.measure(call, repeats)))
        return max(self.history[-1])

    def _exchanged(self, own: float) -> tuple[float, ...]:
        """Every rank's number."""
        if self._ranks.world_size == 1:
            return (own,)
        everyone = torch.zeros(self._ranks.world_size, dtype=torch.float64, device=self._device)
        self._ranks.own_rows(everyone).fill_(own)
        self._ranks.all_gather(everyone).wait()
        return tuple(everyone.tolist())


# A moment of a device's work: an event of its stream, or seconds of the host where it has none.
Moment = torch.cuda.Event | float


def now(device: torch.device) -> Moment:
    """The moment that the device's current stream comes to here."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds_between(first: Moment, last: Moment) -> float:
    """Waits until the last one has come."""
    if isinstance(first, float) or isinstance(last, float):
        assert isinstance(first, float)
        assert isinstance(last, float)
        return (last - first) * 1e3
    last.synchronize()
    return float(first.elapsed_time(last))


def interleave_over_ranks(calls: Mapping[str, Call], clock: GroupClock, pace: Pace) -> dict[str, GroupSamples]:
    """`timing.interleave` on all ranks at once, with what each rank measured. The same names in the same order on every rank."""
    interleave(calls, clock, pace)
    order = list(itertools.chain.from_iterable(rounds_of(list(calls), pace.rounds)))
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    # The warm-up's measurements come before the rounds'.
    for name, ranks in zip(order, clock.history[len(clock.history) - len(order) :], strict=True):
        measured[name].append(ranks)
    return {name: GroupSamples(tuple(rounds)) for name, rounds in measured.items()}
