"""`run_ranks`: results in order, the first failure with its traceback, no rank left behind."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from weft_attn import InvalidInput
from weft_attn.testing.ranks import RankTraceback, run_ranks


def scaled_sum(rank: int, world_size: int, factor: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    assert dist.get_world_size() == world_size
    return rank, total * factor


def rank_one_refuses(rank: int, world_size: int) -> None:
    if rank == 1:
        raise InvalidInput("a rule: expected this, given that")
    dist.barrier()


def rank_one_sleeps(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(60)


def rank_one_dies(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    time.sleep(60)


class Unpicklable(Exception):
    def __init__(self, one: Any, other: Any) -> None:
        super().__init__(f"{one} {other}")


def raises_what_cannot_be_copied(rank: int, world_size: int) -> None:
    raise Unpicklable("no", "copy")


def test_results_come_in_rank_order() -> None:
    found = run_ranks(scaled_sum, 3, torch.tensor([2.0]))
    assert [rank for rank, _ in found] == [0, 1, 2]
    assert all(total == 12.0 for _, total in found)


def test_the_first_failure_is_raised_with_its_traceback() -> None:
    with pytest.raises(InvalidInput, match="expected this, given that") as raised:
        run_ranks(rank_one_refuses, 3)
    cause = raised.value.__cause__
    assert isinstance(cause, RankTraceback)
    assert "rank 1" in str(cause)
    assert "rank_one_refuses" in str(cause)


def test_a_failure_that_cannot_be_copied_is_told() -> None:
    with pytest.raises(RuntimeError, match="failed") as raised:
        run_ranks(raises_what_cannot_be_copied, 1)
    assert "no copy" in str(raised.value.__cause__)


def test_ranks_that_do_not_finish_are_named_and_ended() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):
        run_ranks(rank_one_sleeps, 2, timeout=4)
    assert time.monotonic() - start < 15


def test_a_rank_that_dies_is_told() -> None:
    with pytest.raises(RuntimeError, match="rank 1 failed") as raised:
        run_ranks(rank_one_dies, 2)
    assert "without a result" in str(raised.value.__cause__)
