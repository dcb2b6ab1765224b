"""A persistent grid's list: documents one after the other, programs that walk in step, and less memory read for it."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft_attn.bench.cases import log_normal_lengths
from weft_attn.distributed.shard import sharded_batch
from weft_attn.plan import Plan, Slice
from weft_attn.plan.build import concat_lengths
from weft_attn.plan.in_step import (
    BY_ITEM,
    BY_ROUND,
    UP_IN_EVEN,
    UP_IN_ODD,
    Grid,
    arrange,
    components,
    heads_in_step,
)
from weft_attn.plan.slices import transpose
from weft_attn.plan.stream import ITEM_FIELDS, LATE_TILES, Stream, Tiling, host_stream

PROGRAMS = 132
# Query tiles of a head that the cache of the model holds, of q, dout and dq.
CACHED_TILES = 480
GROUP = 4


def packed(lengths: list[int]) -> Plan:
    return Plan.from_cu_seqlens(concat_lengths(lengths), concat_lengths(lengths), causal=True)


def zigzag(rank: int, world_size: int, *lengths: int) -> Plan:
    return sharded_batch("zigzag", concat_lengths(lengths).tobytes(), rank, world_size).plan(True, (None, None))


def listed(plan: Plan, grid: Grid | None) -> Stream:
    return host_stream(plan, Tiling(128, 64, transposed=True, masks_ragged=True, grid=grid))


def tiles_in_order(stream: Stream, item: int, up: bool) -> list[int]:
    """Query tiles of an item as a program walks them: early edge tiles, the interior, late edge tiles, or the other way round."""
    _, _, interior_run, interior_tiles, edge_run, edge_tiles, late, _ = stream.items[item].tolist()
    # Without a grid the column says that the item is not split.
    late_run, late_tiles = edge_run + max(late, 0) // LATE_TILES, max(late, 0) % LATE_TILES
    parts = [(edge_run, edge_tiles - late_tiles), (interior_run, interior_tiles), (late_run, late_tiles)]
    found: list[int] = []
    for run, n_tiles in parts if up else parts[::-1]:
        end = len(found) + n_tiles
        while len(found) < end:
            col, n = stream.runs[run][:2].tolist()
            part = [col // 64 + at for at in range(n)]
            found += part if up else part[::-1]
            run += 1
    return found


def tiles_read(stream: Stream, heads: int) -> tuple[int, float]:
    """Query tiles that a cache of CACHED_TILES reads from memory when the grid goes through the list for so many KV heads, a tile a step;
    and how much of the grid works until the last item ends.
    """
    per_wave = stream.heads_per_wave
    assert heads % per_wave == 0
    rounds = max(1, (len(stream.items) * per_wave + PROGRAMS // 2) // PROGRAMS)
    length = -(-len(stream.items) * per_wave // rounds)
    queue = iter(
        [
            (head, item, wave * rounds + (item * per_wave + head % per_wave) // length)
            for wave in range(heads // per_wave)
            for item in range(len(stream.items))
            for head in range(wave * per_wave, (wave + 1) * per_wave)
        ]
    )
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    free = [(0, program) for program in range(PROGRAMS)]
    work: dict[int, tuple[int, list[int]]] = {}  # head, tiles left
    read = steps = last = 0
    while free:
        now, program = heapq.heappop(free)
        head, left = work.get(program, (0, []))
        while not left:
            found = next(queue, None)
            if found is None:
                break
            head, item, round_number = found
            walk = int(stream.items[item, 7])
            up = round_number % 2 == 1
            if walk & BY_ITEM:
                up = bool(walk & (UP_IN_ODD if head // per_wave % 2 else UP_IN_EVEN))
            left = tiles_in_order(stream, item, up)[::-1]
        if not left:
            last = max(last, now)
            continue
        tile = (head, left.pop())
        work[program] = (head, left)
        read += tile not in cache
        cache[tile] = None
        cache.move_to_end(tile)
        if len(cache) > CACHED_TILES // GROUP:
            cache.popitem(last=False)
        steps += 1
        heapq.heappush(free, (now + 1, program))
    return read, steps / (last * PROGRAMS)


# ---- the order ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4), st.integers(0, 30), st.integers(1, 4)), max_size=12))
def test_slices_belong_together_that_share_rows_or_columns_through_others(slices: list[tuple[int, int, int, int]]) -> None:
    table = np.array([(*one, 0, 0) for one in slices], np.int64).reshape(-1, 6)
    found = components(table)

    def meet(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
        return any(a[i] < b[i] + b[i + 1] and b[i] < a[i] + a[i + 1] for i in (0, 2))

    expected = list(range(len(slices)))
    for _ in slices:
        for a, b in itertools.permutations(range(len(slices)), 2):
            if meet(slices[a], slices[b]):
                expected[a] = expected[b] = min(expected[a], expected[b])
    pairs = itertools.combinations(range(len(slices)), 2)
    assert all((found[a] == found[b]) == (expected[a] == expected[b]) for a, b in pairs)
    assert set(found.tolist()) == set(range(len(set(expected))))


def test_documents_come_one_after_the_other_largest_first_and_the_last_items_longest_first() -> None:
    lengths = log_normal_lengths(38, 65536)
    stream = listed(packed(lengths), Grid(PROGRAMS, 8))
    document = np.searchsorted(np.cumsum(lengths), stream.items[:, 0], side="right")
    steps = stream.items[:, 3] + stream.items[:, 5]
    until = len(steps) - PROGRAMS // 2
    changes = np.flatnonzero(np.diff(document[:until])) + 1
    runs = np.split(np.arange(until), changes)
    assert len(runs) == len(set(document[:until])), "a document's items are next to each other"
    assert all((np.diff(steps[run]) <= 0).all() for run in runs)
    longest = [steps[run[0]] for run in runs]
    assert longest == sorted(longest, reverse=True)
    assert (np.diff(steps[until:]) <= 0).all()


def test_few_items_are_listed_longest_first_and_walked_by_rounds() -> None:
    for plan, heads in ((packed([4096] * 4), 2), (packed([16384]), 2), (packed([16384] * 2), 1), (packed([65536]), 1)):
        found, plain = listed(plan, Grid(PROGRAMS, 8)), listed(plan, None)
        slot = ITEM_FIELDS.index("slot")
        assert np.array_equal(np.delete(found.items, slot, axis=1), np.delete(plain.items, slot, axis=1))
        assert (found.items[:, 7] == BY_ROUND).all()
        assert found.heads_per_wave == heads


@pytest.mark.parametrize(
    ("items", "heads"), [(128, 2), (64, 4), (256, 1), (512, 1), (10, 8), (0, 8), (192, 2), (208, 2), (160, 2), (240, 1)]
)
def test_a_wave_is_two_or_three_rounds_of_the_grid_as_near_as_heads_come(items: int, heads: int) -> None:
    assert heads_in_step(items, 132, 8) == heads


@pytest.mark.parametrize(("length", "count"), [(4096, 16), (8192, 8), (16384, 4), (512, 128)])
def test_documents_one_after_the_other_have_one_head_a_wave(length: int, count: int) -> None:
    assert listed(packed([length] * count), Grid(PROGRAMS, 8)).heads_per_wave == 1


@pytest.mark.parametrize(("length", "count"), [(2048, 32), (512, 128)])
def test_few_heads_that_would_end_unevenly_make_a_round_of_the_largest_document(length: int, count: int) -> None:
    assert listed(packed([length] * count), Grid(PROGRAMS, 2)).heads_per_wave == 2


def test_items_that_see_everything_come_before_those_that_see_less_and_less() -> None:
    # Rank 0 of 2: other ranks' keys are seen by the whole late chunk, its own by a part of a chunk and what follows.
    stream = listed(zigzag(0, 2, 65536), Grid(PROGRAMS, 8))
    flat = stream.items[:, 5] == 0
    assert flat[:256].all()
    assert not flat[256:].any()


def test_a_few_long_items_are_not_left_for_the_end() -> None:
    steps, flat = np.array([5] * 500 + [100] * 10), np.array([True] * 500 + [False] * 10)
    order = arrange(steps, flat, np.zeros(510, np.int64), Grid(PROGRAMS, 8)).order
    assert set(order[:10]) == set(range(500, 510))


@pytest.mark.parametrize("tokens", [17408, 40000])
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_a_long_causal_document_is_not_left_for_the_end_after_full_ones(tokens: int, heads: int) -> None:
    causal, full = Slice(0, tokens, 0, tokens, None, 0), (Slice(tokens + at, 8192, tokens + at, 8192) for at in (0, 8192))
    plan = Plan([causal, *full], tokens + 16384, tokens + 16384)
    assert ends_nearly_as_evenly(plan, heads)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize(
    "plan",
    [
        zigzag(1, 2, *[4096] * 16),
        zigzag(1, 2, *[8192] * 8),
        zigzag(1, 2, 16920, 14740, 13304),
        packed([4096] * 12),
        packed([8192] * 6),
        packed(log_normal_lengths(38, 65536)),
        packed([64] * 1000),
    ],
    ids=["rank of 16", "rank of 8", "rank of 3", "12 of 4K", "6 of 8K", "38", "1000 of 64"],
)
def test_programs_end_nearly_as_evenly_as_with_items_longest_first(plan: Plan, heads: int) -> None:
    assert ends_nearly_as_evenly(plan, heads)


def ends_nearly_as_evenly(plan: Plan, heads: int) -> bool:
    """All heads of a launch, whoever is free takes the next: no more than a twentieth longer."""
    ends = []
    for stream in (listed(plan, None), listed(plan, Grid(PROGRAMS, heads))):
        lengths = stream.items[:, 3] + stream.items[:, 5] + 1
        free = [0] * PROGRAMS
        for first in range(0, heads, stream.heads_per_wave):
            for length in np.repeat(lengths, min(stream.heads_per_wave, heads - first)).tolist():
                heapq.heapreplace(free, free[0] + length)
        ends.append(max(free))
    return ends[1] <= 1.05 * ends[0]


def test_keys_that_nobody_sees_come_last_and_change_nothing() -> None:
    seen = packed([4096] * 16)
    plan = Plan(seen.slices, seen.total_q, seen.total_k + 65536)
    found, other = listed(plan, Grid(PROGRAMS, 8)), listed(seen, Grid(PROGRAMS, 8))
    count = len(other.items)
    assert np.array_equal(found.items[:count, [0, 1, 3, 5, 7]], other.items[:, [0, 1, 3, 5, 7]])
    assert found.heads_per_wave == other.heads_per_wave == 1
    assert (found.items[count:, 3] + found.items[count:, 5] == 0).all()


def test_a_long_chain_of_slices_is_one_component_soon() -> None:
    # Each chunk sees itself and the one before it: labels that move a link at a time would take a minute.
    at = np.arange(40_000)
    chain = np.stack([np.repeat(at, 2)[1:], np.repeat(at, 2)[:-1]], axis=1) * 8
    table = np.stack([chain[:, 0], np.full(len(chain), 8), chain[:, 1], np.full(len(chain), 8)], axis=1)
    began = time.monotonic()
    assert not components(table).any()
    assert time.monotonic() - began < 5


def test_every_item_is_listed_once() -> None:
    rng = np.random.default_rng(0)
    for n in (0, 1, 7, 400):
        steps, flat, component = rng.integers(0, 9, n), rng.random(n) < 0.5, rng.integers(0, 5, n)
        found = arrange(steps, flat, component, Grid(8, 3))
        assert sorted(found.order) == list(range(n))
        assert len(found.walks) == n
        assert 1 <= found.heads_per_wave <= 3


# ---- the walk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", [True, False])
def test_an_item_of_one_slice_is_walked_by_columns_edges_and_all(up: bool) -> None:
    # Ragged ends make late edge tiles, a window early and late ones.
    window = Plan.from_cu_seqlens(concat_lengths([3000]), concat_lengths([3000]), causal=True, window=(700, 0))
    late = 0
    for plan in (packed([1000, 77, 4096]), window):
        stream = listed(plan, Grid(PROGRAMS, 8))
        late += np.count_nonzero(stream.items[:, ITEM_FIELDS.index("slot")] % LATE_TILES)
        for item in range(len(stream.items)):
            found = [tile if up else -tile for tile in tiles_in_order(stream, item, up)]
            assert found == sorted(set(found))
    assert late > 0


def test_more_late_edges_than_a_number_tells_are_walked_as_early_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    slot = ITEM_FIELDS.index("slot")
    has_late = listed(packed([1000, 77]), Grid(PROGRAMS, 8)).items[:, slot] % LATE_TILES > 0
    monkeypatch.setattr("weft_attn.plan.stream.LATE_TILES", 1)
    told = listed(packed([1000, 77]), Grid(PROGRAMS, 8)).items[:, slot]
    assert has_late.any()
    assert not told[has_late].any()
    assert told[~has_late].all()


def test_items_that_begin_together_are_walked_down_and_those_that_end_together_up() -> None:
    # Four programs: four flat items, four that end one by one, four that then begin one by one and end together.
    steps = np.array([8, 8, 8, 8, 8, 7, 6, 5, 4, 3, 2, 1])
    flat = np.array([True] * 4 + [False] * 8)
    found = arrange(steps, flat, np.zeros(12, np.int64), Grid(4, 1))
    assert found.order.tolist() == list(range(12))
    assert found.walks.tolist() == [BY_ITEM] * 8 + [BY_ITEM + UP_IN_EVEN + UP_IN_ODD] * 4


def test_a_wave_that_ends_one_by_one_has_the_next_one_begin_so() -> None:
    # The second wave begins when the first one's items end, shortest first: the same items end together then.
    steps, flat = np.array([9, 9, 9, 9, 8, 6, 4, 2]), np.array([True] * 4 + [False] * 4)
    walks = arrange(steps, flat, np.zeros(8, np.int64), Grid(4, 1)).walks
    assert walks.tolist() == [BY_ITEM] * 4 + [BY_ITEM + UP_IN_ODD] * 4


@pytest.mark.parametrize(
    ("plan", "share"),
    [
        (packed(log_normal_lengths(38, 65536)), 0.3),
        (packed([4096] * 16), 0.35),
        (packed([8192] * 8), 0.35),
        (zigzag(0, 2, 65536), 0.05),
        (zigzag(1, 2, 65536), 0.05),
    ],
    ids=["38 documents", "16 of 4K", "8 of 8K", "rank 0 of 2", "rank 1 of 2"],
)
def test_far_less_is_read_and_programs_end_nearly_as_together(plan: Plan, share: float) -> None:
    before, even = tiles_read(listed(plan, None), heads=8)
    after, still = tiles_read(listed(plan, Grid(PROGRAMS, 8)), heads=8)
    assert after < share * before
    # Documents of one head a wave end up to 3% later, which is less than what they save (docs/adr/0030).
    assert still > even - 0.03


def test_a_plan_of_no_slices_has_a_list() -> None:
    assert listed(Plan([], 10, 500), Grid(2, 1)).items[:, 7].tolist() == [BY_ROUND] * 4
    table = transpose(Plan([Slice(0, 4, 0, 4)], 4, 4).rows)
    assert components(table).tolist() == [0]
