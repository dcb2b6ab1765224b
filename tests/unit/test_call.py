"""A launch that is repeated runs at the addresses of the repeat and with everything else of the first."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import weft_attn as weft
from weft_attn.kernels.call import KernelCall, tensor_descriptor
from weft_attn.ops.recipes import MAX_RECIPES, Run, Step


class CompiledStub:
    """What Triton returns of a launch: indexed by a grid, called with every argument in order."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launches.append((grid, *arguments))


class KernelStub:
    arg_names = ("q_ptr", "k_desc", "v_ptr", "stride", "BLOCK")

    def __init__(self) -> None:
        self.compiled = CompiledStub()
        self.first: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> CompiledStub:
            self.first.append(arguments)
            return self.compiled

        return launch


def step_of(kernel: KernelStub, made: list[dict[str, Any]]) -> Step:
    def make(t: Any) -> KernelCall:
        made.append(t)
        return KernelCall(
            kernel=kernel,
            grid=(7,),
            arguments=dict(q_ptr=t["q"], k_desc=tensor_descriptor(t["k"], 16), v_ptr=t["v"], stride=t["q"].stride(0)),
            constants=dict(BLOCK=16),
            num_warps=4,
            num_stages=2,
        )

    return Step(make)


def tensors() -> dict[str, torch.Tensor | None]:
    return {name: torch.randn(32, 2, 16) for name in ("q", "k", "v")}


def addresses(given: dict[str, torch.Tensor | None]) -> tuple[int, ...]:
    return tuple(x.data_ptr() for x in given.values() if x is not None)


def run(step: Step, given: dict[str, torch.Tensor | None]) -> None:
    step.run(given, {name: None if x is None else x.data_ptr() for name, x in given.items()}, 0)


def test_a_repeat_runs_with_its_own_tensors_and_the_first_ones_numbers() -> None:
    kernel, made = KernelStub(), []
    step = step_of(kernel, made)
    run(step, tensors())
    again = tensors()
    run(step, again)
    assert len(made) == len(kernel.first) == 1
    ((grid, q, k, v, stride, block),) = kernel.compiled.launches
    assert grid == (7, 1, 1)
    assert (q, k.base.data_ptr(), v) == addresses(again)
    assert (k.shape, k.strides, k.block_shape) == ([32, 32], [32, 1], [16, 16])
    assert (stride, block) == (32, 16)


def test_a_tensor_under_two_names_is_two_arguments_next_time() -> None:
    kernel = KernelStub()
    step = step_of(kernel, [])
    x = torch.randn(32, 2, 16)
    run(step, dict(q=x, k=x, v=x))
    again = tensors()
    run(step, again)
    ((_, q, k, v, *_),) = kernel.compiled.launches
    assert (q, k.base.data_ptr(), v) == addresses(again)


def test_the_first_tensors_are_not_kept() -> None:
    kernel, made = KernelStub(), []
    step = step_of(kernel, made)
    first = tensors()
    alive = [weakref.ref(x.untyped_storage()) for x in first.values() if x is not None]
    run(step, first)
    first.clear()
    kernel.first.clear()
    made.clear()
    gc.collect()
    assert [x() for x in alive] == [None] * 3


@pytest.mark.parametrize("change", ["stride", "alignment", "scale", "softcap", "sinks"])
def test_tensors_that_lie_otherwise_and_other_scalars_have_a_recipe_of_their_own(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a launch would run with strides, alignment or numbers of another."""
    made: list[tuple[Any, ...]] = []

    class RecipeStub:
        steps = ()

        def begin(self, tensors: Any, addresses: Any, device: torch.device) -> Run:
            return Run(self, tensors, addresses, device, 0)  # type: ignore[arg-type]

    monkeypatch.setattr("weft_attn.ops.execute.runs_reference", lambda device: False)
    monkeypatch.setattr("weft_attn.ops.execute._forward_recipe", lambda *a: made.append(a) or RecipeStub())
    plan = weft.Plan.dense(1, 8, 8)
    q = torch.randn(8, 2, 16)

    def run(q: torch.Tensor = q, sinks: torch.Tensor | None = None, **scalars: float) -> None:
        weft.plan_attention(q, q, q, plan, sinks=sinks, **scalars)  # type: ignore[arg-type]

    run()
    run()
    run(q.clone())
    assert len(made) == 1
    if change == "stride":
        run(torch.randn(8, 4, 16)[:, :2])
    elif change == "alignment":
        run(torch.randn(8 * 2 * 16 + 1)[1:].view(8, 2, 16))
    elif change == "sinks":
        run(sinks=torch.zeros(2))
    else:
        run(**{"softmax_scale" if change == "scale" else "softcap": 0.5})
    assert len(made) == 2


def test_recipes_of_a_plan_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    class RecipeStub:
        steps = ()

        def begin(self, tensors: Any, addresses: Any, device: torch.device) -> Run:
            return Run(self, tensors, addresses, device, 0)  # type: ignore[arg-type]

    monkeypatch.setattr("weft_attn.ops.execute.runs_reference", lambda device: False)
    monkeypatch.setattr("weft_attn.ops.execute._forward_recipe", lambda *a: RecipeStub())
    plan = weft.Plan.dense(1, 4, 4)
    q = torch.randn(4, 1, 16)
    for step in range(2 * MAX_RECIPES + 3):
        weft.plan_attention(q, q, q, plan, softmax_scale=1.0 + step)
        assert len(plan._recipes) <= MAX_RECIPES
