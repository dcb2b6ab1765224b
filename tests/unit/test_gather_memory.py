"""The memory that gathering takes: the formula, the cap, and how many heads fit under it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft_attn import InvalidInput
from weft_attn.distributed.gathered import _Turns
from weft_attn.distributed.memory import DEFAULT_GATHER_BYTES, plan_memory

SIZES: dict[str, Any] = dict(
    world_size=4,
    rank_stride=1000,
    kv_heads=8,
    head_dims=256,
    element_bytes=2,
    gradient_bytes=4,
    limit=None,
    keep_gathered=False,
)
ONE_HEAD = 4 * 1000 * 256 * 2 + 5 * 1000 * 256 * 4


def test_the_formula_at_one_size() -> None:
    found = plan_memory(**SIZES)
    assert (found.heads_held, found.largest, found.in_turn, found.kept, found.limit) == (8, 8, None, 0, DEFAULT_GATHER_BYTES)
    assert found.gathered == found.forward == 4 * 1000 * 8 * 256 * 2
    assert found.gradients == 5 * 1000 * 8 * 256 * 4
    assert found.backward == 8 * ONE_HEAD
    kept = plan_memory(**{**SIZES, "keep_gathered": True})
    assert (kept.gathered, kept.gradients, kept.kept) == (0, found.gradients, 4 * 1000 * 8 * 256 * 2)


@pytest.mark.parametrize(
    ("limit", "held", "largest"),
    [
        (2 * ONE_HEAD, 2, 1),
        (5 * ONE_HEAD, 4, 2),
        (6 * ONE_HEAD, 6, 3),
        (6 * ONE_HEAD - 1, 4, 2),
        (7 * ONE_HEAD, 6, 3),
        (8 * ONE_HEAD - 1, 6, 3),
        (8 * ONE_HEAD, 8, 8),
        (2**50, 8, 8),
    ],
)
def test_all_heads_are_held_where_they_fit_and_two_equal_buffers_otherwise(limit: int, held: int, largest: int) -> None:
    found = plan_memory(**{**SIZES, "limit": limit})
    assert (found.heads_held, found.largest, found.in_turn) == (held, largest, None if held == 8 else 2)
    assert found.backward == held * ONE_HEAD <= limit


def test_buffers_are_no_larger_than_as_many_equal_groups_need() -> None:
    # Eight heads in groups of at most five are two groups whatever the cap: of nine, at most four, are three of three.
    found = plan_memory(**{**SIZES, "kv_heads": 9, "limit": 8 * ONE_HEAD})
    assert (found.heads_held, found.largest) == (6, 3)


def test_a_cap_that_one_head_exceeds_is_refused_with_the_bytes_it_takes() -> None:
    with pytest.raises(InvalidInput, match=rf"max_gather_bytes.*expected >= {2 * ONE_HEAD}, given {2 * ONE_HEAD - 1}"):
        plan_memory(**{**SIZES, "limit": 2 * ONE_HEAD - 1})


def test_one_head_has_one_buffer() -> None:
    found = plan_memory(**{**SIZES, "kv_heads": 1, "limit": ONE_HEAD})
    assert (found.heads_held, found.in_turn, found.backward) == (1, None, ONE_HEAD)


@pytest.mark.parametrize(("largest", "in_turn", "heads"), [(3, 2, 6), (8, None, 8)])
def test_buffers_take_what_the_formula_says_however_heads_are_grouped(largest: int, in_turn: int | None, heads: int) -> None:
    k, v = torch.empty(5, 8, 16), torch.empty(5, 8, 24)
    for sizes in ((2, 2, 2, 2), (1, 3, 3, 1)):
        stops = [sum(sizes[: i + 1]) for i in range(4)]
        groups = tuple(slice(stop - n, stop) for n, stop in zip(sizes, stops, strict=True))
        turns = _Turns(7, k, v, groups, largest, in_turn, torch.float32)
        assert sum(one.numel() for one in turns.memory) == 7 * heads * 40
        assert [turns.buffer(group).shape for group in range(4)] == [(7, n * 40) for n in sizes]


@given(
    world_size=st.integers(1, 9),
    rank_stride=st.integers(0, 50),
    kv_heads=st.integers(1, 12),
    heads_allowed=st.integers(2, 14),
    keep=st.booleans(),
)
def test_what_a_call_takes_stays_under_the_cap(
    world_size: int, rank_stride: int, kv_heads: int, heads_allowed: int, keep: bool
) -> None:
    sizes = dict(SIZES, world_size=world_size, rank_stride=rank_stride, kv_heads=kv_heads, keep_gathered=keep)
    limit = max(1, heads_allowed * rank_stride * 256 * (world_size * 2 + (world_size + 1) * 4))
    found = plan_memory(**{**sizes, "limit": limit})
    assert found.forward <= found.backward <= limit
    assert found.heads_held == (found.largest if found.in_turn is None else found.in_turn * found.largest) <= kv_heads
    assert (found.in_turn is None) == (found.heads_held == kv_heads)
