"""Activation checkpointing recomputes the forward and gives the same gradients, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import weft_attn as weft


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("form", ["plan", "varlen", "dense"])
def test_checkpointed_gradients_are_equal_to_the_bit(form: str, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    cu = [0, 5, 5, 16]
    plan = weft.Plan.from_cu_seqlens(cu, cu, causal=True)
    leaves = [torch.randn(16, h, 16, requires_grad=True) for h in (4, 2, 2)] + [torch.randn(4, requires_grad=True)]

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        if form == "plan":
            found = weft.plan_attention(q, k, v, plan, sinks=sinks, return_lse=True)
        elif form == "varlen":
            found = weft.varlen_attention(q, k, v, cu, cu, causal=True, sinks=sinks, return_lse=True)
        else:
            found = weft.attention(*(x.view(2, 8, -1, 16) for x in (q, k, v)), causal=True, sinks=sinks, return_lse=True)
        out, lse = found
        return out.flatten().sin().sum() + lse.sum()

    expected = torch.autograd.grad(block(*leaves), leaves)
    found = torch.autograd.grad(checkpoint(block, *leaves, use_reentrant=use_reentrant), leaves) if not use_reentrant else None
    if found is None:
        # Reentrant checkpointing works with .backward() alone.
        checkpoint(block, *leaves, use_reentrant=True).backward()  # type: ignore[union-attr]
        found = tuple(x.grad for x in leaves)  # type: ignore[misc]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
