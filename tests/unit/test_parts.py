"""Documents that see few keys go another way through the backward than those that see many: which they are, and what runs for each."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from weft_attn.launch import override
from weft_attn.launch.config import HopperBackwardConfig
from weft_attn.launch.device import Device
from weft_attn.launch.parts import Part, backward_parts
from weft_attn.launch.select import Problem, least_keys_of_fused, select
from weft_attn.ops import execute
from weft_attn.plan import Plan, Slice
from weft_attn.plan.seen import documents_of
from weft_attn.plan.stream import Tiling, host_stream
from weft_attn.testing.cases import PLANS, cumulative

H200 = Device("NVIDIA H200", "sm_90", 132, 227 * 1024)
A100 = Device("NVIDIA A100-SXM4-80GB", "sm_80", 108, 163 * 1024)
PROBLEM = Problem(128, 128, 16, group=4)
FUSED, PAIR = ("hopper_backward",), ("hopper_backward_dkdv", "hopper_backward_dq")
# At eight KV heads, enough of either kind for four rounds of 132 multiprocessors.
ENOUGH = [4096] * 3 + [512] * 20


def packed(*lengths: int) -> Plan:
    return Plan.from_cu_seqlens(cumulative(lengths), cumulative(lengths), causal=True)


def kernels(parts: tuple[Part, ...]) -> list[tuple[str, ...]]:
    return [tuple(choice.config.kernel for choice in part.choices) for part in parts]


def parts_of(
    plan: Plan, problem: Problem = PROBLEM, kv_heads: int = 8, device: Device = H200, **options: bool
) -> tuple[Part, ...]:
    problem = replace(problem, keys_per_query=plan.keys_per_query)
    return backward_parts(plan, problem, kv_heads, device, **{"deterministic": False} | options)


def test_documents_know_their_rows_and_what_their_queries_see() -> None:
    documents = documents_of(packed(5, 0, 200, 10).rows)
    np.testing.assert_array_equal(documents.queries, [5, 200, 10])
    np.testing.assert_array_equal(documents.keys, [5, 200, 10])
    np.testing.assert_array_equal(documents.seen, [3.0, 100.5, 5.5])
    # Two slices of the same rows, a third that shares keys with one of them, and one apart.
    plan = Plan([Slice(0, 4, 0, 6), Slice(0, 4, 10, 2), Slice(4, 4, 5, 3), Slice(20, 2, 30, 5)], 30, 40)
    documents = documents_of(plan.rows)
    assert len(set(documents.of_slice.tolist())) == 2
    apart = documents.of_slice[[row[0] == 20 for row in plan.rows]].item()
    assert (documents.queries[apart], documents.keys[apart], documents.seen[apart]) == (2, 5, 5.0)
    assert (documents.queries[1 - apart], documents.keys[1 - apart]) == (8, 10)
    assert documents.seen[1 - apart] == (4 * 6 + 4 * 2 + 4 * 3) / 8
    assert len(documents_of(Plan([], 3, 4).rows).seen) == 0


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    "tiling", [Tiling(16, 16), Tiling(5, 16, transposed=True), Tiling(64, 16, transposed=True, masks_ragged=True)], ids=str
)
@pytest.mark.parametrize("least", [1, 12.5, 20, 1000])
def test_items_of_few_and_of_many_keys_are_all_items(name: str, tiling: Tiling, least: float) -> None:
    plan = PLANS[name](40)
    whole = host_stream(plan, tiling).items
    halves = [host_stream(plan, replace(tiling, seen=seen)).items for seen in ((0, least), (least, math.inf))]
    # Row, rows, tiles without and with a mask.
    shown = [sorted(map(tuple, items[:, [0, 1, 3, 5]].tolist())) for items in (whole, np.concatenate(halves))]
    assert shown[0] == shown[1]
    seen = plan.to_mask().numpy().sum(axis=0 if tiling.transposed else 1)
    # What sees nothing, or is seen by nobody, is with those of few.
    assert all(seen[row : row + n].any() for row, n, *_ in halves[1].tolist())


def test_each_kind_of_documents_goes_its_own_way() -> None:
    found = parts_of(packed(*ENOUGH))
    assert kernels(found) == [FUSED, PAIR]
    least = least_keys_of_fused(PROBLEM, H200)
    assert least is not None
    assert [part.seen for part in found] == [(least, math.inf), (0, least)]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([512] * 100, PAIR),
        ([8192] * 4, FUSED),
        # Too little of the one, or of the other, to be worth launches of its own: the mean decides.
        ([8192] * 4 + [512], FUSED),
        ([512] * 100 + [4096], PAIR),
        ([], PAIR),
    ],
)
def test_documents_of_one_kind_go_one_way(lengths: list[int], expected: tuple[str, ...]) -> None:
    found = parts_of(packed(*lengths))
    assert kernels(found) == [expected]
    assert found[0].seen is None


def test_few_heads_are_too_little_of_either_kind() -> None:
    assert len(parts_of(packed(*ENOUGH), kv_heads=2)) == 1


@pytest.mark.parametrize(
    "change", [dict(deterministic=True), dict(device=A100), dict(problem=replace(PROBLEM, head_dim=64, head_dim_v=64)),
               dict(problem=replace(PROBLEM, head_dim=256, head_dim_v=256)), dict(problem=replace(PROBLEM, tma_possible=False))],
    ids=["deterministic", "sm_80", "head dim 64", "head dim 256", "unaligned"],
)  # fmt: skip
def test_only_kernels_that_make_their_own_statistics_have_a_part(change: dict[str, object]) -> None:
    assert len(parts_of(packed(*ENOUGH), **change)) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["hopper_backward", "hopper_backward_dq"])
def test_what_is_overridden_runs_for_all_documents(kernel: str) -> None:
    config = select(kernel, PROBLEM, H200).config
    with override(config):
        found = parts_of(packed(*ENOUGH))
    assert kernels(found) == [FUSED if isinstance(config, HopperBackwardConfig) else PAIR]


# ---- what is launched -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "device_of", lambda _: H200)


def launched(plan: Plan, wanted: str = "q k v") -> list[tuple[str, int]]:
    """The backward's kernels in their order, each with the rows or keys that its items are of."""
    q = torch.empty(plan.total_q, 16, 128, dtype=torch.bfloat16)
    k = torch.empty(plan.total_k, 8, 128, dtype=torch.bfloat16)
    lse = torch.empty(16, plan.total_q)
    tensors = dict(q=q, k=k, v=k, out=q, dout=q, lse=lse, dlse=None)
    tensors |= {f"d{name}": x if name in wanted.split() else None for name, x in (("q", q), ("k", k), ("v", k))}
    recipe = execute._backward_recipe(plan, tensors, 1.0, 0.0, False)
    scratch = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in recipe.scratch.items()}
    counter = torch.zeros(2, dtype=torch.int32)
    found = []
    for step in recipe.steps:
        call = step._make(tensors | scratch | dict(counter=counter))
        items = call.arguments["items_ptr"]
        rows = plan.total_q if items is None else int(items[:, 1].sum())
        found.append((call.kernel.__name__.removeprefix("attention_").removesuffix("_kernel"), rows))
    return found


@pytest.mark.usefixtures("_h200")
def test_each_kind_has_statistics_before_they_are_read_and_its_rows_alone_are_swept() -> None:
    many, few = 3 * 4096, 20 * 512
    assert launched(packed(*ENOUGH)) == [
        ("delta", many),
        ("hopper_backward_dq", few),
        ("hopper_backward", many),
        ("hopper_backward", few),
        ("finish_dq", many),
    ]


@pytest.mark.usefixtures("_h200")
def test_the_kernel_of_dq_makes_statistics_for_the_other_one() -> None:
    plan = packed(*[512] * 20)
    rows = 20 * 512
    assert launched(plan) == [("hopper_backward_dq", rows), ("hopper_backward", rows)]
    assert launched(plan, "q") == [("hopper_backward_dq", rows)]
    assert launched(plan, "k v") == [("delta", rows), ("hopper_backward", rows)]


@pytest.mark.usefixtures("_h200")
def test_shifted_statistics_are_made_for_a_kernel_that_reads_them_through_the_copy_engine() -> None:
    plan = packed(*[512] * 20)
    rows = 20 * 512
    portable = select("backward_dkdv", PROBLEM, H200).config
    with override(portable):
        assert launched(plan) == [("delta", rows), ("hopper_backward_dq", rows), ("backward_dkdv", rows)]
    with override(replace(portable, use_tma=False)):
        assert launched(plan) == [("hopper_backward_dq", rows), ("backward_dkdv", rows)]
