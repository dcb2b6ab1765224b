"""A warm forward skips what was found out before, and nothing that could come out otherwise this time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import weft_attn as weft
from weft_attn.errors import InvalidInput
from weft_attn.launch import ForwardConfig, override
from weft_attn.ops.recipes import Counter, Run
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


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same heads of a row that has as many again."""
    return torch.cat([x, x], dim=1)[:, : x.shape[1]]


def other(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """q, k and v of which one is made otherwise."""
    return [make(x) if name == of else x for of, x in zip("qkv", qkv(), strict=True)]


OTHERS: dict[str, Callable[[Calls], object]] = {
    **{f"stride of {x}": lambda calls, x=x: calls.attend(*other(x, strided)) for x in "qkv"},  # type: ignore[misc]
    **{f"alignment of {x}": lambda calls, x=x: calls.attend(*other(x, unaligned)) for x in "qkv"},  # type: ignore[misc]
    "alignment": lambda calls: calls.attend(*(unaligned(x) for x in qkv())),
    "dtype": lambda calls: calls.attend(*qkv(dtype=torch.bfloat16)),
    "dims of v": lambda calls: calls.attend(*other("v", lambda v: v[:, :, : DIM // 2])),
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


def test_patterns_of_alignment_do_not_mix(calls: Calls) -> None:
    for name in "qkv":
        for _ in range(3):
            calls.attend(*other(name, unaligned))
    assert [len(recipe.runs) for recipe in calls.recipes] == [3, 3, 3]


UNREMEMBERED: dict[str, Callable[[Calls], object]] = {
    **{  # type: ignore[misc]
        f"{x} whose last dimension is strided": lambda calls, x=x: calls.attend(
            *other(x, lambda given: torch.stack([given, given], dim=-1)[..., 0])
        )
        for x in "qkv"
    },
    **{f"{x} that is unaligned": lambda calls, x=x: calls.attend(*other(x, unaligned)) for x in "qkv"},  # type: ignore[misc]
    **{f"{x} that is a parameter": lambda calls, x=x: calls.attend(*other(x, torch.nn.Parameter)) for x in "qkv"},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", UNREMEMBERED)
def test_what_no_call_would_find_is_not_remembered(name: str, calls: Calls) -> None:
    UNREMEMBERED[name](calls)
    assert calls.plan._warm == {}


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_a_watched_call_is_not_remembered(calls: Calls) -> None:
    with Watching():
        calls.attend()
    assert len(calls.recipes) == 1
    assert calls.plan._warm == {}


def test_the_backward_of_a_warm_call_is_told_what_the_call_was(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(Exception):
        pass

    def told(*arguments: Any) -> None:
        raise Told(*arguments)

    monkeypatch.setattr("weft_attn.ops.operators.begin_backward", told)
    scalars: dict[str, Any] = dict(softmax_scale=0.25, softcap=7.0, deterministic=True)
    found = []
    for _ in range(3):
        given = [x.requires_grad_() for x in qkv()]
        out, lse = calls.attend(*given, return_lse=True, **scalars)
        with pytest.raises(Told) as raised:
            (out.sum() + lse.sum()).backward()
        _, _, *saved, sinks, out_then, lse_then, plan, scale, softcap, deterministic, _dq, _dk, _dv = raised.value.args
        assert [x.data_ptr() for x in (*saved, out_then, lse_then)] == [x.data_ptr() for x in (*given, out, lse)]
        found.append((sinks, plan, scale, softcap, deterministic))
    assert found == [(None, calls.plan, 0.25, 7.0, True)] * 3


def test_a_call_that_another_one_cuts_in_on_runs_its_own_recipe(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another thread may, between the look at what the last call was and the launch."""
    for _ in range(2):
        calls.attend()
    made: list[int] = []

    class Addresses(dict[str, Any]):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            made.append(len(made))
            # The dictionary of tensors is the first, that of their addresses the second.
            if made == [0, 1]:
                calls.attend(softmax_scale=0.5)

    monkeypatch.setattr("weft_attn.ops.warm.dict", Addresses, raising=False)
    calls.attend()
    assert len(made) > 2
    assert [len(recipe.runs) for recipe in calls.recipes] == [3, 1]
    calls.attend()
    assert [len(recipe.runs) for recipe in calls.recipes] == [4, 1]


@pytest.mark.parametrize("captures", [False, True])
def test_a_captured_launch_has_a_counter_of_its_own(captures: bool) -> None:
    counter, device = Counter(), torch.device("cpu")
    kept = counter.on(device, 1, False)
    found = [counter.on(device, 1, captures) for _ in range(2)]
    assert [x is kept for x in found] == [not captures] * 2
    assert captures is (found[0] is not found[1])
    assert all(not x.any() for x in found)
    assert counter.on(device, 1, False) is kept
    assert counter.on(device, 2, False) is not kept


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
    "keys": lambda calls: calls.attend(qkv()[0], *torch.randn(2, ROWS + 1, KV_HEADS, DIM).unbind()),
    "more keys than values": lambda calls: calls.attend(*other("k", lambda k: torch.cat([k, k]))),
    "heads of v": lambda calls: calls.attend(*other("v", lambda v: v[:, :1])),
    **{f"dtype of {x}": lambda calls, x=x: calls.attend(*other(x, torch.Tensor.bfloat16)) for x in "qkv"},  # type: ignore[misc]
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
