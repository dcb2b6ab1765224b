"""The rules about what a caller passes, one by one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from weft_attn import InvalidInput, checks


def packed(tokens: int = 5, heads: int = 4, dim: int = 16, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(tokens, heads, dim, **kwargs)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (8, 1), (6, 3)])
@pytest.mark.parametrize(("dim", "dim_v"), [(8, 8), (8, 256), (256, 8), (24, 80), (192, 128)])
def test_supported_tensors_pass(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, dim_v: int) -> None:
    q = packed(3, heads, dim, dtype=dtype)
    k = packed(7, kv_heads, dim, dtype=dtype)
    v = packed(7, kv_heads, dim_v, dtype=dtype)
    checks.qkv(q, k, v, packed=True)
    checks.qkv(q[None], k[None], v[None], packed=False)


@pytest.mark.parametrize(
    ("q", "k", "v", "rule"),
    [
        (None, packed(), packed(), "q is a tensor"),
        (packed(), [1], packed(), "k is a tensor"),
        (packed(), packed(), packed()[0], "v has 3 dimensions"),
        (packed()[None], packed(), packed(), "q has 3 dimensions"),
        (packed(2).to_sparse(), packed(), packed(), "q is a dense tensor"),
        (packed(), torch.nested.nested_tensor([packed()[0]]), packed(), "k is a dense tensor"),
        (packed(), packed(), torch.nested.nested_tensor([packed()[0]], layout=torch.jagged), "v is a dense tensor"),
        (packed(dtype=torch.float64), packed(dtype=torch.float64), packed(dtype=torch.float64), "fp16, bf16 or fp32"),
        (packed(dtype=torch.int32), packed(dtype=torch.int32), packed(dtype=torch.int32), "fp16, bf16 or fp32"),
        (packed(), packed(dtype=torch.float16), packed(), "share a dtype"),
        (packed(), packed(), packed(dtype=torch.bfloat16), "share a dtype"),
        (packed(), packed(device="meta"), packed(), "share a device"),
        (packed(), packed(), packed(device="meta"), "share a device"),
        (packed(), packed(6), packed(7), "k and v agree"),
        (packed(), packed(heads=2), packed(heads=4), "k and v agree"),
        (packed(dim=16), packed(dim=24), packed(), "share a head dim"),
        (packed(dim=12), packed(dim=12), packed(), "head dim of q and k"),
        (packed(dim=0), packed(dim=0), packed(), "head dim of q and k"),
        (packed(dim=264), packed(dim=264), packed(), "head dim of q and k"),
        (packed(), packed(), packed(dim=20), "head dim of v"),
        (packed(), packed(), packed(dim=264), "head dim of v"),
        (packed(heads=4), packed(heads=3), packed(heads=3), "multiple of KV heads"),
        (packed(heads=2), packed(heads=4), packed(heads=4), "multiple of KV heads"),
        (packed(heads=4), packed(heads=0), packed(heads=0), "multiple of KV heads"),
        (packed(heads=0), packed(heads=1), packed(heads=1), "multiple of KV heads"),
    ],
)
def test_tensors_that_break_a_rule_are_refused(q: Any, k: Any, v: Any, rule: str) -> None:
    with pytest.raises(InvalidInput, match=rule) as raised:
        checks.qkv(q, k, v, packed=True)
    assert "expected" in str(raised.value)
    assert "given" in str(raised.value)


def test_a_batch_is_shared() -> None:
    with pytest.raises(InvalidInput, match="share a batch: expected 2, given 3"):
        checks.qkv(packed().expand(2, 5, 4, 16), packed().expand(3, 5, 4, 16), packed().expand(3, 5, 4, 16), packed=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5, True, False, "1", None, 1j, torch.tensor(1.0), [1.0]])
def test_a_scalar_is_a_finite_number_that_is_not_negative(value: Any) -> None:
    with pytest.raises(InvalidInput, match=r"softcap .*expected.*given"):
        checks.number(value, "softcap")


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5, 1e-30, np.float32(0.5), np.float64(2), np.int64(3)])
def test_plain_numbers_are_scalars(value: float) -> None:
    found = checks.number(value, "softcap")
    assert found == value
    assert type(found) is float


def test_the_scale_is_one_over_the_root_of_the_head_dim_by_default() -> None:
    assert checks.scale(None, 64) == 0.125
    assert checks.scale(0.3, 64) == 0.3
    with pytest.raises(InvalidInput, match="softmax_scale"):
        checks.scale(math.nan, 64)


@pytest.mark.parametrize("value", [True, False, np.bool_(True), np.bool_(False)])
def test_a_flag_may_be_numpys(value: Any) -> None:
    assert checks.flag(value, "causal") is bool(value)


@pytest.mark.parametrize("value", [0, 1, None, "yes", torch.tensor(True)])
def test_a_flag_is_a_bool(value: Any) -> None:
    with pytest.raises(InvalidInput, match="causal is a bool: expected True or False, given"):
        checks.flag(value, "causal")


@pytest.mark.parametrize(
    "sinks",
    [0.0, [0.0] * 4, torch.zeros(3), torch.zeros(5), torch.zeros(4, 1), torch.zeros(()), torch.zeros(4, dtype=torch.float64)]
    + [torch.zeros(4, dtype=torch.int64), torch.zeros(4, device="meta")],
    ids=str,
)
def test_sinks_are_one_logit_per_query_head(sinks: Any) -> None:
    with pytest.raises(InvalidInput, match=r"sinks .*expected.*given"):
        checks.sink_logits(sinks, packed(heads=4))


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_sinks_may_have_any_supported_dtype(dtype: torch.dtype) -> None:
    checks.sink_logits(torch.zeros(4, dtype=dtype), packed(heads=4))
    checks.sink_logits(None, packed())


def test_rows_are_those_of_the_plan() -> None:
    checks.totals(packed(5), packed(7), 5, 7, "the plan")
    with pytest.raises(InvalidInput, match="q has the rows of the plan: expected 6, given 5"):
        checks.totals(packed(5), packed(7), 6, 7, "the plan")
    with pytest.raises(InvalidInput, match="k and v have the rows of cu_seqlens: expected 8, given 7"):
        checks.totals(packed(5), packed(7), 5, 8, "cu_seqlens")
