"""A plain call leaves the dispatcher out; whoever watches or transforms operators gets one; nobody else sees a difference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import weft_attn as weft
from weft_attn.errors import Unsupported
from weft_attn.testing.cases import Case, make_inputs
from weft_attn.testing.compare import Results, evaluate

PLAN = weft.Plan.from_cu_seqlens([0, 3, 7], [0, 3, 7], causal=True)


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


class Noted:
    """An operator that notes its calls."""

    def __init__(self, operator: Any, called: list[str]) -> None:
        self._operator, self._called = operator, called

    def __call__(self, *arguments: Any) -> Any:
        self._called.append(self._operator.__name__)
        return self._operator(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operators that are called, as they are."""
    called: list[str] = []
    for name in ("attention_forward", "attention_backward"):
        monkeypatch.setattr(torch.ops.weft, name, Noted(getattr(torch.ops.weft, name), called))
    return called


def tensor(**options: Any) -> torch.Tensor:
    return torch.randn(7, 2, 16, **options)


def attend(x: torch.Tensor) -> torch.Tensor:
    return weft.plan_attention(x, x, x, PLAN)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "mode", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_a_plain_call_leaves_the_dispatcher_out(mode: Callable[[], AbstractContextManager[Any]], operators: list[str]) -> None:
    x = tensor(requires_grad=True)
    with mode():
        out = attend(x)
        attend(torch.nn.Parameter(tensor()))
        weft.attention(x[None], x[None], x[None], sinks=torch.zeros(2))
    if out.requires_grad:
        out.sum().backward()
    assert operators == []


def under(mode: Callable[[], AbstractContextManager[Any]]) -> Callable[[], None]:
    def call() -> None:
        with mode():
            attend(tensor(requires_grad=True)).sum().backward()

    return call


WATCHED: dict[str, Callable[[], object]] = {
    "function mode": under(FunctionMode),
    "dispatch mode": under(DispatchMode),
    "profiler": under(lambda: profile(activities=[ProfilerActivity.CPU])),
    "fake tensors": under(lambda: FakeTensorMode(allow_non_fake_inputs=True)),
    "subclass": lambda: attend(tensor().as_subclass(Subclass)),
    "sinks of a subclass": lambda: weft.plan_attention(*[tensor()] * 3, PLAN, sinks=torch.zeros(2).as_subclass(Subclass)),
    "tracing": lambda: make_fx(attend)(tensor()),
    "symbolic tracing": lambda: make_fx(attend, tracing_mode="symbolic", _allow_non_fake_inputs=True)(tensor()),
    "forward mode": under(forward_ad.dual_level),
    "torch.func": lambda: torch.func.functionalize(attend)(tensor()),
    "negated view": lambda: attend(torch.imag(tensor(dtype=torch.complex64).conj())),
}


@pytest.mark.parametrize("name", WATCHED)
def test_whoever_watches_operators_gets_one(name: str, operators: list[str]) -> None:
    WATCHED[name]()
    assert "attention_forward" in operators


@pytest.mark.parametrize("name", ["dispatch mode", "profiler"])
def test_the_backward_is_watched_too(name: str, operators: list[str]) -> None:
    WATCHED[name]()
    assert operators == ["attention_forward", "attention_backward"]


def test_only_the_backward_may_be_watched(operators: list[str]) -> None:
    out = attend(tensor(requires_grad=True))
    with DispatchMode():
        out.sum().backward()
    assert operators == ["attention_backward"]


@pytest.mark.parametrize("sinks", [False, True])
def test_both_ways_give_the_same_bits(sinks: bool, operators: list[str]) -> None:
    case = Case(plan="packed_unequal", heads=4, kv_heads=2, sinks=sinks)
    plan = case.make_plan()
    x = make_inputs(case, plan)

    def run() -> Results:
        return evaluate(lambda q, k, v, s: weft.plan_attention(q, k, v, plan, sinks=s, return_lse=True), x)  # type: ignore[arg-type, return-value]

    straight = run()
    assert operators == []
    with DispatchMode():
        through = run()
    assert operators == ["attention_forward", "attention_backward"]
    for (name, one), (_, other) in zip(straight.items(), through.items(), strict=True):
        assert torch.equal(one, other), name


def test_a_negated_view_is_read_negated() -> None:
    x = torch.imag(tensor(dtype=torch.complex64).conj())
    assert x.is_neg()
    assert torch.equal(attend(x), attend(x.clone()))


def test_hooks_of_saved_tensors_pack_and_unpack() -> None:
    x = tensor(requires_grad=True)
    (expected,) = torch.autograd.grad(attend(x).square().sum(), x)
    packed, unpacked = [], []

    def pack(t: torch.Tensor) -> tuple[str, torch.Tensor]:
        packed.append(t)
        return ("packed", t.clone())

    def unpack(held: tuple[str, torch.Tensor]) -> torch.Tensor:
        unpacked.append(held)
        return held[1]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = attend(x)
    assert len(packed) >= 5
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], expected)
    assert len(unpacked) >= 5


def test_a_changed_input_is_noticed() -> None:
    x = tensor(requires_grad=True)
    y = x * 2
    out = attend(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_below_autograd_nothing_is_noted() -> None:
    x = tensor(requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert not attend(x).requires_grad
    assert attend(x).requires_grad


def test_a_tangent_is_refused_not_dropped() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensor(), tensor())
        for given in ((dual, tensor(), tensor()), (tensor(), tensor(), dual)):
            with pytest.raises(Unsupported, match="forward-mode"):
                weft.plan_attention(*given, PLAN)


def test_a_plan_of_inference_mode_serves_a_training() -> None:
    with torch.inference_mode():
        plan = weft.Plan.from_cu_seqlens([0, 3, 7], [0, 3, 7], causal=True)
        weft.plan_attention(tensor(), tensor(), tensor(), plan)
    x = tensor(requires_grad=True)
    out = weft.plan_attention(x, x, x, plan)
    assert isinstance(out, torch.Tensor)
    out.sum().backward()
    assert x.grad is not None


def test_hooks_that_copy_what_is_saved_do_not_cost_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tensor(requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        out = attend(x)
    monkeypatch.setattr(weft.Plan, "_from_table", lambda *_: pytest.fail("the plan was built again"))
    out.sum().backward()
