"""What kernels write is all of their results and nothing else; NaN that nobody sees reaches nothing.

Fresh memory holds NaN in all GPU tests (see conftest.py); here the inputs are poisoned too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import weft_attn as weft
from weft_attn.testing.cases import Case, Inputs, cumulative, make_inputs
from weft_attn.testing.compare import Attention, Results, evaluate

DEVICE = torch.device("cuda")
MAIN = Case(size=301, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16)
NAN = float("nan")


def ours(case: Case, plan: weft.Plan) -> Attention:
    return lambda q, k, v, sinks: weft.plan_attention(
        q, k, v, plan, sinks=sinks, deterministic=True, return_lse=True, **case.options
    )  # type: ignore[return-value]


def assert_equal(one: Results, other: Results) -> None:
    for (name, a), (_, b) in zip(one.items(), other.items(), strict=True):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} elements differ"


@pytest.mark.parametrize("name", ["concat", "packed_unequal", "zigzag_padded", "unseen", "causal_more_rows", "decode_batch"])
def test_every_element_of_every_result_is_written(name: str) -> None:
    case = replace(MAIN, plan=name)
    plan = case.make_plan()
    assert torch.empty(3, device=DEVICE).isnan().all()
    found = evaluate(ours(case, plan), make_inputs(case, plan, DEVICE))
    for tensor, values in found.items():
        assert not values.isnan().any(), tensor
        assert tensor == "lse" or values.isfinite().all(), tensor
    mask = plan.to_mask().to(DEVICE)
    assert found.dk is not None
    assert found.dq is not None
    assert (found.out[~mask.any(dim=1)] == 0).all()
    assert (found.lse[:, ~mask.any(dim=1)] == float("-inf")).all()
    assert (found.dq[~mask.any(dim=1)] == 0).all()
    assert (found.dk[~mask.any(dim=0)] == 0).all()


@pytest.mark.parametrize("name", ["zigzag_padded", "packed_unequal", "decode_16"])
def test_nothing_is_written_outside_of_the_results(name: str, guarded_memory: None) -> None:
    case = replace(MAIN, plan=name)
    plan = case.make_plan()
    inputs = make_inputs(case, plan, DEVICE)
    evaluate(ours(case, plan), inputs)
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["zigzag_padded", "unseen", "window_both", "causal_more_keys", "strict_causal", "striped"])
def test_nan_in_keys_that_no_row_sees_reaches_nothing(name: str) -> None:
    case = replace(MAIN, plan=name)
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    assert_equal(evaluate(ours(case, plan), x.poisoned(plan)), evaluate(ours(case, plan), x))


@pytest.mark.parametrize("tensor", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("lengths", [[700, 500], [9, 13, 40, 2]], ids=["long", "sharing-a-tile"])
def test_a_document_full_of_nan_does_not_reach_the_others(lengths: list[int], tensor: str) -> None:
    cu = cumulative(lengths)
    plan = weft.Plan.from_cu_seqlens(cu, cu, causal=True)
    x = make_inputs(MAIN, plan, DEVICE)
    spoiled = getattr(x, tensor).clone()
    spoiled[: cu[1]] = NAN
    clean, found = (evaluate(ours(MAIN, plan), i) for i in (x, replace(x, **{tensor: spoiled})))
    for (name, a), (_, b) in zip(clean.items(), found.items(), strict=True):
        rest = (slice(None), slice(cu[1], None)) if name == "lse" else (slice(cu[1], None),)
        assert torch.equal(a[rest], b[rest]), name


def inside_nan(x: torch.Tensor) -> torch.Tensor:
    """x as a view of a tensor with NaN before, after and between its rows; strides and base stay multiples of 16 bytes."""
    tokens, heads, dim = x.shape
    base = torch.full((tokens + 512, heads + 2, dim), NAN, dtype=x.dtype, device=x.device)
    view = base[256 : 256 + tokens, 1 : 1 + heads]
    view.copy_(x)
    return view


def test_nan_around_the_tensors_reaches_nothing() -> None:
    """Tiles that reach past the last row, and past the last head, must not read what lies there."""
    case = replace(MAIN, plan="packed")
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    around = Inputs(inside_nan(x.q), inside_nan(x.k), inside_nan(x.v), x.sinks, inside_nan(x.dout), x.dlse)
    assert_equal(evaluate(ours(case, plan), around), evaluate(ours(case, plan), x))


def test_nan_that_a_row_sees_is_not_hidden() -> None:
    case = replace(MAIN, plan="causal")
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    for tensor in ("q", "k", "v"):
        spoiled = getattr(x, tensor).clone()
        spoiled[3] = NAN
        found = evaluate(ours(case, plan), replace(x, **{tensor: spoiled}), gradients=False)
        assert found.out[3, :, :].isnan().any(dim=-1).all()
        assert tensor == "q" or found.out[200].isnan().any(dim=-1).all()
