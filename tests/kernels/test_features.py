"""Every switch of the kernels, what NaN may reach, and repeatability."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import weft_attn as weft
from weft_attn.kernels.call import KernelCall
from weft_attn.launch import BackwardDkdvConfig, BackwardDqConfig, ForwardConfig, InvalidConfig, override
from weft_attn.launch.config import LaunchConfig
from weft_attn.plan.stream import ITEM_FIELDS, Tiling, host_stream
from weft_attn.testing.cases import Case, Inputs, make_inputs
from weft_attn.testing.compare import Attention, Results, assert_matches_oracle, evaluate


def ours(case: Case, plan: weft.Plan) -> Attention:
    return lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, sinks=sinks, return_lse=True, **case.options)  # type: ignore[return-value]


def configs(forward: dict[str, Any] | None = None, backward: dict[str, Any] | None = None, **shared: Any) -> list[LaunchConfig]:
    common: dict[str, Any] = {"block_q": 16, "block_k": 16, "num_warps": 4, "num_stages": 1, **shared}
    return [
        ForwardConfig(**{**common, **(forward or {})}),
        BackwardDkdvConfig(**common),
        BackwardDqConfig(**{**common, **(backward or {})}),
    ]


def check(case: Case, *chosen: LaunchConfig) -> None:
    plan = case.make_plan()
    inputs = make_inputs(case, plan)
    with override(*chosen):
        assert_matches_oracle(evaluate(ours(case, plan), inputs), case, plan, inputs)


# ---- features and switches ------------------------------------------------------------------------------------------------

FEATURES: list[dict[str, Any]] = [
    {"softcap": 0.5},
    {"softcap": 20.0},
    {"sinks": True},
    {"softmax_scale": 1.7},
    {"sinks": True, "softcap": 2.0, "spread": 10.0},
    {"lse_gradient": False},
]
ALL_AT_ONCE = FEATURES[4]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("features", "dtype"),
    # Each feature alone in one dtype, in turn; all at once in each.
    [(features, DTYPES[at % 3]) for at, features in enumerate(FEATURES) if features is not ALL_AT_ONCE]
    + [(ALL_AT_ONCE, dtype) for dtype in DTYPES],
    ids=str,
)
def test_features_match_the_oracle_in_every_dtype(features: dict[str, Any], dtype: torch.dtype) -> None:
    check(
        Case(plan="zigzag_rank_1_of_2", size=14, head_dim=24, head_dim_v=40, dtype=dtype, **features),
        *configs(),
    )


@pytest.mark.parametrize(
    "name", ["causal_more_rows", "packed_unequal", "window_both", "shared_prefix", "decode_batch", "unseen"]
)
def test_all_features_together_match_the_oracle(name: str) -> None:
    check(Case(plan=name, size=20, heads=4, kv_heads=2, head_dim=24, head_dim_v=40, sinks=True, softcap=2.0), *configs())


@pytest.mark.parametrize(
    ("dim", "dtype"), [(24, torch.float16), (24, torch.float32), (64, torch.bfloat16), (64, torch.float32)], ids=str
)
def test_the_identity_product_changes_no_bit(dim: int, dtype: torch.dtype) -> None:
    case = Case(plan="packed", size=12, head_dim=dim, dtype=dtype)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    found = []
    for identity_dot in (False, True):
        switch = {"identity_dot": identity_dot}
        with override(*configs(forward=switch, backward=switch)):
            found.append(evaluate(ours(case, plan), x))
    assert_matches_oracle(found[1], case, plan, x)
    assert_equal(*found)


def test_cache_modifiers_reach_the_kernels_and_change_no_bit(launches: list[KernelCall]) -> None:
    case = Case(plan="packed", size=12)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    found = []
    for cache_modifier in ("", ".ca", ".cg"):
        launches.clear()
        with override(*configs(cache_modifier=cache_modifier)):
            found.append(evaluate(ours(case, plan), x))
        assert [c.constants["CACHE"] for c in launches if "CACHE" in c.constants] == [cache_modifier] * 3
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


def test_an_override_is_what_runs(launches: list[KernelCall]) -> None:
    case = Case(plan="packed", size=20)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    common: dict[str, Any] = {"num_warps": 2, "num_stages": 3}
    chosen = [
        ForwardConfig(block_q=32, block_k=16, **common),
        BackwardDkdvConfig(block_q=16, block_k=64, **common),
        BackwardDqConfig(block_q=64, block_k=32, **common),
    ]
    evaluate(ours(case, plan), x)
    launches.clear()
    with override(*chosen):
        evaluate(ours(case, plan), x)
    streams = [c for c in launches if "BLOCK_K" in c.constants]
    assert [(c.constants["BLOCK_Q"], c.constants["BLOCK_K"]) for c in streams] == [(32, 16), (16, 64), (64, 32)]
    assert [(c.num_warps, c.num_stages) for c in streams] == [(2, 3)] * 3


# ---- the copy engine ------------------------------------------------------------------------------------------------------

INTERIOR_TILES = ITEM_FIELDS.index("interior_tiles")


@pytest.mark.parametrize("kernel", ["forward", "backward_dkdv", "backward_dq"])
def test_the_copy_engine_is_refused_on_a_device_without_one(kernel: str) -> None:
    case = Case(plan="packed", size=20)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    chosen = [replace(c, use_tma=c.kernel == kernel) for c in configs()]  # type: ignore[call-arg]
    with override(*chosen), pytest.raises(InvalidConfig, match=f"{kernel} config.*use_tma=False.*given"):
        evaluate(ours(case, plan), x)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ("packed", "full", "zigzag_rank_0_of_1", "shared_prefix")] + [("packed", torch.float16)],
    ids=str,
)
def test_descriptors_give_what_pointers_give(
    name: str, dtype: torch.dtype, machine: Callable[..., object], launches: list[KernelCall]
) -> None:
    """The interpreter has tensor descriptors too: told that it is a Hopper GPU it reads interior tiles through them."""
    machine(arch="sm_90")
    case = Case(plan=name, size=28, heads=2, kv_heads=1, head_dim=16, head_dim_v=32, dtype=dtype, sinks=True, softcap=3.0)
    plan = case.make_plan()
    for transposed in (False, True):
        assert host_stream(plan, Tiling(16, 16, transposed=transposed)).items[:, INTERIOR_TILES].any()
    x = make_inputs(case, plan)
    found = []
    for use_tma in (False, True):
        with override(*configs(use_tma=use_tma)):
            found.append(evaluate(ours(case, plan), x))
    assert [c.constants["USE_TMA"] for c in launches if "USE_TMA" in c.constants] == [False] * 3 + [True] * 3
    assert_equal(*found)
    assert_matches_oracle(found[1], case, plan, x)


def test_descriptors_read_a_head_of_a_fused_tensor(machine: Callable[..., object]) -> None:
    machine(arch="sm_90")
    case = Case(plan="packed", size=28, heads=4, kv_heads=2)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    fused = torch.cat([x.q, x.k, x.v], dim=1)
    views = Inputs(*fused.split([4, 2, 2], dim=1), x.sinks, x.dout, x.dlse)
    with override(*configs(use_tma=True)):
        assert_equal(evaluate(ours(case, plan), views), evaluate(ours(case, plan), x))


@pytest.mark.parametrize("offset", [1, 2])
def test_tensors_that_a_descriptor_cannot_describe_are_refused(offset: int, machine: Callable[..., object]) -> None:
    machine(arch="sm_90")
    case = Case(plan="packed", size=20)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    k = torch.zeros(x.k.numel() + offset)[offset:].view(x.k.shape)
    with override(*configs(use_tma=True)), pytest.raises(InvalidConfig, match=r"16-byte aligned"):
        weft.plan_attention(x.q, k, x.v, plan)


# ---- what NaN may reach ---------------------------------------------------------------------------------------------------


def assert_equal(one: Results, other: Results) -> None:
    for (name, a), (_, b) in zip(one.items(), other.items(), strict=True):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} elements differ"


NEVER_SEEN = [
    "zigzag_padded",
    "unseen",
    "window_both",
    "causal_more_keys",
    "decode_batch",
    "packed_unequal",
    "no_rows",
    "empty",
]


@pytest.mark.parametrize("name", NEVER_SEEN)
def test_nan_in_keys_outside_every_slice_reaches_nothing(name: str) -> None:
    case = Case(plan=name, size=24, heads=1, sinks=True)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    covered = torch.zeros(plan.total_k, dtype=torch.bool)
    for s in plan.slices:
        covered[s.k_start : s.k_start + s.k_len] = True
    poisoned = replace(
        x,
        k=x.k.masked_fill(~covered[:, None, None], float("nan")),
        v=x.v.masked_fill(~covered[:, None, None], float("nan")),
    )
    with override(*configs()):
        assert_equal(evaluate(ours(case, plan), poisoned), evaluate(ours(case, plan), x))


@pytest.mark.parametrize("name", ["strict_causal", "unseen", "window_both", "causal_more_keys", "striped", "zigzag_padded"])
def test_nan_in_keys_that_no_row_sees_reaches_nothing(name: str) -> None:
    case = Case(plan=name, size=24, heads=1, sinks=True)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    with override(*configs()):
        assert_equal(evaluate(ours(case, plan), x.poisoned(plan)), evaluate(ours(case, plan), x))


LONG, SHARING_A_TILE = (40, 50), (5, 6, 7)


@pytest.mark.parametrize(
    ("lengths", "tensor", "packs"),
    [(lengths, tensor, False) for lengths in (LONG, SHARING_A_TILE) for tensor in ("q", "k", "v", "dout")]
    # The forward alone packs heads.
    + [(SHARING_A_TILE, tensor, True) for tensor in ("q", "v")],
    ids=str,
)
def test_a_document_full_of_nan_does_not_reach_the_others(
    lengths: tuple[int, ...], tensor: str, packs: bool, machine: Callable[..., object], launches: list[KernelCall]
) -> None:
    machine(multiprocessors=132 if packs else 1)
    case = Case()
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    plan = weft.Plan.from_cu_seqlens(cu, cu, causal=True)
    x = make_inputs(case, plan)
    spoiled = getattr(x, tensor).clone()
    spoiled[: cu[1]] = float("nan")
    with override(*configs(block_q=32, block_k=32)):
        clean, found = (evaluate(ours(case, plan), i) for i in (x, replace(x, **{tensor: spoiled})))
    assert launches[0].constants["PACK"] == 1 + packs
    for (name, a), (_, b) in zip(clean.items(), found.items(), strict=True):
        rest = (slice(None), slice(cu[1], None)) if name == "lse" else (slice(cu[1], None),)
        assert torch.equal(a[rest], b[rest]), name


def test_nan_that_a_row_sees_is_not_hidden() -> None:
    case = Case(plan="causal", size=20)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    for tensor in ("q", "k", "v"):
        spoiled = getattr(x, tensor).clone()
        spoiled[3] = float("nan")
        with override(*configs()):
            found = evaluate(ours(case, plan), replace(x, **{tensor: spoiled}), gradients=False)
        assert found.out[3].isnan().all()
        assert tensor == "q" or found.out[20].isnan().all()


# ---- repeatability --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_and_gradients_are_repeatable_to_the_bit(dtype: torch.dtype) -> None:
    case = Case(plan="zigzag_rank_1_of_2", size=12, heads=2, kv_heads=1, sinks=True, softcap=2.0, dtype=dtype)
    x = make_inputs(case, case.make_plan())
    with override(*configs()):
        runs = [evaluate(ours(case, plan), x) for plan in (case.make_plan() for _ in range(2))]
    assert_equal(*runs)


def test_every_element_of_every_result_is_written() -> None:
    """Fresh memory is NaN in these tests (see conftest.py): rows and keys of any kind come out finite, or -inf in lse."""
    case = Case(plan="concat", size=26, head_dim=24, head_dim_v=40)
    plan = case.make_plan()
    assert torch.empty(3).isnan().all()
    with override(*configs()):
        found = evaluate(ours(case, plan), make_inputs(case, plan))
    for name, tensor in found.items():
        assert not tensor.isnan().any(), name
        assert name == "lse" or tensor.isfinite().all(), name
