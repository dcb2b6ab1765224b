"""Timing over the ranks of a process group: a call takes as long as its slowest rank.

Every measurement begins at a barrier, so that no rank is billed for another's lateness before it; the ranks' figures are
exchanged after it, so that all ranks count the same repeats and none waits in a collective that another has skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from weft_attn.bench.timing import Call, Clock, Pace, Samples, interleave, rotation


@dataclass(frozen=True)
class GroupSamples:
    """Milliseconds of one call by round and rank."""

    by_rank: tuple[tuple[float, ...], ...]

    @property
    def slowest(self) -> Samples:
        """The slowest rank of each round: what the call costs the group."""
        return Samples(tuple(max(ranks) for ranks in self.by_rank))

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

    def __init__(self, clock: Clock, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self._clock, self._device, self._group = clock, device, group
        self.history: list[tuple[float, ...]] = []

    def measure(self, call: Callable[[], object], repeats: int) -> float:
        """Milliseconds of one call on the slowest rank, the same figure on every rank."""
        # A reduction of one number is a barrier that NCCL and gloo both have, on the device that the ranks use.
        dist.all_reduce(torch.zeros(1, device=self._device), group=self._group)
        own = torch.tensor([self._clock.measure(call, repeats)], dtype=torch.float64, device=self._device)
        everyone = own.new_empty(dist.get_world_size(self._group))
        dist.all_gather_into_tensor(everyone, own, group=self._group)
        self.history.append(tuple(everyone.tolist()))
        return max(self.history[-1])


def interleave_over_ranks(calls: Mapping[str, Call], clock: GroupClock, pace: Pace) -> dict[str, GroupSamples]:
    """`timing.interleave` on all ranks at once, with what each rank measured. The same names in the same order on every rank."""
    interleave(calls, clock, pace)
    order = list(rotation(list(calls), pace.rounds)) if calls else []
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    # The warm-up's measurements come before the rounds'.
    for name, ranks in zip(order, clock.history[len(clock.history) - len(order) :], strict=True):
        measured[name].append(ranks)
    return {name: GroupSamples(tuple(rounds)) for name, rounds in measured.items()}
