"""Bad input is a ValueError that says the rule, what was expected and what came, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import weft_attn as weft
from weft_attn import InvalidInput, InvalidPlan, WeftError

PLAN = weft.Plan.from_cu_seqlens([0, 3, 7], [0, 3, 7], causal=True)


def packed(tokens: int = 7, heads: int = 2, dim: int = 16, **options: Any) -> torch.Tensor:
    return torch.randn(tokens, heads, dim).to(**options) if options else torch.randn(tokens, heads, dim)


def dense(batch: int = 1, tokens: int = 7, heads: int = 2, dim: int = 16, **options: Any) -> torch.Tensor:
    return packed(batch * tokens, heads, dim, **options).view(batch, tokens, heads, dim)


def of_plan(q: Any = None, k: Any = None, v: Any = None, plan: Any = PLAN, **options: Any) -> Callable[[], object]:
    return lambda: weft.plan_attention(*(packed() if x is None else x for x in (q, k, v)), plan, **options)


def of_dense(q: Any = None, k: Any = None, v: Any = None, **options: Any) -> Callable[[], object]:
    return lambda: weft.attention(*(dense() if x is None else x for x in (q, k, v)), **options)


def of_varlen(cu_q: Any, cu_k: Any = (0, 3, 7), q: Any = None, **options: Any) -> Callable[[], object]:
    return lambda: weft.varlen_attention(packed() if q is None else q, packed(), packed(), cu_q, cu_k, **options)


SCALARS = [math.nan, math.inf, -math.inf, -1.0, True, "0.5", torch.tensor(0.5), [0.5], 1j]
FLAGS = [0, 1, "True", torch.tensor(True)]

CALLS: dict[str, tuple[Callable[[], object], type[WeftError]]] = {
    # Tensors.
    "q a list": (of_plan(q=[1.0]), InvalidInput),
    "q packed for dense": (of_dense(q=packed()), InvalidInput),
    "q dense for packed": (of_plan(q=dense()), InvalidInput),
    "k two-dimensional": (of_plan(k=packed()[0]), InvalidInput),
    "v five-dimensional": (of_dense(v=dense()[None]), InvalidInput),
    "float64": (of_plan(*(packed(dtype=torch.float64) for _ in range(3))), InvalidInput),
    "int8": (of_plan(*(packed(dtype=torch.int8) for _ in range(3))), InvalidInput),
    "complex": (of_plan(*(packed(dtype=torch.complex64) for _ in range(3))), InvalidInput),
    "k of another dtype": (of_plan(k=packed(dtype=torch.bfloat16)), InvalidInput),
    "v of another dtype": (of_dense(v=dense(dtype=torch.float16)), InvalidInput),
    "q on another device": (of_plan(q=packed(device="meta")), InvalidInput),
    "k on another device": (of_plan(k=packed(device="meta")), InvalidInput),
    "v on another device": (of_dense(v=dense(device="meta")), InvalidInput),
    "k and v of different lengths": (of_dense(v=dense(tokens=8)), InvalidInput),
    "k and v of different heads": (of_plan(v=packed(heads=1)), InvalidInput),
    "k of another batch than v": (of_dense(k=dense(2)), InvalidInput),
    "another batch of keys": (of_dense(k=dense(2), v=dense(2)), InvalidInput),
    "q and k of different head dims": (of_plan(q=packed(dim=24)), InvalidInput),
    "head dim not a multiple of 8": (of_plan(*(packed(dim=20) for _ in range(3))), InvalidInput),
    "head dim above 256": (of_dense(*(dense(dim=264) for _ in range(3))), InvalidInput),
    "head dim 0": (of_plan(*(packed(dim=0) for _ in range(3))), InvalidInput),
    "value head dim not a multiple of 8": (of_plan(v=packed(dim=15)), InvalidInput),
    "value head dim above 256": (of_plan(v=packed(dim=512)), InvalidInput),
    "query heads no multiple": (of_plan(q=packed(heads=3)), InvalidInput),
    "fewer query heads than KV heads": (of_plan(q=packed(heads=1)), InvalidInput),
    "no KV heads": (of_plan(k=packed(heads=0), v=packed(heads=0)), InvalidInput),
    "no query heads": (of_plan(q=packed(heads=0)), InvalidInput),
    # Plans and lengths.
    "no plan": (of_plan(plan=None), InvalidInput),
    "a table for a plan": (of_plan(plan=PLAN.table), InvalidInput),
    "too few query rows for the plan": (of_plan(q=packed(6)), InvalidInput),
    "too many query rows for the plan": (of_plan(q=packed(8)), InvalidInput),
    "too few keys for the plan": (of_plan(k=packed(6), v=packed(6)), InvalidInput),
    "cu_seqlens not from 0": (of_varlen([1, 7]), InvalidPlan),
    "cu_seqlens decreasing": (of_varlen([0, 8, 7]), InvalidPlan),
    "cu_seqlens of floats": (of_varlen([0.0, 3.0, 7.0]), InvalidPlan),
    "cu_seqlens a float tensor": (of_varlen(torch.tensor([0.0, 3.0, 7.0])), InvalidPlan),
    "cu_seqlens a bfloat16 tensor": (of_varlen(torch.tensor([0, 3, 7], dtype=torch.bfloat16)), InvalidPlan),
    "cu_seqlens without data": (of_varlen(torch.tensor([0, 3, 7], device="meta")), InvalidPlan),
    "cu_seqlens of bools": (of_varlen([False, True]), InvalidPlan),
    "cu_seqlens two-dimensional": (of_varlen([[0, 3, 7]]), InvalidPlan),
    "cu_seqlens empty": (of_varlen([]), InvalidPlan),
    "cu_seqlens None": (of_varlen(None), InvalidPlan),
    "cu_seqlens a string": (of_varlen("037"), InvalidPlan),
    "cu_seqlens of other documents": (of_varlen([0, 7]), InvalidPlan),
    "cu_seqlens short of the rows": (of_varlen([0, 3, 6]), InvalidInput),
    "cu_seqlens past the rows": (of_varlen([0, 3, 8]), InvalidInput),
    "cu_seqlens past the keys": (of_varlen([0, 3, 7], [0, 3, 8]), InvalidInput),
    # Windows.
    "window a number": (of_dense(window=3), InvalidPlan),
    "window of three": (of_dense(window=(1, 2, 3)), InvalidPlan),
    "window negative": (of_dense(window=(-1, 0)), InvalidPlan),
    "window of floats": (of_dense(window=(1.5, 0)), InvalidPlan),
    "window of bools": (of_varlen([0, 3, 7], window=(True, 0)), InvalidPlan),
    # Sinks.
    "sinks a number": (of_plan(sinks=0.0), InvalidInput),
    "sinks a list": (of_plan(sinks=[0.0, 0.0]), InvalidInput),
    "sinks of other heads": (of_plan(sinks=torch.zeros(3)), InvalidInput),
    "sinks two-dimensional": (of_plan(sinks=torch.zeros(2, 1)), InvalidInput),
    "sinks of float64": (of_dense(sinks=torch.zeros(2, dtype=torch.float64)), InvalidInput),
    "sinks of integers": (of_dense(sinks=torch.zeros(2, dtype=torch.int64)), InvalidInput),
    "sinks on another device": (of_dense(sinks=torch.zeros(2, device="meta")), InvalidInput),
    **{f"softmax_scale {x!r}": (of_plan(softmax_scale=x), InvalidInput) for x in SCALARS},
    **{f"softcap {x!r}": (of_dense(softcap=x), InvalidInput) for x in [*SCALARS, None]},
    **{f"causal {x!r}": (of_dense(causal=x), InvalidInput) for x in [*FLAGS, None]},
    **{f"causal {x!r}, packed": (of_varlen([0, 3, 7], causal=x), InvalidInput) for x in FLAGS},
    **{f"deterministic {x!r}": (of_plan(deterministic=x), InvalidInput) for x in [*FLAGS, None]},
    **{f"return_lse {x!r}": (of_plan(return_lse=x), InvalidInput) for x in [*FLAGS, None]},
    **{f"return_lse {x!r}, dense": (of_dense(return_lse=x), InvalidInput) for x in FLAGS},
    **{f"return_lse {x!r}, packed": (of_varlen([0, 3, 7], return_lse=x), InvalidInput) for x in FLAGS},
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_input_is_refused_before_anything_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*args: object, **options: object) -> None:
        raise AssertionError("something ran")

    monkeypatch.setattr("weft_attn.ops.execute.reference_attention", launched)
    monkeypatch.setattr("weft_attn.ops.operators.attention_into", launched)
    call, kind = CALLS[name]
    with pytest.raises(kind) as raised:
        call()
    message = str(raised.value)
    assert isinstance(raised.value, ValueError)
    assert "expected" in message, message
    assert "given" in message, message


def test_the_calls_above_are_refused_for_their_one_fault() -> None:
    """Without the fault the same calls run."""
    of_plan()()
    of_dense()()
    of_varlen([0, 3, 7])()
    of_plan(sinks=torch.zeros(2), softmax_scale=0.5, softcap=1.0, deterministic=True, return_lse=True)()
    of_dense(causal=True, window=(1, None), sinks=torch.zeros(2))()


def test_an_argument_that_does_not_exist_is_refused() -> None:
    for call in (of_plan(dropout_p=0.1), of_dense(alibi_slopes=None), of_varlen([0, 3, 7], max_seqlen_q=4)):
        with pytest.raises(TypeError):
            call()
