"""The list of a persistent grid: what its numbers stand for, and the rounds in which programs walk in step."""

from __future__ import annotations

import itertools
from functools import lru_cache

import pytest
import torch
import triton
import triton.language as tl

from weft_attn.kernels.triton.tiles import direction_of_walk, place_in_list, program_item_and_head
from weft_attn.plan.in_step import BY_ITEM, BY_ROUND, UP_IN_EVEN, UP_IN_ODD


@triton.jit
def _place_kernel(out_ptr, total, n_items, n_heads, per_wave, last_heads, programs):  # type: ignore[no-untyped-def]
    for number in range(total):
        item, head, wave, round_number = place_in_list(number, n_items, n_heads, per_wave, last_heads, programs)
        tl.store(out_ptr + 4 * number, item)
        tl.store(out_ptr + 4 * number + 1, head)
        tl.store(out_ptr + 4 * number + 2, round_number)
        tl.store(out_ptr + 4 * number + 3, wave)


@triton.jit
def _direction_kernel(out_ptr, walk, waves):  # type: ignore[no-untyped-def]
    for wave in range(waves):
        for round_number in range(2):
            tl.store(out_ptr + 2 * wave + round_number, direction_of_walk(walk, wave, round_number))


@triton.jit
def _portable_kernel(out_ptr, n_items, n_heads, per_wave):  # type: ignore[no-untyped-def]
    item, head = program_item_and_head(n_items, n_heads, per_wave)
    tl.store(out_ptr + 2 * tl.program_id(0), item)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, head)


@lru_cache
def places(n_items: int, heads: int, per_wave: int, last_heads: int, programs: int) -> torch.Tensor:
    """(numbers, 4) item, head, round, wave."""
    out = torch.full((n_items * heads, 4), -9, dtype=torch.int32)
    _place_kernel[(1,)](out, len(out), n_items, heads, per_wave, last_heads, programs)
    return out


SHAPES = [
    (1, 1, 1, 0, 4),
    (5, 3, 1, 0, 4),
    (5, 8, 3, 1, 7),
    (16, 8, 2, 3, 11),
    (7, 4, 4, 4, 132),
    (20, 6, 1, 6, 9),
    (33, 5, 2, 2, 16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_item_of_every_head_is_one_number(shape: tuple[int, ...]) -> None:
    found = places(*shape)[:, :2].tolist()
    assert sorted(map(tuple, found)) == [(item, head) for item in range(shape[0]) for head in range(shape[1])]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_wave_has_its_longest_items_first_and_the_last_one_heads_enough(shape: tuple[int, ...]) -> None:
    n_items, heads, per_wave, last_heads, _ = shape
    found = places(*shape)
    # A wave begins where items begin anew.
    starts = [0] + [at for at in range(1, len(found)) if found[at, 0] < found[at - 1, 0]] + [len(found)]
    waves = [found[one:other] for one, other in itertools.pairwise(starts)] if n_items > 1 else [found]
    assert all((wave[1:, 0] >= wave[:-1, 0]).all() for wave in waves)
    sizes = [len(wave[:, 1].unique()) for wave in waves]
    assert sizes[-1] >= min(last_heads, heads)
    if n_items > 1:
        assert all(size == per_wave for size in sizes[:-1])


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] == 0], ids=str)
def test_without_last_heads_the_list_is_the_portable_grid(shape: tuple[int, ...]) -> None:
    n_items, heads, per_wave, _, _ = shape
    portable = torch.zeros(n_items * heads, 2, dtype=torch.int32)
    _portable_kernel[(len(portable),)](portable, n_items, heads, per_wave)
    assert torch.equal(places(*shape)[:, :2], portable)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounds_follow_each_other_and_are_about_a_grid_long(shape: tuple[int, ...]) -> None:
    programs = shape[4]
    found = places(*shape)
    rounds = found[:, 2]
    assert rounds[0] == 0
    steps = rounds[1:] - rounds[:-1]
    assert ((steps == 0) | (steps == 1)).all()
    assert rounds.unique(return_counts=True)[1].max() < 2 * programs


def test_two_rounds_of_causal_items_are_one_wave() -> None:
    # 32 items on 33 programs: two heads a wave, each wave 64 numbers.
    rounds = places(32, 8, 2, 2, 33)[:, 2]
    assert rounds.view(4, 2, 32).eq(torch.arange(8).view(4, 2, 1)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_wave_is_counted_where_its_heads_begin(shape: tuple[int, ...]) -> None:
    _, heads, per_wave, last_heads, _ = shape
    found = places(*shape)
    expected = torch.clamp(found[:, 1] // per_wave, max=(heads - last_heads) // per_wave)
    assert torch.equal(found[:, 3], expected)


@pytest.mark.parametrize(
    ("walk", "expected"),
    [
        (BY_ROUND, [-1, 1, -1, 1, -1, 1]),
        (BY_ITEM, [-1] * 6),
        (BY_ITEM + UP_IN_EVEN, [1, 1, -1, -1, 1, 1]),
        (BY_ITEM + UP_IN_ODD, [-1, -1, 1, 1, -1, -1]),
        (BY_ITEM + UP_IN_EVEN + UP_IN_ODD, [1] * 6),
    ],
)
def test_a_walk_is_what_the_host_says_of_it(walk: int, expected: list[int]) -> None:
    out = torch.zeros(6, dtype=torch.int32)
    _direction_kernel[(1,)](out, walk, 3)
    assert out.tolist() == expected
