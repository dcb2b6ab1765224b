"""What a backward launches on Hopper, and in which order, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from weft_attn.launch import override
from weft_attn.launch.device import Device
from weft_attn.launch.select import Problem, select
from weft_attn.ops import execute
from weft_attn.plan import Plan
from weft_attn.testing.cases import cumulative

H200 = Device("NVIDIA H200", "sm_90", 132, 227 * 1024)
PORTABLE = select("backward_dkdv", Problem(128, 128, 16, group=2), H200).config


def launched(monkeypatch: pytest.MonkeyPatch, lengths: list[int], *, wanted: str = "q k v", shift: int = 0) -> list[str]:
    """The backward's kernels in their order; `shift`: elements by which `out` lies off a whole 16 bytes."""
    monkeypatch.setattr(execute, "device_of", lambda _: H200)
    plan = Plan.from_cu_seqlens(cumulative(lengths), cumulative(lengths), causal=True)
    q = torch.empty(plan.total_q, 4, 128, dtype=torch.bfloat16)
    k = torch.empty(plan.total_k, 2, 128, dtype=torch.bfloat16)
    out = torch.empty(q.numel() + shift, dtype=q.dtype)[shift:].view(q.shape)
    tensors = dict(q=q, k=k, v=k, out=out, dout=q, lse=torch.empty(4, plan.total_q), dlse=None)
    tensors |= {f"d{name}": x if name in wanted.split() else None for name, x in (("q", q), ("k", k), ("v", k))}
    recipe = execute._backward_recipe(plan, tensors, 1.0, 0.0, False)
    tensors |= {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in recipe.scratch.items()}
    tensors["counter"] = torch.zeros(2, dtype=torch.int32)
    return [step._make(tensors).kernel.__name__.removesuffix("_kernel").removeprefix("attention_") for step in recipe.steps]


def test_the_kernel_of_dq_makes_statistics_before_the_other_one_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    short = [512] * 4
    assert launched(monkeypatch, short) == ["hopper_backward_dq", "hopper_backward"]
    assert launched(monkeypatch, short, wanted="q") == ["hopper_backward_dq"]


def test_where_it_does_not_run_they_have_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch, [512] * 4, wanted="k v") == ["delta", "hopper_backward"]
    assert launched(monkeypatch, [4096]) == ["delta", "hopper_backward", "finish_dq"]
    # Its copy engine could not address the result.
    assert launched(monkeypatch, [512] * 4, shift=1) == ["delta", "backward_dkdv", "backward_dq"]


def test_shifted_ones_are_made_for_a_kernel_that_reads_them_through_the_copy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    short = [512] * 4
    with override(PORTABLE):
        assert launched(monkeypatch, short) == ["delta", "backward_dkdv", "hopper_backward_dq"]
    with override(replace(PORTABLE, use_tma=False)):
        assert launched(monkeypatch, short) == ["hopper_backward_dq", "backward_dkdv"]
