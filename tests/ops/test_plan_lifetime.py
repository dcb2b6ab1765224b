"""A plan, and the device tables cached in it, lives from the forward to the backward."""

from __future__ import annotations

import gc

import pytest
import torch

import weft_attn as weft


def test_the_backward_finds_the_plan_that_varlen_attention_built_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 2, 16, requires_grad=True)
    out = weft.varlen_attention(x, x, x, [0, 3, 7], [0, 3, 7], causal=True)
    gc.collect()

    def rebuilt(*_: object) -> None:
        raise AssertionError("the backward built the plan again")

    monkeypatch.setattr(weft.Plan, "_from_table", rebuilt)
    assert isinstance(out, torch.Tensor)
    out.sum().backward()
    assert x.grad is not None


def test_a_dropped_plan_is_freed_after_the_backward() -> None:
    from weft_attn.plan.slices import live_plans

    x = torch.randn(7, 2, 16, requires_grad=True)
    gc.collect()
    before = len(live_plans)
    weft.varlen_attention(x, x, x, [0, 3, 7], [0, 3, 7], causal=True).sum().backward()  # type: ignore[union-attr]
    gc.collect()
    assert len(live_plans) == before
