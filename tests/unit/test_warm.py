"""A warm forward skips what was found out before, and nothing that could come out otherwise this time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import weft_attn as weft
from weft_attn.errors import InvalidInput
from weft_attn.launch import ForwardConfig, override
from weft_attn.ops.recipes import Run
from weft_attn.ops.warm import MAX_LAYOUTS

CONFIG = ForwardConfig(block_q=16, block_k=16, num_warps=4, num_stages=1)
ROWS, HEADS, KV_HEADS, DIM = 8, 4, 2, 16


class RecipeStub:
    """Notes the tensors that it runs on; its launches do nothing."""

    steps = ()

    def __init__(self) -> None:
        self.runs: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def begin(self, tensors: dict[str, Any], addresses: dict[str, Any], device: torch.device) -> Run:
        self.runs.append((dict(tensors), dict(addresses)))
        return Run(self, tensors, addresses, device, 0)  # type: ignore[arg-type]


class Calls:
    """Attention under one plan on kernels that do nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recipes: list[RecipeStub] = []
        self.plan = weft.Plan.dense(1, ROWS, ROWS)
        monkeypatch.setattr("weft_attn.ops.execute.runs_reference", lambda device: False)
        monkeypatch.setattr("weft_attn.ops.execute._forward_recipe", self._make)

    def _make(self, *_: Any) -> RecipeStub:
        self.recipes.append(RecipeStub())
        return self.recipes[-1]

    def attend(self, *tensors: Any, **options: Any) -> Any:
        return weft.plan_attention(*(tensors or qkv()), self.plan, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def qkv(heads: int = HEADS, kv_heads: int = KV_HEADS, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(ROWS, h, DIM, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def unaligned(x: torch.Tensor) -> torch.Tensor:
    found = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return found.copy_(x)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_warm_call_asks_nothing_again(calls: Calls, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first call is remembered, the second takes its recipe along.
    for _ in range(2):
        calls.attend(*(x.requires_grad_(gradients) for x in qkv()))
    for name in ("checks.qkv", "checks.totals", "ops.execute.begin_recipe", "ops.operators._forward_op"):
        monkeypatch.delattr(f"weft_attn.{name}")
    given = [x.requires_grad_(gradients) for x in qkv()]
    out, lse = calls.attend(*given, return_lse=True)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((ROWS, HEADS, DIM), torch.float32, (HEADS, ROWS), torch.float32)
    assert out.requires_grad is lse.requires_grad is gradients
    (recipe,) = calls.recipes
    tensors, addresses = recipe.runs[-1]
    assert [addresses[name] for name in ("q", "k", "v")] == [x.data_ptr() for x in given]
    assert (addresses["out"], addresses["lse"], addresses["sinks"]) == (out.data_ptr(), lse.data_ptr(), None)
    assert addresses == {name: None if x is None else x.data_ptr() for name, x in tensors.items()}


OTHERS: dict[str, Callable[[Calls], object]] = {
    "stride": lambda calls: calls.attend(torch.randn(ROWS, 2 * HEADS, DIM)[:, :HEADS], *qkv()[1:]),
    "alignment": lambda calls: calls.attend(*(unaligned(x) for x in qkv())),
    "alignment of v": lambda calls: calls.attend(*qkv()[:2], unaligned(qkv()[2])),
    "dtype": lambda calls: calls.attend(*qkv(dtype=torch.bfloat16)),
    "heads": lambda calls: calls.attend(*qkv(heads=2 * HEADS)),
    "scale": lambda calls: calls.attend(softmax_scale=0.5),
    "softcap": lambda calls: calls.attend(softcap=0.5),
    "sinks": lambda calls: calls.attend(sinks=torch.zeros(HEADS)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_otherwise_has_a_recipe_of_its_own(name: str, calls: Calls) -> None:
    for _ in range(3):
        calls.attend()
    assert len(calls.recipes) == 1
    for _ in range(3):
        OTHERS[name](calls)
    assert len(calls.recipes) == 2
    calls.attend()
    assert [len(recipe.runs) for recipe in calls.recipes] == [4, 3], "each call on its own"


def test_an_override_holds_for_a_warm_call(calls: Calls) -> None:
    calls.attend()
    calls.attend()
    with override(CONFIG):
        calls.attend()
        calls.attend()
    calls.attend()
    assert [len(recipe.runs) for recipe in calls.recipes] == [3, 2]


WRONG: dict[str, Callable[[Calls], object]] = {
    "no tensor": lambda calls: calls.attend([1.0], *qkv()[1:]),
    "no plan": lambda calls: weft.plan_attention(*qkv(), None),  # type: ignore[arg-type]
    "rows": lambda calls: calls.attend(qkv()[0][1:], *qkv()[1:]),
    "heads of v": lambda calls: calls.attend(*qkv()[:2], torch.randn(ROWS, 1, DIM)),
    "dtype of k": lambda calls: calls.attend(qkv()[0], qkv()[1].bfloat16(), qkv()[2]),
    "sparse": lambda calls: calls.attend(qkv()[0].to_sparse(), *qkv()[1:]),
    "scale": lambda calls: calls.attend(softmax_scale=True),
    "infinite scale": lambda calls: calls.attend(softmax_scale=float("inf")),
    # Equal to numbers that are right.
    "softcap": lambda calls: calls.attend(softcap=False),
    "deterministic": lambda calls: calls.attend(deterministic=0),
    "return_lse": lambda calls: calls.attend(return_lse=1),
    "sinks": lambda calls: calls.attend(sinks=torch.zeros(HEADS + 1)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_after_calls_that_were_right(name: str, calls: Calls) -> None:
    with pytest.raises(InvalidInput) as cold:
        WRONG[name](calls)
    for _ in range(3):
        calls.attend(softmax_scale=1.0)
        calls.attend()
    with pytest.raises(InvalidInput) as warm:
        WRONG[name](calls)
    assert str(warm.value) == str(cold.value)


def test_numbers_of_numpy_are_numbers(calls: Calls) -> None:
    calls.attend(softmax_scale=0.5, softcap=1.0)
    calls.attend(softmax_scale=np.float64(0.5), softcap=np.int64(1))
    assert len(calls.recipes) == 1


def test_what_failed_is_not_remembered(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr("weft_attn.ops.execute._forward_recipe", fails)
        with pytest.raises(MemoryError):
            calls.attend()
    assert calls.plan._warm == {}


def test_nothing_is_remembered_where_the_reference_runs() -> None:
    plan = weft.Plan.dense(1, ROWS, ROWS)
    weft.plan_attention(*qkv(), plan)
    assert plan._warm == {}


def test_layouts_of_a_plan_are_bounded(calls: Calls) -> None:
    for heads in range(1, MAX_LAYOUTS + 4):
        calls.attend(*qkv(heads, 1))
        assert len(calls.plan._warm) <= MAX_LAYOUTS
