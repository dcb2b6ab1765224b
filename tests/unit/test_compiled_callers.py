"""Plans that are built inside a compiled function: the graph ends there, once, and a caller who asked for a whole one is told why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import weft_attn as weft
from weft_attn.integrations import flash_attn

PARALLEL = weft.ContextParallel()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_varlen(x: torch.Tensor, cu: Any) -> Any:
    return weft.varlen_attention(x, x, x, cu, cu, causal=True)


def by_flash_attn(x: torch.Tensor, cu: Any) -> Any:
    # The longest document changes with each batch.
    longest = max(int(stop - start) for start, stop in pairwise(cu)) if isinstance(cu, list) else 12
    return flash_attn.flash_attn_varlen_func(x, x, x, cu, cu, longest, longest, causal=True)


def by_plan(x: torch.Tensor, cu: Any) -> Any:
    return weft.plan_attention(x, x, x, weft.Plan.from_cu_seqlens(cu, cu, causal=True))


def by_context_parallel(x: torch.Tensor, cu: Any) -> Any:
    return weft.plan_attention(x, x, x, PARALLEL.plan(cu))


def by_cache(x: torch.Tensor, cu: Any) -> Any:
    cache = x[None].clone()
    return flash_attn.flash_attn_with_kvcache(x[None, :3], cache, cache, cache_seqlens=cu[1:2], causal=True)


CALLERS: list[Callable[[torch.Tensor, Any], Any]] = [by_varlen, by_flash_attn, by_plan, by_context_parallel, by_cache]
BATCHES = [[0, n, 12] if n % 2 else [0, n, n + 1, 12] for n in range(1, 10)]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.__name__)
def test_the_compiler_looks_into_no_plan_and_does_not_come_back_with_each_batch(caller: Any, as_tensor: bool) -> None:
    counter = CompileCounter()

    def layer(x: torch.Tensor, cu: Any) -> torch.Tensor:
        return caller(x * 2, cu).sin()

    compiled = torch.compile(layer, backend=counter)
    for cu in BATCHES:
        x = torch.randn(12, 2, 16)
        given = torch.tensor(cu) if as_tensor else cu
        assert torch.equal(compiled(x, given), layer(x, given))
    # Parts for the first sizes and for those that change. The arithmetic of plans would be hundreds of operations, in dozens of graphs.
    assert counter.frame_count <= 8
    assert counter.op_count <= 15


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.__name__)
def test_one_graph_is_refused_in_words_that_help(caller: Any) -> None:
    said = r"plans are built on the host.*before the graph.*plan_attention\(q, k, v, plan\) in it"
    if caller is by_context_parallel:
        said = r"works outside of compiled graphs.*without fullgraph=True, or a call before the graph.*of plan in one"
    with pytest.raises(Exception, match=said):
        torch.compile(caller, backend="eager", fullgraph=True)(torch.randn(12, 2, 16), torch.tensor([0, 5, 12]))


def test_a_plan_from_before_makes_one_graph() -> None:
    plan = weft.Plan.from_cu_seqlens([0, 5, 12], [0, 5, 12], causal=True)
    x = torch.randn(12, 2, 16)
    compiled = torch.compile(lambda x, plan: weft.plan_attention(x, x, x, plan), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, plan), by_varlen(x, [0, 5, 12]))


def test_the_package_is_imported_without_the_compiler() -> None:
    code = "import sys, weft_attn; weft_attn.Plan.dense(1, 2, 2); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
