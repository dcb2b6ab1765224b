"""The operators keep PyTorch's contract: schema, fake tensors, autograd registration, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

from weft_attn import Plan, Unsupported, plan_attention
from weft_attn.testing.cases import Case, make_inputs

FORWARD = torch.ops.weft.attention_forward.default
BACKWARD = torch.ops.weft.attention_backward.default
SCALARS = (0.25, 0.0, False)


def plain(*values: Any) -> tuple[Any, ...]:
    return tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in values)


def forward_arguments(form: str, dtype: torch.dtype, sinks: bool, plan: Plan) -> tuple[Any, ...]:
    """Arguments that require gradients; `plan` must outlive them."""
    x = make_inputs(Case(heads=4, kv_heads=2, head_dim_v=24, dtype=dtype, sinks=sinks), plan)
    tensors = [t if t is None else t.requires_grad_() for t in (x.q, x.k, x.v, x.sinks)]
    mask = (plan.table, 1, False, None, None) if form == "plan" else (None, 3, True, 4, None)
    return (*tensors, *mask, *SCALARS)


FORMS = [
    pytest.param("plan", torch.float32, False, id="plan"),
    pytest.param("plan", torch.bfloat16, True, id="plan-bf16-sinks"),
    pytest.param("dense", torch.float32, True, id="dense-sinks"),
    pytest.param("dense", torch.bfloat16, False, id="dense-bf16"),
]


def plan_of(form: str) -> Plan:
    return Plan.from_cu_seqlens([0, 5, 5, 12], [0, 6, 8, 15], causal=True) if form == "plan" else Plan.dense(3, 4, 4)


@pytest.mark.parametrize(("form", "dtype", "sinks"), FORMS)
def test_the_forward_operator_keeps_the_contract(form: str, dtype: torch.dtype, sinks: bool) -> None:
    plan = plan_of(form)
    opcheck(FORWARD, forward_arguments(form, dtype, sinks, plan))


@pytest.mark.parametrize(
    ("has_dout", "has_dlse", "needs"),
    [(True, True, (True, True, None)), (False, True, (True, False, None)), (True, False, (False, True, torch.float32))],
    ids=["all", "lse-only-to-q", "out-only-to-kv-in-fp32"],
)
@pytest.mark.parametrize(("form", "dtype", "sinks"), FORMS)
def test_the_backward_operator_keeps_the_contract(
    form: str, dtype: torch.dtype, sinks: bool, has_dout: bool, has_dlse: bool, needs: tuple[Any, ...]
) -> None:
    plan = plan_of(form)
    arguments = plain(*forward_arguments(form, dtype, sinks, plan))
    out, lse = FORWARD(*arguments)
    dout = torch.randn_like(out) if has_dout else None
    dlse = torch.randn_like(lse) if has_dlse else None
    opcheck(BACKWARD, (dout, dlse, *arguments[:4], out, lse, *arguments[4:], *needs))


def test_a_copied_table_means_the_same_plan() -> None:
    plan = plan_of("plan")
    arguments = plain(*forward_arguments("plan", torch.float32, False, plan))
    out, lse = FORWARD(*arguments)
    again = FORWARD(*arguments[:4], plan.table.clone(), *arguments[5:])
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


def test_a_table_that_does_not_fit_the_tensors_is_refused() -> None:
    plan = plan_of("plan")
    arguments = list(plain(*forward_arguments("plan", torch.float32, False, plan)))
    arguments[0] = arguments[0][:-1]
    with pytest.raises(ValueError, match=r"expected .*given"):
        FORWARD(*arguments)


def test_the_gradients_outlive_the_plan() -> None:
    x = torch.randn(7, 2, 16, requires_grad=True)
    kept = Plan.from_cu_seqlens([0, 3, 7], [0, 3, 7], causal=True)
    expected = torch.autograd.grad(plan_attention(x, x, x, kept).sum(), x)[0]
    out = plan_attention(x, x, x, Plan.from_cu_seqlens([0, 3, 7], [0, 3, 7], causal=True))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)


def test_second_derivatives_are_refused_and_not_zero() -> None:
    x = torch.randn(7, 2, 16, requires_grad=True)
    out = plan_attention(x, x, x, Plan.dense(1, 7, 7))
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(Unsupported, match=r"expected .*given"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_backward_operator_computes_in_any_grad_mode(mode: Any) -> None:
    plan = plan_of("plan")
    arguments = plain(*forward_arguments("plan", torch.float32, True, plan))
    out, lse = FORWARD(*arguments)
    call = (torch.ones_like(out), torch.ones_like(lse), *arguments[:4], out, lse, *arguments[4:], True, True, None)
    expected = BACKWARD(*call)
    with mode():
        found = BACKWARD(*call)
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one, other)
