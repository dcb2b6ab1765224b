"""Calls of a kind that came before give the bits that the first gave, their gradients too, and stay an operator to whoever watches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import weft_attn as weft
from weft_attn.launch import BackwardDkdvConfig, BackwardDqConfig, ForwardConfig, override
from weft_attn.testing.cases import Case, make_inputs
from weft_attn.testing.compare import Results, assert_matches_oracle, evaluate

TILES = [
    kind(block_q=32, block_k=32, num_warps=4, num_stages=1) for kind in (ForwardConfig, BackwardDkdvConfig, BackwardDqConfig)
]
CASE = Case(plan="packed", size=12, heads=4, kv_heads=2, head_dim=24, head_dim_v=40, softcap=5.0)


def test_warm_calls_give_the_bits_of_the_first() -> None:
    plan = CASE.make_plan()
    x = make_inputs(CASE, plan)

    def run() -> Results:
        return evaluate(lambda q, k, v, _: weft.plan_attention(q, k, v, plan, softcap=CASE.softcap, return_lse=True), x)  # type: ignore[return-value]

    with override(*TILES):
        first = run()
        assert len(plan._warm) == 1
        again = [run() for _ in range(2)]
        with torch.no_grad():
            out = weft.plan_attention(x.q, x.k, x.v, plan, softcap=CASE.softcap)
    assert_matches_oracle(first, CASE, plan, x)
    for found in again:
        for (name, one), (_, other) in zip(first.items(), found.items(), strict=True):
            assert torch.equal(one, other), name
    assert torch.equal(out, first.out)  # type: ignore[arg-type]


def test_a_warm_call_that_is_watched_is_an_operator() -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    plan = weft.Plan.dense(1, 16, 16)
    x = torch.randn(16, 2, 16)
    with override(*TILES):
        expected = [weft.plan_attention(x, x, x, plan) for _ in range(3)]
        assert len(plan._warm) == 1
        with Watching():
            out = weft.plan_attention(x, x, x, plan)
    assert "weft.attention_forward.default" in seen
    assert all(torch.equal(out, one) for one in expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_a_warm_call_has_the_gradients_that_are_wanted(wanted: str) -> None:
    plan = weft.Plan.dense(1, 16, 16, causal=True)
    q, k, v = torch.randn(3, 16, 2, 16).unbind()
    leaf = dict(q=q, k=k, v=v)[wanted].requires_grad_()
    with override(*TILES):
        found = [
            torch.autograd.grad(weft.plan_attention(q, k, v, plan).square().sum(), leaf)[0]  # type: ignore[union-attr]
            for _ in range(3)
        ]
    assert len(plan._warm) == 1
    assert found[0].abs().sum() > 0
    assert all(torch.equal(one, found[0]) for one in found)
