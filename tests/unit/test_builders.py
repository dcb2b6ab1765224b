"""Builders: what a caller knows becomes the right cells, and what makes no sense is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft_attn import InvalidPlan, Plan, Slice
from weft_attn.plan import build
from weft_attn.testing.cases import cumulative

LENGTHS = st.lists(st.integers(0, 30), max_size=5)
WINDOWS = st.none() | st.tuples(st.none() | st.integers(0, 12), st.none() | st.integers(0, 12))


def window_sees(own: int, key: int, causal: bool, window: tuple[int | None, int | None] | None) -> bool:
    """flash-attn's definition: keys own - left .. own + right, and none after own when causal."""
    left, right = window or (None, None)
    if causal and key > own:
        return False
    return (left is None or key >= own - left) and (causal or right is None or key <= own + right)


# ---- packed documents -----------------------------------------------------------------------------------------------------


@given(pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4), causal=st.booleans(), window=WINDOWS)
def test_rows_of_a_document_see_its_keys_and_no_others(
    pairs: list[tuple[int, int]], causal: bool, window: tuple[int | None, int | None] | None
) -> None:
    cu_q, cu_k = cumulative([q for q, _ in pairs]), cumulative([k for _, k in pairs])
    plan = Plan.from_cu_seqlens(cu_q, cu_k, causal=causal, window=window)
    plan.check()
    expected = np.zeros((cu_q[-1], cu_k[-1]), dtype=bool)
    for d, (rows, keys) in enumerate(pairs):
        for i in range(rows):
            for j in range(keys):
                expected[cu_q[d] + i, cu_k[d] + j] = window_sees(i + keys - rows, j, causal, window)
    np.testing.assert_array_equal(plan.to_mask().numpy(), expected)


@pytest.mark.parametrize(
    "kind",
    [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32), lambda x: np.array(x, np.uint16)],
)
def test_cu_seqlens_may_be_any_host_integers(kind: Callable[[Any], Any]) -> None:
    cu = [0, 3, 3, 8]
    assert Plan.from_cu_seqlens(kind(cu), kind(cu), causal=True) == Plan.from_cu_seqlens(cu, cu, causal=True)


def test_a_dense_batch_is_packed_documents_of_equal_length() -> None:
    assert Plan.dense(3, 4, 5, causal=True) == Plan.from_cu_seqlens([0, 4, 8, 12], [0, 5, 10, 15], causal=True)
    assert Plan.dense(0, 4, 5) == Plan([], 0, 0)


def test_a_batch_without_documents_is_empty() -> None:
    assert Plan.from_cu_seqlens([0], [0]) == Plan([], 0, 0)
    assert Plan.from_cu_seqlens([0, 0, 0], [0, 0, 0], causal=True) == Plan([], 0, 0)


# ---- groups ---------------------------------------------------------------------------------------------------------------


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    made = []
    for _ in range(draw(st.integers(0, 3))):
        rows = [draw(st.integers(0, 6)) for _ in lengths]
        made.append((cumulative(rows), [draw(st.integers(0, n)) for n in lengths]))
    return made, cumulative(lengths)


@given(made=groups(), causal=st.booleans(), window=WINDOWS)
def test_a_groups_rows_see_the_first_keys_of_their_document(
    made: tuple[list[tuple[list[int], list[int]]], list[int]], causal: bool, window: tuple[int | None, int | None] | None
) -> None:
    parts, cu_k = made
    plan = Plan.from_groups(parts, cu_k, causal, window=window)
    plan.check()
    rows = []
    for cu_q, kv_lens in parts:
        for d, keys in enumerate(kv_lens):
            count = cu_q[d + 1] - cu_q[d]
            for i in range(count):
                row = np.zeros(cu_k[-1], dtype=bool)
                for j in range(keys):
                    row[cu_k[d] + j] = window_sees(i + keys - count, j, causal, window)
                rows.append(row)
    np.testing.assert_array_equal(plan.to_mask().numpy(), np.array(rows, dtype=bool).reshape(len(rows), cu_k[-1]))


# ---- zigzag ---------------------------------------------------------------------------------------------------------------


def chunk_of(length: int, chunk: int, world: int) -> range:
    return range(chunk * length // (2 * world), (chunk + 1) * length // (2 * world))


def rank_tokens(lengths: list[int], rank: int, world: int) -> list[tuple[int, int]]:
    """(document, position) of the rows that a rank owns, by the formula of the design, document by document."""
    return [(d, t) for d, n in enumerate(lengths) for c in (rank, 2 * world - 1 - rank) for t in chunk_of(n, c, world)]


WORLDS = st.integers(1, 5)


@given(lengths=LENGTHS, world=WORLDS)
def test_ranks_own_each_token_exactly_once(lengths: list[int], world: int) -> None:
    owned = [token for rank in range(world) for token in rank_tokens(lengths, rank, world)]
    everything = [(d, t) for d, n in enumerate(lengths) for t in range(n)]
    assert sorted(owned) == everything
    plans = [Plan.zigzag(cumulative(lengths), rank, world) for rank in range(world)]
    assert [p.total_q for p in plans] == [len(rank_tokens(lengths, r, world)) for r in range(world)]
    assert sum(p.pairs for p in plans) == sum(n * (n + 1) // 2 for n in lengths)
    assert {p.total_k for p in plans} == {sum(lengths)}


@given(
    lengths=LENGTHS, world=WORLDS, data=st.data(), causal=st.booleans(), window=WINDOWS, order=st.sampled_from(build.KV_ORDERS)
)
def test_a_ranks_rows_see_what_the_whole_documents_rows_see(
    lengths: list[int],
    world: int,
    data: st.DataObject,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    order: str,
) -> None:
    rank = data.draw(st.integers(0, world - 1))
    plan = Plan.zigzag(cumulative(lengths), rank, world, kv_order=order, causal=causal, window=window)
    plan.check()
    rows = rank_tokens(lengths, rank, world)
    if order == "rank":
        keys = [token for r in range(world) for token in rank_tokens(lengths, r, world)]
    else:
        keys = [(d, t) for d, n in enumerate(lengths) for t in range(n)]
    expected = [[a == b and window_sees(i, j, causal, window) for b, j in keys] for a, i in rows]
    np.testing.assert_array_equal(plan.to_mask().numpy(), np.array(expected, dtype=bool).reshape(len(rows), len(keys)))


@given(lengths=LENGTHS, world=WORLDS, data=st.data())
def test_rank_order_and_sequence_order_are_permutations_of_each_other(
    lengths: list[int], world: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world - 1))
    cu = cumulative(lengths)
    in_ranks, in_sequence = (Plan.zigzag(cu, rank, world, kv_order=order).to_mask() for order in build.KV_ORDERS)
    gathered = [cu[d] + t for r in range(world) for d, t in rank_tokens(lengths, r, world)]
    assert torch.equal(in_ranks, in_sequence[:, torch.tensor(gathered, dtype=torch.long)])


@given(lengths=LENGTHS, world=WORLDS, spare=st.integers(0, 9), data=st.data())
def test_a_rank_stride_moves_keys_and_leaves_the_padding_unseen(
    lengths: list[int], world: int, spare: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world - 1))
    cu = cumulative(lengths)
    owned = [len(rank_tokens(lengths, r, world)) for r in range(world)]
    stride = max(owned) + spare
    padded = Plan.zigzag(cu, rank, world, rank_stride=stride)
    padded.check()
    assert padded.total_k == world * stride
    kept = torch.cat([torch.arange(n) + r * stride for r, n in enumerate(owned)])
    mask = padded.to_mask()
    assert torch.equal(mask[:, kept], Plan.zigzag(cu, rank, world).to_mask())
    assert int(mask.sum()) == int(mask[:, kept].sum())


def test_chunks_that_touch_in_the_buffer_are_one_slice() -> None:
    # A buffer of four ranks, 8 tokens each: rank 3's two chunks are neighbours in the buffer and in the document.
    plan = Plan.zigzag([0, 32], 3, 4)
    assert [(s.k_start, s.k_len) for s in plan.slices if s.q_start == 0] == [(0, 4), (8, 4), (16, 4), (24, 4)]
    assert (24, 8) in [(s.k_start, s.k_len) for s in plan.slices if s.q_start == 4]


# ---- shared prefix, concat ------------------------------------------------------------------------------------------------


@given(prompt=st.integers(0, 9), responses=st.lists(st.integers(0, 6), max_size=4))
def test_a_response_sees_the_prompt_and_itself(prompt: int, responses: list[int]) -> None:
    plan = Plan.shared_prefix(prompt, responses)
    plan.check()
    owner = [-1] * prompt + [r for r, n in enumerate(responses) for _ in range(n)]
    expected = [[j <= i and owner[j] in (-1, owner[i]) for j in range(len(owner))] for i in range(len(owner))]
    np.testing.assert_array_equal(plan.to_mask().numpy(), np.array(expected, dtype=bool).reshape(len(owner), len(owner)))


@given(sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4))
def test_concat_puts_plans_on_the_diagonal(sizes: list[tuple[int, int]]) -> None:
    plans = [Plan.dense(1, q, k, causal=bool(q % 2)) for q, k in sizes]
    whole = Plan.concat(plans)
    whole.check()
    expected = torch.block_diag(*(p.to_mask().int() for p in plans)).bool() if plans else torch.zeros(0, 0, dtype=torch.bool)
    assert torch.equal(whole.to_mask(), expected.view(whole.total_q, whole.total_k))


# ---- what is refused ------------------------------------------------------------------------------------------------------

CU = [0, 4, 9]
REFUSED: dict[str, Callable[[], Plan]] = {
    "cu_seqlens that do not begin with 0": lambda: Plan.from_cu_seqlens([1, 4], [0, 4]),
    "no cu_seqlens": lambda: Plan.from_cu_seqlens([], [0, 4]),
    "cu_seqlens that decrease": lambda: Plan.from_cu_seqlens([0, 4, 3], [0, 4, 5]),
    "cu_seqlens that decrease, keys": lambda: Plan.from_cu_seqlens([0, 4, 5], [0, 4, 3]),
    "floats": lambda: Plan.from_cu_seqlens([0, 4.0], [0, 4]),
    "float tensor": lambda: Plan.from_cu_seqlens(torch.tensor([0.0, 4.0]), [0, 4]),
    "bfloat16 tensor": lambda: Plan.from_cu_seqlens(torch.tensor([0, 4], dtype=torch.bfloat16), [0, 4]),
    "tensor without data": lambda: Plan.from_cu_seqlens(torch.tensor([0, 4], device="meta"), [0, 4]),
    "bools": lambda: Plan.from_cu_seqlens([False, True], [0, 1]),
    "strings": lambda: Plan.from_cu_seqlens("04", [0, 4]),
    "None": lambda: Plan.from_cu_seqlens(None, [0, 4]),
    "a number": lambda: Plan.from_cu_seqlens(4, [0, 4]),
    "two dimensions": lambda: Plan.from_cu_seqlens([[0, 4]], [0, 4]),
    "ragged": lambda: Plan.from_cu_seqlens([[0], [4, 5]], [0, 4]),
    "different documents": lambda: Plan.from_cu_seqlens([0, 4], [0, 4, 5]),
    "too many tokens": lambda: Plan.from_cu_seqlens([0, 2**31], [0, 1]),
    "window of one": lambda: Plan.from_cu_seqlens(CU, CU, window=(1,)),  # type: ignore[arg-type]
    "window of three": lambda: Plan.from_cu_seqlens(CU, CU, window=(1, 2, 3)),  # type: ignore[arg-type]
    "window as a number": lambda: Plan.from_cu_seqlens(CU, CU, window=3),  # type: ignore[arg-type]
    "window as a string": lambda: Plan.from_cu_seqlens(CU, CU, window="12"),  # type: ignore[arg-type]
    "negative window": lambda: Plan.from_cu_seqlens(CU, CU, window=(-1, 0)),
    "negative window, right": lambda: Plan.from_cu_seqlens(CU, CU, window=(0, -1)),
    "window of floats": lambda: Plan.from_cu_seqlens(CU, CU, window=(1.0, 0)),  # type: ignore[arg-type]
    "window of bools": lambda: Plan.from_cu_seqlens(CU, CU, window=(True, 0)),
    "causal as a number": lambda: Plan.from_cu_seqlens(CU, CU, causal=1),  # type: ignore[arg-type]
    "causal as None": lambda: Plan.dense(1, 2, 3, causal=None),  # type: ignore[arg-type]
    "negative batch": lambda: Plan.dense(-1, 2, 3),
    "negative rows": lambda: Plan.dense(1, -2, 3),
    "negative keys": lambda: Plan.dense(1, 2, -3),
    "float batch": lambda: Plan.dense(1.0, 2, 3),  # type: ignore[arg-type]
    "bool batch": lambda: Plan.dense(True, 2, 3),
    "group that is no pair": lambda: Plan.from_groups([CU], CU),  # type: ignore[list-item]
    "group as a string": lambda: Plan.from_groups(["ab"], CU),  # type: ignore[list-item]
    "group of too few documents": lambda: Plan.from_groups([([0, 1], [1])], CU),
    "group with kv_lens missing": lambda: Plan.from_groups([([0, 1, 2], [1])], CU),
    "kv_lens too large": lambda: Plan.from_groups([([0, 1, 2], [4, 6])], CU),
    "kv_lens negative": lambda: Plan.from_groups([([0, 1, 2], [-1, 5])], CU),
    "kv_lens of floats": lambda: Plan.from_groups([([0, 1, 2], [1.0, 5.0])], CU),
    "rank too large": lambda: Plan.zigzag(CU, 2, 2),
    "rank negative": lambda: Plan.zigzag(CU, -1, 2),
    "rank a float": lambda: Plan.zigzag(CU, 0.0, 2),  # type: ignore[arg-type]
    "rank a bool": lambda: Plan.zigzag(CU, True, 2),
    "no ranks": lambda: Plan.zigzag(CU, 0, 0),
    "unknown order": lambda: Plan.zigzag(CU, 0, 2, kv_order="ring"),
    "order as None": lambda: Plan.zigzag(CU, 0, 2, kv_order=None),  # type: ignore[arg-type]
    "rank_stride too small": lambda: Plan.zigzag(CU, 0, 2, rank_stride=4),
    "rank_stride negative": lambda: Plan.zigzag(CU, 0, 2, rank_stride=-1),
    "rank_stride a float": lambda: Plan.zigzag(CU, 0, 2, rank_stride=8.0),  # type: ignore[arg-type]
    "rank_stride in sequence order": lambda: Plan.zigzag(CU, 0, 2, kv_order="sequence", rank_stride=8),
    "gather buffer too long": lambda: Plan.zigzag(CU, 0, 2, rank_stride=2**30),
    "negative prompt": lambda: Plan.shared_prefix(-1, [2]),
    "negative response": lambda: Plan.shared_prefix(3, [2, -2]),
    "float response": lambda: Plan.shared_prefix(3, [2.0]),  # type: ignore[list-item]
    "bool prompt": lambda: Plan.shared_prefix(True, [2]),
    "concat of something else": lambda: Plan.concat([Plan.dense(1, 1, 1), Slice(0, 1, 0, 1)]),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_words(name: str) -> None:
    with pytest.raises(InvalidPlan) as raised:
        REFUSED[name]()
    message = str(raised.value)
    assert isinstance(raised.value, ValueError)
    assert "expected" in message, message
    assert "given" in message, message


def test_the_message_names_the_entry_that_falls() -> None:
    with pytest.raises(InvalidPlan, match=r"cu_seqlens_k does not decrease: expected entry 2 >= 4, given 3"):
        Plan.from_cu_seqlens([0, 1, 2], [0, 4, 3])
