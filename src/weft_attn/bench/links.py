"""How fast the ranks' links are: the collectives of context parallelism alone, over a range of sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from weft_attn.bench.group_timing import GroupClock, GroupSamples, interleave_over_ranks
from weft_attn.bench.rates import ALL_GATHER, REDUCE_SCATTER
from weft_attn.bench.timing import Pace
from weft_attn.distributed.collectives import Ranks

# What a rank receives from all others together.
SIZES = tuple(2**power for power in range(20, 29))
QUICK_SIZES = (2**12, 2**14)
ELEMENTS = 256
GIGABYTES = "GB/s"


@dataclass(frozen=True)
class Link:
    """A collective of one size: how long it takes, and whether every rank got what it had to."""

    operation: str
    bytes_received: int
    samples: GroupSamples
    right: bool


def measure_links(ranks: Ranks, device: torch.device, clock: GroupClock, pace: Pace, sizes: Sequence[int]) -> list[Link]:
    """Gathers and reduce-scatters of these many bytes received by a rank, nearly; collective."""
    built = {
        (operation, size): build(ranks, device, size)
        for size in sizes
        for operation, build in ((ALL_GATHER, _gather), (REDUCE_SCATTER, _reduce))
    }
    right = {}
    for key, (call, check, _) in built.items():
        call(0)
        wrong = torch.tensor([0.0 if check() else 1.0], device=device)
        dist.all_reduce(wrong)
        right[key] = not wrong.item()
    samples = interleave_over_ranks({f"{key}": call for key, (call, _, _) in built.items()}, clock, pace)
    return [Link(key[0], received, samples[f"{key}"], right[key]) for key, (_, _, received) in built.items()]


Built = tuple[Callable[[int], object], Callable[[], bool], int]


def _gather(ranks: Ranks, device: torch.device, size: int) -> Built:
    buffer = _buffer(ranks, device, size, torch.bfloat16)
    ranks.own_rows(buffer).fill_(ranks.rank + 1)
    expected = torch.arange(1, ranks.world_size + 1, device=device).repeat_interleave(len(buffer) // ranks.world_size)
    return (
        lambda _turn: ranks.all_gather(buffer).wait(),
        lambda: bool((buffer == expected[:, None]).all()),
        buffer.nbytes // ranks.world_size * (ranks.world_size - 1),
    )


def _reduce(ranks: Ranks, device: torch.device, size: int) -> Built:
    buffer = _buffer(ranks, device, size, torch.float32).fill_(ranks.rank + 1)
    output = torch.empty_like(ranks.own_rows(buffer))
    return (
        lambda _turn: ranks.reduce_scatter(output, buffer).wait(),
        lambda: bool((output == ranks.world_size * (ranks.world_size + 1) / 2).all()),
        output.nbytes * (ranks.world_size - 1),
    )


def _buffer(ranks: Ranks, device: torch.device, size: int, dtype: torch.dtype) -> torch.Tensor:
    rows = max(1, size // (ranks.world_size - 1) // (ELEMENTS * dtype.itemsize))
    return torch.zeros(ranks.world_size * rows, ELEMENTS, dtype=dtype, device=device)
