"""What a backward launches on Hopper, and in which order, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from weft_attn.kernels.call import KernelCall
from weft_attn.kernels.triton.delta import SHIFTED_COPIES
from weft_attn.launch import override
from weft_attn.launch.device import Device
from weft_attn.launch.select import Problem, select
from weft_attn.ops import execute
from weft_attn.plan import Plan
from weft_attn.testing.cases import cumulative

H200 = Device("NVIDIA H200", "sm_90", 132, 227 * 1024)
PORTABLE = select("backward_dkdv", Problem(128, 128, 16, group=2), H200).config


def calls(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], *, wanted: str = "q k v", shift: int = 0, has_dlse: bool = False
) -> tuple[list[list[KernelCall]], dict[str, Any]]:
    """The backward's launches in order, before, between and after (`Recipe`), and its tensors: out and dout are views of some heads, each of
    others.

    Args:
        shift: elements by which `out` lies off a whole 16 bytes.
    """
    monkeypatch.setattr(execute, "device_of", lambda _: H200)
    plan = Plan.from_cu_seqlens(cumulative(lengths), cumulative(lengths), causal=True)
    q = torch.empty(plan.total_q, 4, 128, dtype=torch.bfloat16)
    k = torch.empty(plan.total_k, 2, 128, dtype=torch.bfloat16)
    out = torch.empty(2 * q.numel() + shift, dtype=q.dtype)[shift:].view(plan.total_q, 8, 128)[:, 2:6]
    dout = torch.empty(plan.total_q, 6, 128, dtype=q.dtype)[:, 1:5]
    lse, dlse = torch.empty(6, plan.total_q)[1:5], torch.empty(4, plan.total_q + 5)[:, :-5]
    tensors: dict[str, Any] = dict(q=q, k=k, v=k, out=out, dout=dout, lse=lse, dlse=dlse if has_dlse else None)
    tensors |= {f"d{name}": x if name in wanted.split() else None for name, x in (("q", q), ("k", k), ("v", k))}
    recipe = execute._backward_recipe(plan, tensors, 1.0, 0.0, False)
    tensors |= {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in recipe.scratch.items()}
    tensors["counter"] = torch.zeros(2, dtype=torch.int32)
    parts = [[step._make(tensors) for step in steps] for steps in (recipe.before, recipe.steps, recipe.after)]
    return parts, tensors


def launched(monkeypatch: pytest.MonkeyPatch, lengths: list[int], **options: Any) -> list[list[str]]:
    """The kernels of `calls`."""
    parts, _ = calls(monkeypatch, lengths, **options)
    return [[call.kernel.__name__.removesuffix("_kernel").removeprefix("attention_") for call in part] for part in parts]


def test_the_kernel_of_dq_makes_statistics_before_the_other_one_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    short = [512] * 4
    assert launched(monkeypatch, short) == [[], ["hopper_backward_dq", "hopper_backward"], []]
    assert launched(monkeypatch, short, wanted="q") == [[], ["hopper_backward_dq"], []]


@pytest.mark.parametrize("has_dlse", [False, True])
def test_the_kernel_of_dq_reads_the_result_where_it_lies(monkeypatch: pytest.MonkeyPatch, has_dlse: bool) -> None:
    (_, (first, second), _), tensors = calls(monkeypatch, [512] * 4, has_dlse=has_dlse)
    given = first.arguments
    for name in ("q", "k", "v", "out", "dout"):
        assert given[f"{name}_desc"].base is tensors[name]
    assert (given["stride_oh"], given["stride_doh"], given["stride_qh"]) == (128, 128, 128)
    assert given["out_desc"].strides[0] == 8 * 128
    assert given["dout_desc"].strides[0] == 6 * 128
    assert given["lse_ptr"] is tensors["lse"]
    assert given["dlse_ptr"] is tensors["dlse" if has_dlse else "lse"]
    assert first.constants["HAS_DLSE"] == has_dlse
    assert (given["stride_lse_h"], given["stride_dlse_h"]) == (512 * 4, 512 * 4 + 5 if has_dlse else 0)
    for name in ("delta", "lse_log2"):
        assert given[f"{name}_ptr"] is second.arguments[f"{name}_ptr"] is tensors[name]


def test_where_it_does_not_run_they_have_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch, [512] * 4, wanted="k v") == [["delta"], ["hopper_backward"], []]
    assert launched(monkeypatch, [4096]) == [["delta"], ["hopper_backward"], ["finish_dq"]]
    # Its copy engine could not address the result.
    assert launched(monkeypatch, [512] * 4, shift=1) == [["delta"], ["backward_dkdv", "backward_dq"], []]


def test_shifted_ones_are_made_for_a_kernel_that_reads_them_through_the_copy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    short = [512] * 4
    with override(PORTABLE):
        assert launched(monkeypatch, short) == [["delta"], ["backward_dkdv", "hopper_backward_dq"], []]
        ((delta,), (dkdv, _), _), tensors = calls(monkeypatch, short)
        assert delta.constants["COPIES"] == tensors["delta"].shape[0] == SHIFTED_COPIES
        assert dkdv.arguments["stride_stats_copy"] == tensors["delta"].stride(0)
    with override(replace(PORTABLE, use_tma=False)):
        assert launched(monkeypatch, short) == [[], ["hopper_backward_dq", "backward_dkdv"], []]
