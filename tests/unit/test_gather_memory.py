"""The memory that gathering takes: the formula, the cap, and groups of heads that follow from it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft_attn import InvalidInput
from weft_attn.distributed.memory import DEFAULT_GATHER_BYTES, head_groups, plan_memory

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
ONE_HEAD = 2 * (4 * 1000 * 256 * 2 + 5 * 1000 * 256 * 4)


def test_the_formula_at_one_size() -> None:
    found = plan_memory(**SIZES)
    assert (found.heads_per_group, found.groups, found.kept, found.limit) == (4, 2, 0, DEFAULT_GATHER_BYTES)
    assert found.gathered == found.forward == 2 * 4 * 1000 * 4 * 256 * 2
    assert found.gradients == 2 * 5 * 1000 * 4 * 256 * 4
    assert found.backward == 4 * ONE_HEAD
    kept = plan_memory(**{**SIZES, "keep_gathered": True})
    assert (kept.gathered, kept.gradients, kept.kept) == (0, found.gradients, 4 * 1000 * 8 * 256 * 2)


@pytest.mark.parametrize(
    ("limit", "heads", "groups"), [(ONE_HEAD, 1, 8), (3 * ONE_HEAD, 3, 3), (3 * ONE_HEAD - 1, 2, 4), (2**50, 4, 2)]
)
def test_groups_are_as_large_as_the_cap_allows_and_at_least_two(limit: int, heads: int, groups: int) -> None:
    found = plan_memory(**{**SIZES, "limit": limit})
    assert (found.heads_per_group, found.groups) == (heads, groups)


def test_a_cap_that_one_head_exceeds_is_refused_with_the_bytes_it_takes() -> None:
    with pytest.raises(InvalidInput, match=rf"max_gather_bytes.*expected >= {ONE_HEAD}, given {ONE_HEAD - 1}"):
        plan_memory(**{**SIZES, "limit": ONE_HEAD - 1})


def test_one_head_has_one_buffer() -> None:
    found = plan_memory(**{**SIZES, "kv_heads": 1})
    assert (found.heads_per_group, found.groups, found.backward) == (1, 1, ONE_HEAD // 2)


@given(
    world_size=st.integers(1, 9),
    rank_stride=st.integers(0, 50),
    kv_heads=st.integers(1, 12),
    heads_allowed=st.integers(1, 14),
    keep=st.booleans(),
)
def test_what_a_call_takes_stays_under_the_cap(
    world_size: int, rank_stride: int, kv_heads: int, heads_allowed: int, keep: bool
) -> None:
    sizes = dict(SIZES, world_size=world_size, rank_stride=rank_stride, kv_heads=kv_heads, keep_gathered=keep)
    limit = max(1, heads_allowed * 2 * rank_stride * 256 * (world_size * 2 + (world_size + 1) * 4))
    found = plan_memory(**{**sizes, "limit": limit})
    assert found.backward <= limit
    groups = head_groups(kv_heads, found.heads_per_group)
    assert len(groups) == found.groups
    assert [head for group in groups for head in range(kv_heads)[group]] == list(range(kv_heads))
    assert max(g.stop - g.start for g in groups) == found.heads_per_group
    assert min(g.stop - g.start for g in groups) >= found.heads_per_group - 1 > -1
