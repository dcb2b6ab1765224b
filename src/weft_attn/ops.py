"""The operators `weft::attention_forward` and `weft::attention_backward`: where launch meets kernels, and autograd is told.

Tensors are packed, (tokens, heads, dim). The mask crosses the operator boundary as a CPU int32 slice table (`Plan.table`), or,
for the dense case, as four integers (batch, causal, window) with no table at all; inside, it is the same `Plan` again, found by
the table's address. Inputs are checked by `checks.py` before they come here.

CPU tensors run the reference. With TRITON_INTERPRET=1 they run the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from weft_attn.errors import Unsupported
from weft_attn.launch.config import StreamConfig
from weft_attn.launch.device import Device, device_of
from weft_attn.launch.select import Problem, current_overrides, select
from weft_attn.launch.splits import ForwardCut, cut_forward, heads_per_wave
from weft_attn.plan.slices import Plan, live_plans
from weft_attn.plan.stream import DeviceStream, Tiling, device_stream
from weft_attn.reference import reference_attention

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


# ---- what runs ------------------------------------------------------------------------------------------------------------


def kernels_interpreted() -> bool:
    """Whether Triton was imported to interpret kernels (TRITON_INTERPRET=1), so that CPU tensors run them."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def runs_reference(device: torch.device) -> bool:
    """Whether tensors on `device` run the reference instead of a kernel: on the CPU, outside the interpreter."""
    if device.type == "cpu":
        return not kernels_interpreted()
    if device.type == "cuda":
        return False
    raise Unsupported(f"attention runs on the CPU, CUDA or ROCm: expected such a device, given {device.type!r}")


def _contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """Kernels want a contiguous last dimension; any token and head stride will do."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _describable(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can address these tensors: some rows, base and strides in whole 16 bytes."""
    return all(
        x.shape[0] > 0 and x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 and s > 0 for s in x.stride()[:-1])
        for x in tensors
    )


def problem_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Problem:
    """What selection needs to know of a call's tensors."""
    return Problem(q.shape[2], v.shape[2], q.element_size() * 8, tma_possible=_describable(q, k, v))


@dataclass(frozen=True)
class PreparedForward:
    """A forward's decisions for one plan, kept with it: everything but the tensors."""

    cut: ForwardCut
    stream: DeviceStream
    wave: int


def prepare_forward(plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> PreparedForward:
    """Select, cut and place: once per plan, problem, device and override."""
    problem = problem_of(q, k, v)
    key = ("forward", problem, q.shape[1], k.shape[1], q.device, current_overrides())
    found = plan._streams.get(key)
    if found is None:
        cut = cut_forward(plan, q.shape[1], k.shape[1], problem, device_of(q.device))
        kv_heads_together = _wave(cut.config, k, v, 1, k.shape[1])
        wave = kv_heads_together * (q.shape[1] // k.shape[1]) // cut.pack
        found = PreparedForward(cut, device_stream(plan, cut.tiling, q.device), wave)
        plan._streams[key] = found
    return found


def _wave(config: StreamConfig, one: torch.Tensor, other: torch.Tensor, heads_each: int, limit: int) -> int:
    """Heads that run together: `one` and `other` are streamed, `heads_each` of their heads for each head of the grid."""
    bytes_per_head = one.shape[0] * (one.shape[2] + other.shape[2]) * one.element_size() * heads_each
    return heads_per_wave(bytes_per_head, config.wave_bytes, limit)


def _forward_kernels(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: Plan,
    softmax_scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from weft_attn.kernels.triton.combine import combine_call
    from weft_attn.kernels.triton.forward import forward_call

    q, k, v = (_contiguous_rows(x) for x in (q, k, v))
    heads, head_dim_v = q.shape[1], v.shape[2]
    out = q.new_empty(q.shape[0], heads, head_dim_v)
    lse = torch.empty(heads, q.shape[0], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    prepared = prepare_forward(plan, q, k, v)
    cut, stream = prepared.cut, prepared.stream
    stream.join()
    partial_out = partial_lse = None
    if stream.slots:
        shape = (stream.slots, heads // cut.pack, cut.config.block_q)
        partial_out = torch.empty(*shape, head_dim_v, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    forward_call(
        q=q,
        k=k,
        v=v,
        sinks=sinks,
        out=out,
        lse=lse,
        partial_out=partial_out,
        partial_lse=partial_lse,
        items=stream.items,
        runs=stream.runs,
        n_items=stream.n_items,
        pack=cut.pack,
        heads_per_wave=prepared.wave,
        softmax_scale=softmax_scale,
        softcap=softcap,
        config=cut.config,
    ).launch()
    if partial_out is not None and partial_lse is not None:
        combine_call(
            partial_out=partial_out,
            partial_lse=partial_lse,
            sinks=sinks,
            out=out,
            lse=lse,
            combines=stream.combines,
            n_combines=stream.n_combines,
            pack=cut.pack,
            config=select("combine", problem_of(q, k, v), device_of(q.device)).config,
        ).launch()
    return out, lse


@dataclass(frozen=True)
class PreparedBackward:
    """A backward kernel's config, stream and wave for one plan."""

    config: Any
    stream: DeviceStream
    wave: int


def prepare_backward(
    kernel: str, plan: Plan, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> PreparedBackward:
    """As `prepare_forward`, for "backward_dkdv" or "backward_dq"."""
    key = (kernel, problem, q.shape[1], k.shape[1], q.device, current_overrides())
    found = plan._streams.get(key)
    if found is None:
        device: Device = device_of(q.device)
        config = select(kernel, problem, device).config
        assert isinstance(config, StreamConfig)
        group = q.shape[1] // k.shape[1]
        if kernel == "backward_dkdv":
            tiling = Tiling(config.block_k, config.block_q, transposed=True)
            wave = heads_per_wave(
                q.shape[0] * (q.shape[2] + v.shape[2]) * q.element_size() * group, config.wave_bytes, k.shape[1]
            )
        else:
            tiling = Tiling(config.block_q, config.block_k)
            wave = _wave(config, k, v, 1, k.shape[1]) * group
        found = PreparedBackward(config, device_stream(plan, tiling, q.device), wave)
        plan._streams[key] = found
    found.stream.join()
    return found


def _backward_kernels(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
    softmax_scale: float,
    softcap: float,
    needs_dq: bool,
    needs_dkv: bool,
    dkv_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from weft_attn.kernels.triton.backward_dkdv import backward_dkdv_call
    from weft_attn.kernels.triton.backward_dq import backward_dq_call
    from weft_attn.kernels.triton.delta import SHIFTED_COPIES, delta_call, empty_stats

    q, k, v, dout, out = (_contiguous_rows(x) for x in (q, k, v, dout, out))
    if dlse is not None:
        dlse = _contiguous_rows(dlse)
    heads, total_q = q.shape[1], q.shape[0]
    # One problem for both kernels, so that both are chosen alike. The copy engine counts elements in int32.
    describable = _describable(q, k, v, dout) and SHIFTED_COPIES * heads * total_q < 2**31
    problem = Problem(q.shape[2], v.shape[2], q.element_size() * 8, tma_possible=describable)
    device = device_of(q.device)
    dq = q.new_empty(q.shape if needs_dq else (0,))
    dk = k.new_empty(k.shape if needs_dkv else (0,), dtype=dkv_dtype)
    dv = v.new_empty(v.shape if needs_dkv else (0,), dtype=dkv_dtype)
    dkdv = prepare_backward("backward_dkdv", plan, problem, q, k, v)
    copies = SHIFTED_COPIES if needs_dkv and dkdv.config.use_tma else 1
    delta, lse_log2 = (empty_stats(heads, total_q, copies, q.device) for _ in range(2))
    if total_q:
        config = select("delta", problem, device).config
        delta_call(out=out, dout=dout, lse=lse, dlse=dlse, delta=delta, lse_log2=lse_log2, config=config).launch()
    shared = dict(q=q, k=k, v=v, dout=dout, lse_log2=lse_log2, delta=delta, softmax_scale=softmax_scale, softcap=softcap)
    if needs_dkv and k.shape[0]:
        backward_dkdv_call(
            **shared,
            dk=dk,
            dv=dv,
            items=dkdv.stream.items,
            runs=dkdv.stream.runs,
            n_items=dkdv.stream.n_items,
            heads_per_wave=dkdv.wave,
            config=dkdv.config,
        ).launch()
    if needs_dq and q.shape[0]:
        ready = prepare_backward("backward_dq", plan, problem, q, k, v)
        backward_dq_call(
            **shared,
            dq=dq,
            items=ready.stream.items,
            runs=ready.stream.runs,
            n_items=ready.stream.n_items,
            heads_per_wave=ready.wave,
            config=ready.config,
        ).launch()
    delta_of_rows = delta[0, : heads * total_q].view(heads, total_q)
    return dq, dk, dv, _sink_gradient(sinks, lse, delta_of_rows, q)


def _sink_gradient(sinks: torch.Tensor | None, lse: torch.Tensor, delta: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """dsink_h = -sum_i exp(sink_h - lse_hi) delta_hi: the sink is a key whose value is zero."""
    if sinks is None:
        return q.new_empty(0, dtype=torch.float32)
    share = torch.exp(sinks.to(torch.float32)[:, None] - lse)
    share = torch.where(torch.isneginf(lse), torch.zeros_like(share), share)
    return -(share * delta).sum(dim=1)


def _backward_reference(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: Plan,
    softmax_scale: float,
    softcap: float,
    needs_dq: bool,
    needs_dkv: bool,
    dkv_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # inference_mode(False) also brings autograd back where a compiled graph has switched it off around the operator; the copies
    # make ordinary tensors of inference tensors.
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().to(torch.float32, copy=True).requires_grad_() for x in (q, k, v)]
        if sinks is not None:
            leaves.append(sinks.detach().to(torch.float32, copy=True).requires_grad_())
        out, lse = reference_attention(
            *leaves[:3], plan, softmax_scale=softmax_scale, softcap=softcap, sinks=leaves[3] if sinks is not None else None
        )
        loss = (out * dout.to(torch.float32, copy=True)).sum()
        if dlse is not None:
            # A row that sees nothing has the constant lse -inf; it must not turn the sum into NaN.
            loss = loss + torch.where(torch.isinf(lse), 0.0, lse * dlse.clone()).sum()
        grads: list[torch.Tensor | None] = [None] * len(leaves)
        if loss.requires_grad:
            grads = list(torch.autograd.grad(loss, leaves, allow_unused=True))
    dq, dk, dv, *dsinks = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))
    return (
        dq.to(q.dtype) if needs_dq else q.new_empty(0),
        dk.to(dkv_dtype) if needs_dkv else k.new_empty(0, dtype=dkv_dtype),
        dv.to(dkv_dtype) if needs_dkv else v.new_empty(0, dtype=dkv_dtype),
        dsinks[0] if dsinks else q.new_empty(0, dtype=torch.float32),
    )


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
    deterministic: bool,  # the portable kernels are deterministic either way
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = _plan_of(slices, batch, causal, window_left, window_right, q.shape[0], k.shape[0])
    if runs_reference(q.device):
        out, lse = reference_attention(q, k, v, plan, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks)
        return out.contiguous(), lse.contiguous()
    return _forward_kernels(q, k, v, sinks, plan, softmax_scale, softcap)


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
    if dout is None:
        dout = torch.zeros_like(out)
    if runs_reference(q.device):
        return _backward_reference(dout, dlse, q, k, v, sinks, plan, softmax_scale, softcap, needs_dq, needs_dkv, dkv_dtype)
    return _backward_kernels(dout, dlse, q, k, v, sinks, out, lse, plan, softmax_scale, softcap, needs_dq, needs_dkv, dkv_dtype)


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
    needs_dq = ctx.needs_input_grad[0]
    needs_dkv = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dq, dk, dv, dsinks = torch.ops.weft.attention_backward(
        dout, dlse, q, k, v, sinks, out, lse, slices, *ctx.scalars, needs_dq, needs_dkv, None
    )
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
