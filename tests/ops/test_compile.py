"""torch.compile(fullgraph=True): same results, and no compilation per batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import weft_attn as weft
from weft_attn.testing.cases import cumulative

BATCHES = [[5, 9], [3, 4, 8], [11], [1, 2, 3, 4], [7, 7, 7, 7, 7], [0, 12, 0], [5, 9], [31, 2, 2, 2, 9, 1]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class PlanLayer(torch.nn.Module):
    """A layer with projections around plan_attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 4 * 16)
        self.options = options
        self.sinks = torch.nn.Parameter(torch.randn(2)) if options.pop("has_sinks", False) else None

    def forward(self, x: torch.Tensor, plan: weft.Plan) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 4, 16).split([2, 1, 1], dim=1)
        found = weft.plan_attention(q, k, v, plan, sinks=self.sinks, return_lse=True, **self.options)
        out, lse = found
        return out.flatten(1).sin() + lse.mean(dim=0, keepdim=True).T


class DenseLayer(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = weft.attention(q, k, v, causal=True, window=(3, None), softcap=2.0)
        assert isinstance(out, torch.Tensor)
        return out.sin()


def gradients(run: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    out = run()
    return out.detach(), list(torch.autograd.grad(out.square().sum(), leaves))


def assert_same(compiled: Any, eager: Any) -> None:
    torch.testing.assert_close(compiled[0], eager[0])
    for one, other in zip(compiled[1], eager[1], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "has_sinks": True, "softmax_scale": 0.3}], ids=["plain", "features"])
def test_a_plan_layer_compiles_once_for_any_number_of_documents(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = PlanLayer(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for lengths in BATCHES:
        cu = cumulative(lengths)
        plan = weft.Plan.from_cu_seqlens(cu, cu, causal=True)
        x = torch.randn(cu[-1], 32)
        leaves = list(layer.parameters())
        assert_same(gradients(lambda x=x, p=plan: compiled(x, p), leaves), gradients(lambda x=x, p=plan: layer(x, p), leaves))
    # One for the first shapes, one or two until the sizes are symbols.
    assert counter.frame_count <= 3


def test_a_dense_layer_compiles_once_for_any_shape() -> None:
    torch.manual_seed(0)
    layer = DenseLayer()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch, rows, keys in [(2, 5, 7), (3, 8, 8), (4, 9, 3), (5, 11, 6), (2, 5, 7), (7, 3, 13)]:
        leaves = [torch.randn(batch, n, h, 16, requires_grad=True) for n, h in ((rows, 4), (keys, 2), (keys, 2))]
        assert_same(gradients(lambda x=leaves: compiled(*x), leaves), gradients(lambda x=leaves: layer(*x), leaves))
    assert counter.frame_count <= 3


def test_with_dynamic_shapes_from_the_start_each_layer_compiles_at_most_once() -> None:
    layers = torch.nn.ModuleList(PlanLayer() for _ in range(4))
    counter = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.compile(fullgraph=True, backend=counter, dynamic=True)
    for lengths in BATCHES[:3]:
        cu = cumulative(lengths)
        plan = weft.Plan.from_cu_seqlens(cu, cu, causal=True)
        x = torch.randn(cu[-1], 32)
        for layer in layers:
            layer(x, plan)
    assert counter.frame_count <= len(layers)


def test_the_compiled_layer_uses_the_plan_of_its_call() -> None:
    """Two plans of equal shape and different cells must not be mistaken for each other."""
    layer = PlanLayer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(12, 32)
    outs = []
    for cut in (3, 7, 3, 5):
        plan = weft.Plan.from_cu_seqlens([0, cut, 12], [0, cut, 12], causal=True)
        outs.append(compiled(x, plan))
        torch.testing.assert_close(outs[-1], layer(x, plan))
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])


def test_bad_input_is_refused_under_compile_too() -> None:
    compiled = torch.compile(DenseLayer(), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"head dim.*expected.*given"):
        compiled(*(torch.randn(1, 4, 2, 12) for _ in range(3)))


def test_inference_without_gradients_compiles() -> None:
    layer = PlanLayer().requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    plan = weft.Plan.zigzag([0, 9, 16], 0, 2, kv_order="sequence")
    whole = weft.Plan.concat([plan])
    x = torch.randn(whole.total_k, 32)
    dense = weft.Plan.dense(1, whole.total_k, whole.total_k, causal=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x, dense), layer(x, dense))


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor compiles C++ for the CPU")
def test_inductor_gives_the_same_results() -> None:
    layer = PlanLayer(softcap=2.0, has_sinks=True)
    # No vectors: what the C++ compiler makes of these, which it is asked one after the other, says nothing of the operators.
    options = {"cpp.simdlen": 1, "compile_threads": 1}
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, options=options)
    for lengths in BATCHES[:2]:
        cu = cumulative(lengths)
        plan = weft.Plan.from_cu_seqlens(cu, cu, causal=True)
        x = torch.randn(cu[-1], 32)
        leaves = list(layer.parameters())
        assert_same(gradients(lambda x=x, p=plan: compiled(x, p), leaves), gradients(lambda x=x, p=plan: layer(x, p), leaves))
