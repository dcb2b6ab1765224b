"""Where row statistics lie between the producer that writes them and the products that read them: by layouts alone, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

pytest.importorskip("triton.experimental.gluon")

from weft_attn.kernels.hopper import statistics

SHAPE_OF_16 = (4, 2, 2)


def query_of(place: Sequence[int]) -> int:
    """Of (i, t, h, b): the query that the module's text says it is of."""
    i, t, h, b = place
    return 16 * i + 8 * h + 2 * t + b


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
    lanes, warps = places(layout.lane_bases), places(layout.warp_bases)
    assert len(lanes) == 32
    assert warps == [[0, 0, 0, 0]] * 4
    for lane, first in enumerate(lanes):
        held = [[x ^ y for x, y in zip(first, one, strict=True)] for one in places(layout.reg_bases)]
        # A product of 64 rows: a thread has two of every eight columns, and the next register holds the next of them.
        assert [query_of(one) for one in held] == [8 * j + 2 * (lane % 4) + b for j in range(queries // 8) for b in (0, 1)]
        words = [word_of(one) for one in held]
        assert all(
            words[at] % 4 == 0 and words[at : at + 4] == list(range(words[at], words[at] + 4)) for at in range(0, len(words), 4)
        )


@pytest.mark.parametrize("warps", [1, 4])
def test_the_producer_writes_every_word(warps: int) -> None:
    layout = statistics._as_written(warps)
    covered = [
        n * lanes * w for n, lanes, w in zip(layout.size_per_thread, layout.threads_per_warp, layout.warps_per_cta, strict=True)
    ]
    # What a layout covers is repeated along the first dimension, or held by several threads.
    assert tuple(covered[1:]) == SHAPE_OF_16
    threads = 1
    for lanes in layout.threads_per_warp:
        threads *= lanes
    assert threads == 32


def test_each_query_has_one_word() -> None:
    everything = [(i, t, h, b) for i in range(8) for t in range(4) for h in range(2) for b in range(2)]
    assert sorted(map(query_of, everything)) == sorted(map(word_of, everything)) == list(range(128))
