"""The public functions: `attention`, `varlen_attention`, `plan_attention`."""

from __future__ import annotations

from typing import Any

import torch

from weft_attn import checks, ops
from weft_attn.errors import refuse
from weft_attn.plan import build
from weft_attn.plan.slices import Plan

Window = tuple[int | None, int | None]
AttentionOutput = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> AttentionOutput:
    """Exact attention over a batch of sequences of equal length.

    Args:
        q: (B, Sq, Hq, D), fp16, bf16 or fp32, also under autocast, which casts nothing here. D a multiple of 8 up to 256.
        k: (B, Sk, Hkv, D), like q; Hq a multiple of Hkv.
        v: (B, Sk, Hkv, Dv), like q; Dv a multiple of 8 up to 256, D != Dv allowed.
        causal: row i sees keys up to i + Sk - Sq (the last row is aligned with the last key).
        window: (left, right) keys around that diagonal; None on a side: no bound.
        softmax_scale: multiplies q.k; None: D ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); 0: none.
        sinks: (Hq,) logits that join each row's denominator, differentiable; None: none.
        deterministic: bitwise repeatable gradients (`torch.use_deterministic_algorithms` asks for them too). Without, where rows see
            many keys, a faster backward on Hopper adds dq up in float32 in an order that changes from run to run.
        return_lse: also return the log-sum-exp of each row.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype; with return_lse also lse (B, Hq, Sq) float32, natural log, differentiable, the sink's
        term included. A row that sees no key gives out 0 and, without sinks, lse -inf.

    Raises:
        InvalidInput, InvalidPlan: (both ValueError) a shape, dtype, device, head count or scalar that breaks a rule.
        Unsupported: (a ValueError) no kernel config fits the device.

    Determinism and memory: bitwise repeatable, but for dq as `deterministic` says. Saves q, k, v, out and lse for the backward; no
    score matrix. A backward takes row statistics (32 bytes a row and head at most, 8 more where it adds in turn) and, where it adds
    dq up, 4 bytes for each element of q. A batch that cannot be viewed as (B * S, H, D) is copied once.

    Example:
        >>> import torch, weft_attn as weft
        >>> q, k = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16)
        >>> weft.attention(q, k, k, causal=True).shape
        torch.Size([1, 5, 4, 16])

    Source: online softmax and its backward as in FlashAttention-2 (Dao, 2023).
    """
    checks.qkv(q, k, v, packed=False)
    checks.flag(return_lse, "return_lse")
    left, right = build.checked_window(window)
    batch, seqlen_q, heads, _ = q.shape
    out, lse = _call(
        q.reshape(-1, heads, q.shape[3]),
        k.reshape(-1, *k.shape[2:]),
        v.reshape(-1, *v.shape[2:]),
        None,
        (batch, checks.flag(causal, "causal"), left, right),
        softmax_scale,
        softcap,
        sinks,
        deterministic,
    )
    out = out.view(batch, seqlen_q, heads, v.shape[3])
    if return_lse:
        return out, lse.view(heads, batch, seqlen_q).transpose(0, 1)
    return out


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    causal: bool = False,
    window: Window | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> AttentionOutput:
    """Exact attention over packed documents: rows of document d see keys of document d.

    Builds a `Plan` on each call. To reuse one over layers, build it once and call `plan_attention`. A compiled graph ends where the
    plan is built; under fullgraph=True build it before the graph and call `plan_attention` in it.

    Args:
        q: (Tq, Hq, D), k: (Tk, Hkv, D), v: (Tk, Hkv, Dv), documents one after the other; dtypes and head dims as `attention`.
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) integers, from 0, not decreasing, ending at Tq and Tk. On the host (list,
            numpy, CPU tensor); a tensor on a device is copied to the host, which waits for it.
        causal, window, softmax_scale, softcap, sinks, deterministic, return_lse: as in `attention`, per document.

    Returns:
        out (Tq, Hq, Dv) in q's dtype; with return_lse also lse (Hq, Tq) float32, natural log.

    Raises:
        InvalidInput, InvalidPlan: (both ValueError) also for cu_seqlens not from 0, decreasing, not integers, of different
            numbers of documents, or not ending at Tq and Tk.

    Example:
        >>> import torch, weft_attn as weft
        >>> x = torch.randn(7, 2, 16)
        >>> weft.varlen_attention(x, x, x, [0, 3, 7], [0, 3, 7], causal=True).shape
        torch.Size([7, 2, 16])
    """
    checks.qkv(q, k, v, packed=True)
    plan = Plan.from_cu_seqlens(cu_seqlens_q, cu_seqlens_k, causal=checks.flag(causal, "causal"), window=window)
    checks.totals(q, k, plan.total_q, plan.total_k, "cu_seqlens")
    checks.flag(return_lse, "return_lse")
    out, lse = _call(q, k, v, plan, ops.NOT_DENSE, softmax_scale, softcap, sinks, deterministic)
    return (out, lse) if return_lse else out


def plan_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> AttentionOutput:
    """Exact attention under any plan: many query groups over one stream of keys, in one launch.

    Args:
        q: (plan.total_q, Hq, D), k: (plan.total_k, Hkv, D), v: (plan.total_k, Hkv, Dv); dtypes and head dims as `attention`.
        plan: who attends to whom; built once per batch and reused by every layer.
        softmax_scale, softcap, sinks, deterministic, return_lse: as in `attention`.

    Returns:
        out (Tq, Hq, Dv) in q's dtype; with return_lse also lse (Hq, Tq) float32, natural log. Keys that no row sees get zero
        gradients.

    Raises:
        InvalidInput: (a ValueError) also when q or k do not have the plan's rows.

    Example:
        >>> import torch, weft_attn as weft
        >>> plan = weft.Plan.zigzag([0, 9, 16], rank=0, world_size=2)
        >>> q, kv = torch.randn(plan.total_q, 4, 16), torch.randn(plan.total_k, 2, 16)
        >>> weft.plan_attention(q, kv, kv, plan).shape
        torch.Size([8, 4, 16])
    """
    warm = ops.warm_of(q, k, v, plan)
    if warm is None:
        checks.qkv(q, k, v, packed=True)
        if not isinstance(plan, Plan):
            refuse("plan is a Plan", expected="weft_attn.Plan", given=type(plan).__name__)
        checks.totals(q, k, plan.total_q, plan.total_k, "the plan")
    checks.flag(return_lse, "return_lse")
    out, lse = _call(q, k, v, plan, ops.NOT_DENSE, softmax_scale, softcap, sinks, deterministic, warm)
    if warm is None:
        ops.remember(q, k, v, plan)
    return (out, lse) if return_lse else out


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan | None,
    dense: tuple[int, bool, int | None, int | None],
    softmax_scale: float | None,
    softcap: float,
    sinks: torch.Tensor | None,
    deterministic: bool,
    warm: ops.Warm | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    checks.sink_logits(sinks, q)
    scalars = (
        checks.scale(softmax_scale, q.shape[2]),
        checks.number(softcap, "softcap"),
        checks.flag(deterministic, "deterministic"),
    )
    if warm is not None and plan is not None and sinks is None:
        return ops.warm_attention(warm, q, k, v, plan, *scalars)
    return ops.attention_forward(
        q,
        k,
        v,
        # Outside the operator, so that autograd casts the gradient back to the caller's dtype.
        None if sinks is None else sinks.to(torch.float32),
        None if plan is None else plan.table,
        *dense,
        *scalars,
    )
