"""How long calls take: variants interleaved in rounds under settled clocks, medians with quartiles.

A GPU's clocks follow its temperature and power, so figures of different minutes do not compare. Every round runs every variant
a few times; compare within a round. What ran just before counts too (2% where it left the card cool), so inside the rounds every
variant follows every other one equally often.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import torch

from weft_attn.errors import require

# A measured call: takes its number, so that it can take the next copy of its inputs.
Call = Callable[[int], object]
# Of a variant, or its number.
Name = TypeVar("Name")
# Told in words what is being done.
Notify = Callable[[str], None]


def silent(_what: str) -> None:
    """Tells nobody."""


class Clock(Protocol):
    """Measures one variant."""

    def measure(self, call: Callable[[], object], repeats: int) -> float:
        """Milliseconds of one call, averaged over `repeats` calls in a row."""


class CudaClock:
    """GPU time between two events, host time included where the host is the slower of the two."""

    def measure(self, call: Callable[[], object], repeats: int) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # Runs while the host enqueues the measured calls: without it the first launch's latency would count.
        call()
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / repeats


class HostClock:
    """Wall time of the host."""

    def measure(self, call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3 / repeats


class HandoverClock:
    """Time that the host needs to give a GPU a call, which waits for nothing: the GPU is idle before, and its queue never full."""

    # Of calls of a few launches; a stream takes a thousand before it holds the host up.
    AT_A_TIME = 64

    def measure(self, call: Callable[[], object], repeats: int) -> float:
        seconds = 0.0
        for begun in range(0, repeats, self.AT_A_TIME):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(min(self.AT_A_TIME, repeats - begun)):
                call()
            seconds += time.perf_counter() - start
        return seconds * 1e3 / repeats


def clock_of(device: torch.device) -> Clock:
    """The clock that sees a device's work."""
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        rounds: rounds in which every variant runs.
        warm_up_ms: load before the first round, over all variants together, until clocks have settled.
        round_ms: time that a variant gets in a round, at least MIN_REPEATS calls.
        most_repeats: calls of a variant in a round at most.
    """

    rounds: int = 20
    warm_up_ms: float = 300.0
    round_ms: float = 20.0
    most_repeats: int = 100


MIN_REPEATS = 2
HOUSE_PACE = Pace()
QUICK_PACE = Pace(rounds=3, warm_up_ms=1.0, round_ms=1.0)
# As training loads a card: its power bounds the clocks, which bursts on a cool card run above. Under load they swing once in
# a second, and times by 3%, so a variant's turn is a whole swing: a shorter one measures which part of the swing it met.
SUSTAINED_PACE = Pace(rounds=6, warm_up_ms=2000.0, round_ms=1000.0, most_repeats=20000)


def chosen_pace(*, quick: bool, rounds: int | None, sustained: bool = False) -> Pace:
    """The house's pace, a quick or a sustained one, with the rounds that were asked for."""
    require(rounds is None or rounds >= 1, "rounds are counted", expected=">= 1", given=rounds)
    require(not (quick and sustained), "a pace is quick or sustained", expected="one of them", given="both")
    pace = QUICK_PACE if quick else SUSTAINED_PACE if sustained else HOUSE_PACE
    return pace if rounds is None else replace(pace, rounds=rounds)


@dataclass(frozen=True)
class Samples:
    """Milliseconds of one call, one figure per round."""

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.milliseconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.milliseconds, [25, 75])
        return float(low), float(high)

    def speed_over(self, other: Samples) -> float:
        """How much faster than `other`, the median over the rounds that both ran in: 2.0 is twice as fast."""
        return float(np.median(np.array(other.milliseconds) / np.array(self.milliseconds)))


def replayed(call: Call, copies: int) -> Call:
    """The call as CUDA graphs, one for each copy of its inputs: what it costs where a server replays it, without the host's time.

    Raises what the capture raises: not every library's call can be captured.
    """
    graphs = []
    for turn in range(copies):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(turn)
        graphs.append(graph)
    return lambda turn: graphs[turn % copies].replay()


def interleave(calls: Mapping[str, Call], clock: Clock, pace: Pace) -> dict[str, Samples]:
    """Time the variants in rounds; each has run before, so that nothing is compiled here."""
    names = list(calls)
    if not names:
        return {}
    numbered = {name: _numbered(call) for name, call in calls.items()}
    repeats = _warm_up(numbered, clock, pace)
    found: dict[str, list[float]] = {name: [] for name in names}
    for name in itertools.chain.from_iterable(rounds_of(names, pace.rounds)):
        found[name].append(clock.measure(numbered[name], repeats[name]))
    return {name: Samples(tuple(times)) for name, times in found.items()}


def rounds_of(names: Sequence[Name], rounds: int) -> Iterator[list[Name]]:
    """The names in the order of each round.

    A Latin square balanced for first-order carry-over (E. J. Williams, Aust. J. Sci. Res. A 2, 1949): in n rounds of an even
    number n of names, or 2 n of an odd one, every name is at every place and inside a round behind every other one equally often.
    Between rounds, those who follow each other change too.
    """
    n = len(names)
    # 0, n - 1, 1, n - 2, ...: all differences of neighbours are there once, of an odd n twice over with the order turned round.
    zigzag = [place // 2 if place % 2 == 0 else n - 1 - place // 2 for place in range(n)]
    for turn in range(rounds):
        order = zigzag if n % 2 == 0 or turn // n % 2 == 0 else zigzag[::-1]
        shift = zigzag[turn % n]
        yield [names[(place + shift) % n] for place in order]


def _numbered(call: Call) -> Callable[[], object]:
    numbers = itertools.count()
    return lambda: call(next(numbers))


def _warm_up(calls: Mapping[str, Callable[[], object]], clock: Clock, pace: Pace) -> dict[str, int]:
    """Load the device for `warm_up_ms`, then say how many calls of each variant fill `round_ms`.

    After one call of each, as many in a row as a round has: a card that waits between calls stays cool.
    """
    loaded = 0.0
    repeats = dict.fromkeys(calls, 1)
    while True:
        measured = {name: clock.measure(call, repeats[name]) for name, call in calls.items()}
        loaded += sum(one * repeats[name] for name, one in measured.items())
        repeats = {name: repeats_of(pace.round_ms, one, pace.most_repeats) for name, one in measured.items()}
        if loaded >= pace.warm_up_ms:
            return repeats


def repeats_of(round_ms: float, one_ms: float, most: int = HOUSE_PACE.most_repeats) -> int:
    """Calls that fill a round of a variant that takes `one_ms`, within MIN_REPEATS and `most`."""
    return int(min(most, max(MIN_REPEATS, round_ms // max(one_ms, 1e-6))))
