"""The backward kernels in the interpreter: every gradient against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft_attn as weft
from weft_attn.kernels.call import KernelCall
from weft_attn.launch import BackwardDkdvConfig, BackwardDqConfig, DeltaConfig, ForwardConfig, override
from weft_attn.launch.config import LaunchConfig
from weft_attn.testing.cases import PLANS, Case, make_inputs
from weft_attn.testing.compare import Attention, Results, assert_matches_oracle, evaluate, oracle_of


def ours(case: Case, plan: weft.Plan) -> Attention:
    return lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, sinks=sinks, return_lse=True, **case.options)  # type: ignore[return-value]


def tiles(dkdv: tuple[int, int] = (16, 16), dq: tuple[int, int] = (16, 16), **options: Any) -> list[LaunchConfig]:
    """(block_q, block_k) of the two kernels; the forward has large tiles, as it is not what is tested."""
    common: dict[str, Any] = {"num_warps": 4, "num_stages": 1}
    return [
        ForwardConfig(block_q=32, block_k=32, **common),
        BackwardDkdvConfig(block_q=dkdv[0], block_k=dkdv[1], **common, **options),
        BackwardDqConfig(block_q=dq[0], block_k=dq[1], **common, **options),
    ]


def check(case: Case, plan: weft.Plan | None = None) -> None:
    plan = plan or case.make_plan()
    inputs = make_inputs(case, plan)
    assert_matches_oracle(evaluate(ours(case, plan), inputs), case, plan, inputs)


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_matches_the_oracle(name: str) -> None:
    """At this size dK/dV has interior tiles too, of documents of 33 tokens. One head: groups of them have tests of their own."""
    with override(*tiles()):
        check(Case(plan=name, size=28, heads=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["packed", "zigzag_padded", "causal_more_rows", "shared_prefix"])
def test_half_precision_matches_the_oracle(name: str, dtype: torch.dtype) -> None:
    with override(*tiles()):
        check(Case(plan=name, size=28 if name == "packed" else 24, dtype=dtype))


@pytest.mark.parametrize(
    ("dim", "dim_v"), [(8, 8), (24, 24), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (8, 256), (72, 24)]
)
def test_every_head_dim_matches_the_oracle(dim: int, dim_v: int) -> None:
    with override(*tiles()):
        check(Case(plan="packed_unequal", size=18, head_dim=dim, head_dim_v=dim_v))


# Each shape on two plans, but the widest; wide and high ones on the window, whose two sides they cut differently.
TILE_SHAPES = [
    ("packed_window", (16, 32)),
    ("packed_window", (32, 16)),
    ("prefix_lm", (32, 16)),
    ("prefix_lm", (64, 32)),
    ("zigzag_padded", (16, 32)),
    ("zigzag_padded", (64, 32)),
    ("zigzag_padded", (32, 128)),
]


@pytest.mark.parametrize(("name", "tile"), TILE_SHAPES, ids=str)
def test_every_tile_shape_matches_the_oracle(name: str, tile: tuple[int, int]) -> None:
    with override(*tiles(dkdv=tile, dq=tile)):
        check(Case(plan=name))


# One element, one less than a tile, one more than two. Without a diagonal every tile but the last ones is whole.
ODD_LENGTHS = [(rows, keys, True) for rows in (1, 63, 129) for keys in (1, 63, 129)]
ODD_LENGTHS += [(1, 1, False), (63, 129, False), (129, 63, False)]


@pytest.mark.parametrize(("rows", "keys", "causal"), ODD_LENGTHS)
def test_odd_lengths_match_the_oracle(rows: int, keys: int, causal: bool) -> None:
    with override(*tiles(dkdv=(64, 64), dq=(64, 64))):
        check(Case(), weft.Plan.dense(1, rows, keys, causal=causal))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 1), (4, 2), (6, 2)])
def test_grouped_heads_match_the_oracle(heads: int, kv_heads: int) -> None:
    """A tile of keys walks one interior and two edge tiles for a head, and again for the next."""
    documents = [0, 33, 35]
    with override(*tiles()):
        check(Case(heads=heads, kv_heads=kv_heads), weft.Plan.from_cu_seqlens(documents, documents, causal=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_packages_own_configs_match_the_oracle(dtype: torch.dtype) -> None:
    check(Case(plan="zigzag_rank_1_of_2", size=24, dtype=dtype, head_dim=64))


@pytest.mark.parametrize("block_rows", [16, 128])
def test_any_block_of_row_statistics_matches_the_oracle(block_rows: int) -> None:
    with override(*tiles(dkdv=(64, 64), dq=(64, 64)), DeltaConfig(block_rows=block_rows, num_warps=4, num_stages=1)):
        check(Case(plan="packed", size=30, heads=2, kv_heads=2, head_dim_v=24))


@pytest.mark.parametrize("wave_bytes", [1, 10**9])
def test_the_order_of_heads_does_not_change_the_gradients(wave_bytes: int) -> None:
    with override(*tiles(dkdv=(32, 32), dq=(32, 32), wave_bytes=wave_bytes)):
        check(Case(plan="packed", size=12, heads=6, kv_heads=3))


@pytest.mark.parametrize(
    "case",
    [
        Case(plan="packed", size=28, lse_gradient=False),
        Case(plan="packed", size=28, lse_gradient=False, sinks=True),
        Case(plan="zigzag_padded", size=14, sinks=True, softcap=2.0, heads=4, kv_heads=2),
        Case(plan="causal_more_rows", size=20, sinks=True, dtype=torch.bfloat16),
        Case(plan="packed", size=28, spread=20.0),
        Case(plan="packed", size=20, softmax_scale=0.0),
        Case(plan="packed", size=28, softcap=0.1),
    ],
    ids=str,
)
def test_features_match_the_oracle(case: Case) -> None:
    with override(*tiles()):
        check(case)


def test_only_the_gradient_of_lse_is_enough() -> None:
    case = Case(plan="packed", size=20, sinks=True)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    assert x.dlse is not None
    assert x.sinks is not None
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.sinks)]
    with override(*tiles()):
        _, lse = weft.plan_attention(*leaves[:3], plan, sinks=leaves[3], return_lse=True)  # type: ignore[misc]
        found = torch.autograd.grad((lse * x.dlse).sum(), leaves)
    zero = type(x)(x.q, x.k, x.v, x.sinks, torch.zeros_like(x.dout), x.dlse)
    oracle = oracle_of(case, plan, zero)
    assert_matches_oracle(Results(oracle.out.float(), oracle.lse.float(), *found), case, plan, zero)
    assert (found[2] == 0).all(), "lse does not depend on v"


NEEDS = {("q",): {"dq"}, ("k",): {"dkdv"}, ("v",): {"dkdv"}, ("sinks",): set(), ("q", "v"): {"dq", "dkdv"}}


@pytest.mark.parametrize("subset", NEEDS, ids="-".join)
def test_only_kernels_whose_gradients_are_asked_for_run(subset: tuple[str, ...], launches: list[KernelCall]) -> None:
    case = Case(plan="packed", size=14, sinks=True)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    named = {n: getattr(x, n).clone().requires_grad_(n in subset) for n in ("q", "k", "v", "sinks")}
    with override(*tiles()):
        out, lse = weft.plan_attention(named["q"], named["k"], named["v"], plan, sinks=named["sinks"], return_lse=True)
        launches.clear()
        found = torch.autograd.grad((out, lse), [named[n] for n in subset], (x.dout, x.dlse))  # type: ignore[arg-type]
    ran = {c.kernel.fn.__name__.removeprefix("attention_").removesuffix("_kernel") for c in launches}
    assert ran == {"delta"} | {f"backward_{n}" for n in NEEDS[subset]}
    oracle = oracle_of(case, plan, x)
    for name, grad in zip(subset, found, strict=True):
        torch.testing.assert_close(grad.double(), getattr(oracle, f"d{name}"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_keys_and_values_may_stay_in_float32(dtype: torch.dtype) -> None:
    case = Case(plan="packed", size=14, dtype=dtype, lse_gradient=False)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    arguments = (x.q, x.k, x.v, None)
    mask = (plan.table, 1, False, None, None, case.head_dim**-0.5, 0.0, False)
    with override(*tiles()):
        out, lse = torch.ops.weft.attention_forward(*arguments, *mask)
        found = {
            kept: torch.ops.weft.attention_backward(x.dout, None, *arguments, out, lse, *mask, True, True, kept)[1:3]
            for kept in (None, torch.float32)
        }
    for narrow, wide in zip(found[None], found[torch.float32], strict=True):
        assert narrow.dtype == dtype
        assert wide.dtype == torch.float32
        if dtype == torch.bfloat16:
            assert (wide.bfloat16().float() != wide).any(), "float32 keeps what bfloat16 cannot"
        # The interpreter truncates: one ulp.
        torch.testing.assert_close(narrow.float(), wide, rtol=torch.finfo(dtype).eps, atol=0)


def test_keys_that_nobody_sees_get_exactly_zero() -> None:
    for name in ("unseen", "zigzag_padded", "no_rows", "empty", "window_both"):
        case = Case(plan=name, size=18)
        plan = case.make_plan()
        unseen = ~plan.to_mask().any(dim=0)
        with override(*tiles()):
            found = evaluate(ours(case, plan), make_inputs(case, plan))
        assert name == "window_both" or unseen.any()
        assert found.dk is not None
        assert found.dv is not None
        assert (found.dk[unseen] == 0).all()
        assert (found.dv[unseen] == 0).all()


def test_rows_that_see_nothing_get_exactly_zero() -> None:
    for name in ("unseen", "causal_more_rows", "no_keys", "empty"):
        case = Case(plan=name, size=20, sinks=True)
        plan = case.make_plan()
        blind = ~plan.to_mask().any(dim=1)
        assert blind.any()
        with override(*tiles()):
            found = evaluate(ours(case, plan), make_inputs(case, plan))
        assert found.dq is not None
        assert (found.dq[blind] == 0).all()


def test_a_sink_of_minus_infinity_has_no_gradient_and_changes_none() -> None:
    case = Case(plan="causal_more_rows", size=20, sinks=True)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    off = type(x)(x.q, x.k, x.v, torch.full((2,), float("-inf")), x.dout, x.dlse)
    without = type(x)(x.q, x.k, x.v, None, x.dout, x.dlse)
    with override(*tiles()):
        one, other = evaluate(ours(case, plan), off), evaluate(ours(case, plan), without)
    assert one.dsinks is not None
    assert (one.dsinks == 0).all()
    for (name, a), (_, b) in zip(one.items(), other.items(), strict=False):
        assert torch.equal(a, b), name
