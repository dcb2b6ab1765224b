"""Where row statistics lie between the producer that writes them and the products that read them: by layouts alone, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from weft_attn.kernels.hopper import statistics


def queries_in_shared_order(queries: int) -> torch.Tensor:
    """By the rule of the producer, which a torch tensor follows as a Gluon tensor does: the query at each (i, t, h, b)."""
    rule: Callable[[torch.Tensor, int], torch.Tensor] = statistics._in_shared_order.fn
    return rule(torch.arange(queries), queries)


def word_of(place: Sequence[int]) -> int:
    """Where (i, t, h, b) lies in shared memory, the last dimension's neighbours side by side."""
    i, t, h, b = place
    return 16 * i + 4 * t + 2 * h + b


def places(bases: Sequence[Sequence[int]]) -> list[list[int]]:
    """What the numbers 0, 1, ... of a linear layout's bases stand for."""
    found = [[0, 0, 0, 0]]
    for basis in bases:
        found += [[x ^ y for x, y in zip(one, basis, strict=True)] for one in found]
    return found


@pytest.mark.parametrize("queries", [64, 128])
def test_a_thread_reads_its_own_columns_of_a_product_four_at_a_time(queries: int) -> None:
    layout = statistics._as_read(queries)
    query_at = queries_in_shared_order(queries)
    lanes, warps = places(layout.lane_bases), places(layout.warp_bases)
    assert len(lanes) == 32
    assert warps == [[0, 0, 0, 0]] * 4
    for lane, first in enumerate(lanes):
        held = [[x ^ y for x, y in zip(first, one, strict=True)] for one in places(layout.reg_bases)]
        # A product of 64 rows: a thread has two of every eight columns, and the next register holds the next of them.
        assert [int(query_at[tuple(one)]) for one in held] == [
            8 * j + 2 * (lane % 4) + b for j in range(queries // 8) for b in (0, 1)
        ]
        words = [word_of(one) for one in held]
        assert all(
            words[at] % 4 == 0 and words[at : at + 4] == list(range(words[at], words[at] + 4)) for at in range(0, len(words), 4)
        )
