"""The rules about what a caller passes to attention: each one once, as a function, with its words.

Only shapes, dtypes and devices are read, never values, so that the checks cost no synchronisation and can be traced.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from weft_attn.errors import InvalidInput, refuse, require

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256

# Dimensions of q, k and v, in words.
_PACKED = tuple(f"(tokens, heads, {dim})" for dim in ("D", "D", "Dv"))
_BATCHED = tuple(f"(batch, seqlen, heads, {dim})" for dim in ("D", "D", "Dv"))


def is_tensor(x: Any, name: str, ndim: int, layout: str) -> None:
    if not isinstance(x, torch.Tensor):
        refuse(f"{name} is a tensor", expected="torch.Tensor", given=type(x).__name__)
    if x.layout != torch.strided or x.is_nested:
        refuse(f"{name} is a dense tensor", expected="torch.strided, not nested", given=x.layout)
    if x.ndim != ndim:
        refuse(f"{name} has {ndim} dimensions", expected=layout, given=tuple(x.shape))


def qkv(q: Any, k: Any, v: Any, *, packed: bool) -> None:
    """Shapes, dtypes, devices and head counts of q, k and v; (T, H, D) when packed, (B, S, H, D) otherwise."""
    ndim, (of_q, of_k, of_v) = (3, _PACKED) if packed else (4, _BATCHED)
    is_tensor(q, "q", ndim, of_q)
    is_tensor(k, "k", ndim, of_k)
    is_tensor(v, "v", ndim, of_v)
    # What has passed once passes again: a warm call only looks it up. Traced sizes have no hash.
    facts = (q.shape, k.shape, v.shape, (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device))
    is_traced = torch.compiler.is_compiling() or not all(type(n) is int for size in facts[:3] for n in size)
    (_agree if is_traced else _agree_once)(*facts)


def _agree(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    devices: tuple[torch.device, torch.device, torch.device],
) -> None:
    require(dtypes[0] in DTYPES, "q, k and v are fp16, bf16 or fp32", expected=DTYPES, given=dtypes[0])
    require(dtypes[1] == dtypes[0] and dtypes[2] == dtypes[0], "q, k and v share a dtype", expected=dtypes[0], given=dtypes[1:])
    require(
        devices[1] == devices[0] and devices[2] == devices[0],
        "q, k and v share a device",
        expected=devices[0],
        given=devices[1:],
    )
    require(k[:-1] == v[:-1], "k and v agree in all but head dim", expected=tuple(k[:-1]), given=tuple(v[:-1]))
    require(q[-1] == k[-1], "q and k share a head dim", expected=q[-1], given=k[-1])
    head_dim(q[-1], "the head dim of q and k")
    head_dim(v[-1], "the head dim of v")
    heads, kv_heads = q[-2], k[-2]
    require(
        kv_heads >= 1 and heads >= 1 and heads % kv_heads == 0,
        "query heads are a multiple of KV heads",
        expected="Hq % Hkv == 0, both at least 1",
        given=f"Hq={heads}, Hkv={kv_heads}",
    )
    if len(q) == 4:
        require(q[0] == k[0], "q and k share a batch", expected=q[0], given=k[0])


def head_dim(value: int, name: str) -> int:
    """A head dim that attention takes."""
    require(
        8 <= value <= MAX_HEAD_DIM and value % 8 == 0,
        f"{name} is a multiple of 8 up to {MAX_HEAD_DIM}",
        expected=f"8, 16, ..., {MAX_HEAD_DIM}",
        given=value,
    )
    return value


_agree_once = lru_cache(maxsize=1024)(_agree)


def totals(q: torch.Tensor, k: torch.Tensor, total_q: int, total_k: int, owner: str) -> None:
    """The packed rows match what the plan or cu_seqlens say."""
    if q.shape[0] != total_q:
        refuse(f"q has the rows of {owner}", expected=total_q, given=q.shape[0])
    if k.shape[0] != total_k:
        refuse(f"k and v have the rows of {owner}", expected=total_k, given=k.shape[0])


def number(value: Any, name: str) -> float:
    """A finite, non-negative number of Python or numpy."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InvalidInput(f"{name} is a number: expected a finite float >= 0, given {value!r}")
    # Comparisons, not math.isfinite: torch.compile(dynamic=True) traces them.
    if not 0 <= value < math.inf:
        refuse(f"{name} is finite and not negative", expected=">= 0", given=value)
    return float(value)


def scale(value: Any, head_dim: int) -> float:
    """softmax_scale, D ** -0.5 by default."""
    return head_dim**-0.5 if value is None else number(value, "softmax_scale")


def flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        refuse(f"{name} is a bool", expected="True or False", given=repr(value))
    return bool(value)


def sink_logits(sinks: Any, q: torch.Tensor) -> None:
    """sinks: (Hq,) floating point on q's device."""
    if sinks is None:
        return
    is_tensor(sinks, "sinks", 1, "(Hq,)")
    require(sinks.shape[0] == q.shape[-2], "sinks has one logit per query head", expected=q.shape[-2], given=sinks.shape[0])
    require(sinks.dtype in DTYPES, "sinks is fp16, bf16 or fp32", expected=DTYPES, given=sinks.dtype)
    require(sinks.device == q.device, "sinks is on q's device", expected=q.device, given=sinks.device)
