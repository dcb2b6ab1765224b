"""The groups that KV heads travel in: all heads once, no larger than memory allows, and what the model of a pass finds fastest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft_attn.distributed import groups
from weft_attn.distributed.groups import Groups, HeadTimes, Launch, Pass, head_groups, head_times, overlapped_ms, pass_ms

# Llama 3 8B.
HOUSE: dict[str, Any] = dict(heads_each=4, head_dims=256, element_bytes=2, gradient_bytes=4)


def sizes(groups: Sequence[slice]) -> list[int]:
    return [heads.stop - heads.start for heads in groups]


def each(groups: Sequence[int]) -> Pass:
    return Pass.each(tuple(map(slice, (0, *itertools.accumulate(groups)), itertools.accumulate(groups))))


def of_documents(world_size: int, lengths: Sequence[int], kv_heads: int = 8) -> tuple[list[int], list[int]]:
    """Sizes of the forward's and the backward's groups of causal documents, whole and over all ranks."""
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    times = head_times(world_size=world_size, rank_stride=sum(lengths) // world_size, pairs=pairs, **HOUSE)
    found = head_groups(kv_heads, kv_heads, None, False, *times)
    return sizes(found.forward.attention), sizes(found.backward.attention)


# ---- the choice -----------------------------------------------------------------------------------------------------------


def test_a_long_document_begins_with_one_head_and_its_backward_ends_with_few() -> None:
    assert of_documents(2, [65536]) == ([1, 7], [1, 6, 1])
    assert of_documents(8, [262144]) == ([1, 7], [1, 6, 1])


def test_where_launches_cost_more_a_backward_has_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "BACKWARD_LAUNCH", Launch(tail=1.0, shortest=5.0))
    assert of_documents(2, [65536]) == ([1, 7], [6, 2])


@pytest.mark.parametrize("lengths", [[16384], [512, 14784, 1088], [8192, 8192], [6208, 6400, 3200, 320, 256]], ids=str)
def test_short_work_has_no_more_launches_than_two_halves(lengths: list[int]) -> None:
    forward, backward = of_documents(2, lengths)
    assert len(forward) == 2
    assert forward[0] <= 2
    assert backward == [4, 4]


def test_where_links_are_the_limit_no_group_carries_most_of_the_heads() -> None:
    for found in of_documents(8, [8192] * 32):
        assert max(found) <= 3


def test_one_head_is_one_group_and_two_heads_are_two() -> None:
    assert of_documents(2, [65536], 1) == ([1], [1])
    assert of_documents(2, [65536], 2) == ([1, 1], [1, 1])


def test_one_rank_has_one_group() -> None:
    assert of_documents(1, [65536]) == ([8], [8])


def test_no_more_than_one_collective_runs_beside_a_launch_of_a_long_document() -> None:
    times = head_times(world_size=2, rank_stride=32768, pairs=2**31, **HOUSE)
    backward = head_groups(8, 8, None, False, *times).backward
    assert (sizes(backward.attention), sizes(backward.gathers), sizes(backward.reduces)) == ([1, 6, 1], [1, 7], [7, 1])


def test_a_backward_with_kept_keys_has_the_forwards_gathers() -> None:
    times = head_times(world_size=2, rank_stride=32768, pairs=2**31, **HOUSE)
    found = head_groups(8, 8, None, True, *times)
    assert sizes(found.forward.attention)[0] <= 2
    assert found.backward.gathers == found.forward.gathers == found.forward.attention
    assert sizes(found.backward.reduces)[-1] <= 2


def test_the_collective_of_a_launch_is_the_one_that_holds_its_heads() -> None:
    one = Pass.between(2, 5, 1)
    assert [one.gather_of(group) for group in range(3)] == [0, 1, 1]
    assert [one.reduce_of(group) for group in range(3)] == [0, 0, 1]
    assert [one.ends_reduce(group) for group in range(3)] == [False, True, True]
    assert Pass.between(0, 8, 0) == Pass.each((slice(0, 8),))
    assert Pass.between(0, 7, 1).gathers == (slice(0, 8),)


@given(
    kv_heads=st.integers(1, 33),
    largest=st.integers(1, 33),
    kept=st.booleans(),
    pairs=st.integers(0, 2**40),
    rank_stride=st.integers(0, 2**18),
    world_size=st.integers(2, 64),
)
def test_every_head_is_in_one_group_and_no_group_exceeds_memory(
    kv_heads: int, largest: int, kept: bool, pairs: int, rank_stride: int, world_size: int
) -> None:
    largest = min(kv_heads, largest)
    in_turn = None if largest == kv_heads else 2
    times = head_times(world_size=world_size, rank_stride=rank_stride, pairs=pairs, **HOUSE)
    found = head_groups(kv_heads, largest, in_turn, kept, *times)
    for of_pass in (found.forward, found.backward):
        for groups_of in (of_pass.attention, of_pass.gathers, of_pass.reduces):
            assert [head for heads in groups_of for head in range(kv_heads)[heads]] == list(range(kv_heads))
            assert 1 <= min(sizes(groups_of)) <= max(sizes(groups_of)) <= largest
        # A launch has all its keys from one gather, and all its gradients in one reduce-scatter.
        for group in range(len(of_pass.attention)):
            of_pass.gather_of(group), of_pass.reduce_of(group)
        # Buffers that take turns are a group's.
        assert in_turn is None or of_pass.attention == of_pass.reduces
        assert in_turn is None or kept or of_pass.attention == of_pass.gathers
        # Two groups at least, where there is anything to carry.
        assert len(of_pass.attention) >= min(2 if rank_stride else 1, kv_heads)
    halves = each([kv_heads // 2, kv_heads - kv_heads // 2])
    if not kept and in_turn is None and kv_heads > 1 and rank_stride:
        for of_pass, one in zip((found.forward, found.backward), times, strict=True):
            assert pass_ms(of_pass, None, one) <= pass_ms(halves, None, one)


def test_no_grouping_of_eight_heads_is_much_faster_than_those_that_are_considered() -> None:
    every = [
        tuple(b - a for a, b in itertools.pairwise((0, *cuts, 8)))
        for count in range(1, 5)
        for cuts in itertools.combinations(range(1, 8), count)
    ]
    for world_size, lengths in ((2, [65536]), (2, [16384]), (8, [65536]), (8, [8192] * 8), (8, [8192] * 32), (64, [8192] * 64)):
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        times = head_times(world_size=world_size, rank_stride=sum(lengths) // world_size, pairs=pairs, **HOUSE)
        found = head_groups(8, 8, None, False, *times)
        for of_pass, one in zip((found.forward, found.backward), times, strict=True):
            assert pass_ms(of_pass, None, one) <= 1.05 * min(pass_ms(each(others), None, one) for others in every)


# ---- the model ------------------------------------------------------------------------------------------------------------


def test_times_of_a_head() -> None:
    forward, backward = head_times(world_size=2, rank_stride=1024, pairs=2**20, **HOUSE)
    assert forward.attention == pytest.approx(2 * 256 * 4 * 2**19 / groups.FLOPS_PER_MS)
    assert backward.attention == pytest.approx(2.5 * forward.attention)
    assert forward.gather == backward.gather == pytest.approx(1024 * 256 * 2 / groups.BYTES_PER_MS)
    assert (forward.reduce, backward.reduce) == (0.0, pytest.approx(2 * forward.gather))
    # 4 x 8 query tiles of 128 rows, 16 key tiles.
    for times, launch, items in ((forward, groups.FORWARD_LAUNCH, 32), (backward, groups.BACKWARD_LAUNCH, 16)):
        item = times.attention * groups.PROGRAMS / items
        assert (times.tail, times.shortest) == (pytest.approx(launch.tail * item), pytest.approx(launch.shortest * item))


def scheduled_ms(attention: list[float], gathers: list[float], reduces: list[float], buffers: int) -> float:
    """Two queues filled in the order of the code (gathered.py): a collective waits for what was computed before it was queued."""
    compute = link = 0.0
    gathered: dict[int, float] = {}
    reduced: dict[int, float] = {}

    def start_gather(group: int) -> None:
        nonlocal link
        if group < len(attention):
            link = gathered[group] = max(link, compute) + gathers[group]

    for group in range(buffers):
        start_gather(group)
    for group, milliseconds in enumerate(attention):
        if group > 0:
            start_gather(group - 1 + buffers)
        compute = max(compute, gathered[group], reduced.get(group - buffers, 0.0)) + milliseconds
        if reduces:
            link = reduced[group] = max(link, compute) + reduces[group]
    return max(compute, link if reduces else 0.0)


MS = st.floats(0.015625, 64, width=16)


@given(st.lists(st.tuples(MS, MS, MS), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_the_model_is_the_schedule(times: list[tuple[float, float, float]], in_turn: bool, backward: bool) -> None:
    attention, gathers, reduces = (list(one) for one in zip(*times, strict=True))
    buffers = min(2, len(times)) if in_turn else len(times)
    groups = each([1] * len(times))
    found = overlapped_ms(groups, attention, gathers, reduces if backward else [0.0] * len(times), buffers if in_turn else None)
    assert found == pytest.approx(scheduled_ms(attention, gathers, reduces if backward else [], buffers))


@given(st.lists(MS, min_size=7, max_size=7))
def test_the_model_of_a_group_between_two_has_two_gathers_and_two_reductions(times: list[float]) -> None:
    first, middle, last, gather, others, reduce, rest = times
    # The middle launch waits for all other heads' keys; the reductions for the middle and for the last launch.
    middle_ends = max(gather + first, gather + others) + middle
    expected = max(middle_ends + last, middle_ends + reduce) + rest
    found = overlapped_ms(Pass.between(1, 6, 1), [first, middle, last], [gather, others], [reduce, rest])
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(("k", "c", "r"), [(5.0, 1.0, 2.0), (2.0, 3.0, 6.0), (4.0, 3.0, 2.0), (0.0, 1.0, 1.0)])
def test_equal_groups_that_take_turns_expose_the_first_gather_and_the_last_reduction(
    count: int, k: float, c: float, r: float
) -> None:
    buffers = min(2, count)
    groups = each([1] * count)
    assert overlapped_ms(groups, [k] * count, [c] * count, [0.0] * count, buffers) == c + (count - 1) * max(k, c) + k
    beside = [(c if g < count - 1 else 0.0) + (r if g > 0 else 0.0) for g in range(count)]
    expected = c + sum(max(k, one) for one in beside) + r
    assert overlapped_ms(groups, [k] * count, [c] * count, [r] * count, buffers) == pytest.approx(expected)


def test_a_launch_has_a_least_time_and_costs_its_start_and_its_end() -> None:
    times = HeadTimes(attention=1.0, tail=0.5, shortest=3.0, gather=0.0)
    assert pass_ms(each([8]), None, times) == pytest.approx(8 + groups.STARTUP + 0.5)
    assert pass_ms(each([1, 7]), None, times) == pytest.approx(3 + 7 + 2 * groups.STARTUP + 0.5)


def test_groups_are_slices_in_order_of_work() -> None:
    times = head_times(world_size=2, rank_stride=32768, pairs=2**31, **HOUSE)
    assert head_groups(8, 8, None, False, *times) == Groups(Pass.between(1, 7, 0), Pass.between(1, 6, 1))
