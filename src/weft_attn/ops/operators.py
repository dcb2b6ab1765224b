"""The operators `weft::attention_forward` and `weft::attention_backward`: where launch meets kernels, and autograd is told.

Tensors are packed, (tokens, heads, dim). The mask crosses the operator boundary as a CPU int32 slice table (`Plan.table`), or,
for the dense case, as four integers (batch, causal, window) with no table at all; inside, it is the same `Plan` again, found by
the table's address. Inputs are checked by `checks.py` before they come here.

`attention_forward` calls the operator, or straight what the operator would run, where nobody would see the difference (plain.py).
What runs is decided in execute.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from weft_attn.errors import Unsupported
from weft_attn.ops.execute import attention_into, begin_backward
from weft_attn.ops.plain import is_plain, refuse_tangents, wants_gradient
from weft_attn.ops.warm import Warm
from weft_attn.plan.slices import Plan, live_plans

# Batch, causal and window where the mask is a plan's.
NOT_DENSE = (1, False, None, None)

_library = torch.library.Library("weft", "DEF")
_MASK = "Tensor? slices, SymInt batch, bool causal, SymInt? window_left, SymInt? window_right"
_library.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_MASK}, "
    "float softmax_scale, float softcap, bool deterministic) -> (Tensor, Tensor)"
)
_library.define(
    f"attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, Tensor lse, {_MASK}, "
    "float softmax_scale, float softcap, bool deterministic, bool needs_dq, bool needs_dkv, ScalarType? dkv_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


# ---- plans across the operator boundary -----------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _dense_plan(batch: int, seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int | None, int | None]) -> Plan:
    return Plan.dense(batch, seqlen_q, seqlen_k, causal=causal, window=window)


def _plan_of(
    slices: torch.Tensor | None,
    batch: int,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    total_q: int,
    total_k: int,
) -> Plan:
    if slices is None:
        lengths = (total_q // batch, total_k // batch) if batch else (0, 0)
        return _dense_plan(batch, *lengths, causal, (window_left, window_right))
    plan = live_plans.get(slices.data_ptr()) if len(slices) else None
    if plan is None or plan.table.shape != slices.shape or (plan.total_q, plan.total_k) != (total_q, total_k):
        # A table that is not a live plan's own (a copy made by a graph or a test): the same cells, built again.
        plan = Plan._from_table(slices.numpy().astype("int64"), total_q, total_k)
        plan.check()
    return plan


# ---- the operators --------------------------------------------------------------------------------------------------------


@torch.library.impl(_library, "attention_forward", "CompositeExplicitAutograd")
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    slices: torch.Tensor | None,
    batch: int,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = _plan_of(slices, batch, causal, window_left, window_right, q.shape[0], k.shape[0])
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    attention_into(q, k, v, sinks, plan, softmax_scale, softcap, deterministic, out, lse)
    return out, lse


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _backward_op(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    slices: torch.Tensor | None,
    batch: int,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,
    needs_dq: bool,
    needs_dkv: bool,
    dkv_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    plan = _plan_of(slices, batch, causal, window_left, window_right, q.shape[0], k.shape[0])
    dkv_dtype = dkv_dtype or k.dtype
    dq = q.new_empty(q.shape) if needs_dq else None
    dk = k.new_empty(k.shape, dtype=dkv_dtype) if needs_dkv else None
    dv = v.new_empty(v.shape, dtype=dkv_dtype) if needs_dkv else None
    dsinks = begin_backward(
        torch.zeros_like(out) if dout is None else dout,
        dlse, q, k, v, sinks, out, lse, plan, softmax_scale, softcap, deterministic, dq, dk, dv,
    ).complete()  # fmt: skip
    return (
        q.new_empty(0) if dq is None else dq,
        k.new_empty(0, dtype=dkv_dtype) if dk is None else dk,
        v.new_empty(0, dtype=dkv_dtype) if dv is None else dv,
        q.new_empty(0, dtype=torch.float32) if dsinks is None else dsinks,
    )


@torch.library.register_fake("weft::attention_forward", lib=_library)
def _forward_fake(q, k, v, sinks, slices, *mask_and_scalars):  # type: ignore[no-untyped-def]
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return out, lse


@torch.library.register_fake("weft::attention_backward", lib=_library)
def _backward_fake(  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, sinks, out, lse, slices, batch, causal, window_left, window_right,
    softmax_scale, softcap, deterministic, needs_dq, needs_dkv, dkv_dtype,
):  # fmt: skip
    dkv_dtype = dkv_dtype or k.dtype
    return (
        q.new_empty(q.shape if needs_dq else (0,)),
        k.new_empty(k.shape if needs_dkv else (0,), dtype=dkv_dtype),
        v.new_empty(v.shape if needs_dkv else (0,), dtype=dkv_dtype),
        q.new_empty(0 if sinks is None else sinks.shape[0], dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, sinks, slices, *scalars = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, sinks, slices, out, lse)
    # Keep the plan, and with it its device tables, until the backward; while a graph is traced there is none to keep.
    ctx.plan = live_plans.get(slices.data_ptr()) if type(slices) is torch.Tensor else None
    ctx.scalars = tuple(scalars)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, sinks, slices, out, lse = ctx.saved_tensors
    if ctx.plan is not None:
        # The plan's own table, which leads back to it: hooks on saved tensors may have made a copy of it.
        slices = ctx.plan.table
    needs_dq = ctx.needs_input_grad[0]
    needs_dkv = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    arguments = (dout, dlse, q, k, v, sinks, out, lse, slices, *ctx.scalars, needs_dq, needs_dkv, None)
    if is_plain(*arguments[:8]) and not torch.is_grad_enabled():
        dq, dk, dv, dsinks = _backward_op(*arguments)
    else:
        # With gradients enabled a second derivative may follow, which the operator refuses.
        dq, dk, dv, dsinks = torch.ops.weft.attention_backward(*arguments)
    return (
        dq if needs_dq else None,
        dk if ctx.needs_input_grad[1] else None,
        dv if ctx.needs_input_grad[2] else None,
        dsinks if sinks is not None and ctx.needs_input_grad[3] else None,
        None,
        *[None] * len(ctx.scalars),
    )


torch.library.register_autograd("weft::attention_forward", _backward, setup_context=_setup_context, lib=_library)


def _refuse_second_derivative(ctx: Any, *grads: torch.Tensor | None) -> None:
    raise Unsupported("attention is differentiated once: expected a first derivative, given a second one")


torch.library.register_autograd("weft::attention_backward", _refuse_second_derivative, lib=_library)


# ---- without the dispatcher -----------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """What autograd notes of the forward operator, for a call that does not pass through the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = _forward_op(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, *mask_and_scalars: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator `weft::attention_forward`, on the shortest way."""
    refuse_tangents(q, k, v, sinks)
    if not is_plain(q, k, v, sinks):
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.weft.attention_forward(q, k, v, sinks, *mask_and_scalars)
        return found
    run = _Attention.apply if wants_gradient(q, k, v, sinks) else _forward_op
    return run(q, k, v, sinks, *mask_and_scalars)


class _WarmAttention(torch.autograd.Function):
    """The same of a call that is remembered."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, warm, plan = given
        output: tuple[torch.Tensor, torch.Tensor] = warm.forward(*inputs[:3], plan, *inputs[-3:-1])
        _setup_context(ctx, tuple(inputs), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        return (*_backward(ctx, *grads), None, None)


def warm_attention(
    warm: Warm,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention_forward` without sinks, of tensors that `warm` was found for just now."""
    if wants_gradient(q, k, v):
        apply: Any = _WarmAttention.apply
        mask_and_scalars = plan.table, *NOT_DENSE, softmax_scale, softcap, deterministic
        found: tuple[torch.Tensor, torch.Tensor] = apply(q, k, v, None, *mask_and_scalars, warm, plan)
        return found
    return warm.forward(q, k, v, plan, softmax_scale, softcap)
