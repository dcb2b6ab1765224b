"""Backward on Hopper by keys: the kernel, which computes dK and dV, or with dq_sum dQ too.

A producer warp group feeds the consumers (by_keys.py): two that own 64 keys of one KV head each, backward_dkdv.py, with dq_sum
backward_fused.py, or at head dim 64 backward_narrow.py, where a third one has dQ; or above head dim 128 three that share 64 keys,
backward_wide.py. q, dout (Tq, Hq, D), k, v (Tk, Hkv, D): fp16 or bf16, D 64 or 128, with dq_sum also 256; lse_log2 and delta (Hq * Tq)
float32 from triton/delta.py or backward_dq.py; dk, dv (Tk, Hkv, D) in their own dtype; dq_sum (Hq, Tq, D) float32, zero before: dQ without
its scale is added to it, in any order or in turn (add_in_turn.py). Deterministic without dq_sum, and in turn.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from weft_attn.errors import require
from weft_attn.kernels.call import KernelCall
from weft_attn.kernels.hopper.add_in_turn import Turns, add_in_turn
from weft_attn.kernels.hopper.addresses import write_addresses
from weft_attn.kernels.hopper.backward_dkdv import consume_for_dkdv
from weft_attn.kernels.hopper.backward_fused import consume_for_all, make_exchange
from weft_attn.kernels.hopper.backward_narrow import NARROW_PLACES, consume_for_keys, consume_for_queries, make_dscores
from weft_attn.kernels.hopper.backward_wide import (
    DOUT_STAGES,
    make_wide_exchange,
    sum_products,
    weigh_and_differentiate,
)
from weft_attn.kernels.hopper.by_keys import Problem, make_memory, produce
from weft_attn.kernels.hopper.outbox import BOX_COLUMNS, boxes_of, make_outbox
from weft_attn.kernels.hopper.schedule import PRODUCER_REGISTERS, Alone, grid_of, make_schedule
from weft_attn.kernels.hopper.tiles import CONSUMERS, ROWS, head_box, make_agreement
from weft_attn.kernels.triton import layout
from weft_attn.kernels.triton.forward import score_scales

# Below it, lse divided by the scale of the scores might be more than statistics.py: ENOUGH.
LEAST_SCALE = 2.0**-64


@gluon.jit(do_not_specialize=layout.OF_THE_BATCH)
def hopper_backward_kernel(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    dq_sum_desc,
    lse_log2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    items_ptr,
    runs_ptr,
    stride_qh,
    stride_kh,
    stride_vh,
    stride_doh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    stride_stats_h,
    n_items,
    n_heads,
    heads_per_wave,
    last_heads,
    counter_ptr,
    turns_ptr,
    afters_ptr,
    zero,
    softmax_scale,
    inner_scale,
    outer_scale,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    FOLDS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    THIRD_REGISTERS: gl.constexpr,
    IS_NARROW: gl.constexpr,
    IS_WIDE: gl.constexpr,
    LAYOUT_DIGEST: gl.constexpr,
):
    WITH_DQ: gl.constexpr = dq_sum_desc is not None
    if IS_NARROW:
        write_addresses()
    # An integer that is 1 comes as a constant.
    p = Problem(
        q_desc, k_desc, v_desc, dout_desc, lse_log2_ptr, delta_ptr, dk_ptr, dv_ptr, items_ptr, runs_ptr,
        gl.to_tensor(stride_qh), gl.to_tensor(stride_kh), gl.to_tensor(stride_vh), gl.to_tensor(stride_doh),
        gl.to_tensor(stride_dkt), gl.to_tensor(stride_dkh), gl.to_tensor(stride_dvt), gl.to_tensor(stride_dvh),
        gl.to_tensor(stride_stats_h), zero, softmax_scale, inner_scale, outer_scale,
        GROUP, HEAD_DIM, BLOCK_Q, HAS_SOFTCAP, FOLDS,
    )  # fmt: skip
    IN_TURN: gl.constexpr = turns_ptr is not None
    ADDERS: gl.constexpr = HEAD_DIM // BOX_COLUMNS if IN_TURN else 0
    schedule = make_schedule(
        Alone(counter_ptr, IN_TURN),
        gl.to_tensor(n_items),
        gl.to_tensor(n_heads),
        gl.to_tensor(heads_per_wave),
        gl.to_tensor(last_heads),
        CONSUMERS + (1 if IS_WIDE or IS_NARROW else 0) + ADDERS,
        PRODUCER_WARPS=1 if IN_TURN else 4,
    )
    if IS_WIDE:
        memory = make_memory(p, schedule, 1, 1, STAGES, DOUT_STAGES)
        exchange = make_wide_exchange(p, memory, dq_sum_desc)
        fence_async_shared()
        gl.warp_specialize(
            [
                (produce, (p, memory, gl.constexpr(False))),
                (sum_products, (p, memory, exchange, gl.constexpr(True))),
                (sum_products, (p, memory, exchange, gl.constexpr(False))),
                (weigh_and_differentiate, (p, memory, exchange)),
            ],
            [4, 4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, THIRD_REGISTERS],
        )
    elif IS_NARROW:
        memory = make_memory(p, schedule, CONSUMERS, CONSUMERS, STAGES, 0, RELEASED_BY_WARPS=True)
        agreement = make_agreement(CONSUMERS)
        dscores = make_dscores(p)
        outbox = make_outbox(dq_sum_desc, memory.slots, NARROW_PLACES, IN_TURN)
        fence_async_shared()
        if IN_TURN:
            turns = Turns(turns_ptr, afters_ptr, n_heads * GROUP * p.stride_stats_h)
            gl.warp_specialize(
                [
                    (consume_for_keys, (p, memory, agreement, dscores, gl.constexpr(0))),
                    (consume_for_keys, (p, memory, agreement, dscores, gl.constexpr(1))),
                    (consume_for_queries, (p, memory, dscores, outbox)),
                    (produce, (p, memory, gl.constexpr(False))),
                    (add_in_turn, (p, memory, outbox, turns, gl.constexpr(0))),
                ],
                [4, 4, 1, 1],
                [CONSUMER_REGISTERS, THIRD_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
            )
        else:
            gl.warp_specialize(
                [
                    (produce, (p, memory, gl.constexpr(False))),
                    (consume_for_keys, (p, memory, agreement, dscores, gl.constexpr(0))),
                    (consume_for_keys, (p, memory, agreement, dscores, gl.constexpr(1))),
                    (consume_for_queries, (p, memory, dscores, outbox)),
                ],
                [4, 4, 4],
                [CONSUMER_REGISTERS, CONSUMER_REGISTERS, THIRD_REGISTERS],
            )
    elif WITH_DQ:
        memory = make_memory(p, schedule, CONSUMERS, CONSUMERS, STAGES, 0)
        agreement = make_agreement(CONSUMERS)
        exchange = make_exchange(p)
        first_outbox = make_outbox(dq_sum_desc, memory.slots, 1, IN_TURN)
        second_outbox = make_outbox(dq_sum_desc, memory.slots, 1, IN_TURN)
        fence_async_shared()
        if IN_TURN:
            turns = Turns(turns_ptr, afters_ptr, n_heads * GROUP * p.stride_stats_h)
            gl.warp_specialize(
                [
                    (consume_for_all, (p, memory, agreement, exchange, first_outbox, gl.constexpr(0))),
                    (consume_for_all, (p, memory, agreement, exchange, second_outbox, gl.constexpr(1))),
                    (produce, (p, memory, gl.constexpr(False))),
                    (add_in_turn, (p, memory, first_outbox, turns, gl.constexpr(0))),
                    (add_in_turn, (p, memory, second_outbox, turns, gl.constexpr(1))),
                ],
                [4, 1, 1, 1],
                [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
            )
        else:
            gl.warp_specialize(
                [
                    (produce, (p, memory, gl.constexpr(False))),
                    (consume_for_all, (p, memory, agreement, exchange, first_outbox, gl.constexpr(0))),
                    (consume_for_all, (p, memory, agreement, exchange, second_outbox, gl.constexpr(1))),
                ],
                [4, 4],
                [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
            )
    else:
        memory = make_memory(p, schedule, CONSUMERS, 1, STAGES, 0)
        agreement = make_agreement(CONSUMERS)
        fence_async_shared()
        gl.warp_specialize(
            [
                (produce, (p, memory, gl.constexpr(True))),
                (consume_for_dkdv, (p, memory, agreement, gl.constexpr(0))),
                (consume_for_dkdv, (p, memory, agreement, gl.constexpr(1))),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
        )


def hopper_backward_call(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse_log2: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dq_sum: torch.Tensor | None,
    items: torch.Tensor,
    runs: torch.Tensor,
    n_items: int,
    heads_per_wave: int,
    last_heads: int,
    counter: torch.Tensor,
    turns: torch.Tensor | None = None,
    afters: torch.Tensor | None = None,
    softmax_scale: float,
    softcap: float,
    multiprocessors: int,
    config: Any,
) -> KernelCall:
    """The launch.

    Args:
        q, k, v, dout, lse_log2, delta, dk, dv, dq_sum: as in the module's text; last dimensions contiguous, strides in whole 16 bytes.
        items, runs: tables of the transposed plan, cut as config.cut says, with dq_sum also with masks_ragged.
        heads_per_wave, last_heads: KV heads whose items run together (plan/in_step.py); those of the last wave at least (launch/splits.py).
        counter: (COUNTER_SIZE,) int32, zero; zero again afterwards.
        turns: (adders, Hq * Tq) int32, zero, and afters, the stream's: programs add to dq_sum in turn (add_in_turn.py). None: as they come.
        multiprocessors: programs of the persistent grid at most.
        config: a launch `HopperBackwardConfig`, or without dq_sum a `HopperBackwardDkdvConfig`. Of three consumers two have
            consumer_registers, and the third what they and the producer leave of max_registers for each of the four.
    """
    inner_scale, outer_scale = score_scales(softmax_scale, softcap)
    kv_heads = k.shape[1]
    # Three consumers share 64 keys, or 128 where one box is all columns of dQ.
    is_wide = config.cut[0] == ROWS.value
    is_narrow = dq_sum is not None and q.shape[2] == BOX_COLUMNS.value
    # A capped score is no sum that a product could begin with.
    folds = softcap == 0 and outer_scale >= LEAST_SCALE
    require(
        (turns is None) == (afters is None) and (turns is None or (dq_sum is not None and not is_wide)),
        "programs add in turn to dq_sum where items have 128 keys",
        expected="turns and afters, and dq_sum, for head dims up to 128",
        given=f"turns {turns is not None}, afters {afters is not None}, dq_sum {dq_sum is not None}, head dim {q.shape[2]}",
    )
    return KernelCall(
        kernel=hopper_backward_kernel,
        grid=grid_of(multiprocessors, n_items, kv_heads),
        arguments=dict(
            q_desc=head_box(q, config.block_q),
            k_desc=head_box(k, ROWS.value),
            v_desc=head_box(v, ROWS.value),
            dout_desc=head_box(dout, config.block_q),
            dq_sum_desc=None if dq_sum is None else boxes_of(dq_sum),
            lse_log2_ptr=lse_log2,
            delta_ptr=delta,
            dk_ptr=dk,
            dv_ptr=dv,
            items_ptr=items,
            runs_ptr=runs,
            stride_qh=q.stride(1),
            stride_kh=k.stride(1),
            stride_vh=v.stride(1),
            stride_doh=dout.stride(1),
            stride_dkt=dk.stride(0),
            stride_dkh=dk.stride(1),
            stride_dvt=dv.stride(0),
            stride_dvh=dv.stride(1),
            stride_stats_h=q.shape[0],
            n_items=n_items,
            n_heads=kv_heads,
            heads_per_wave=heads_per_wave,
            last_heads=last_heads,
            counter_ptr=counter,
            turns_ptr=turns,
            afters_ptr=afters,
            zero=0,
            softmax_scale=softmax_scale,
            inner_scale=inner_scale,
            outer_scale=outer_scale,
        ),
        constants=dict(
            LAYOUT_DIGEST=layout.DIGEST,
            GROUP=q.shape[1] // kv_heads,
            HEAD_DIM=q.shape[2],
            BLOCK_Q=config.block_q,
            STAGES=config.num_stages,
            HAS_SOFTCAP=softcap > 0,
            FOLDS=folds,
            IS_NARROW=is_narrow,
            IS_WIDE=is_wide,
            THIRD_REGISTERS=config.third_registers if is_narrow or is_wide else 0,
            CONSUMER_REGISTERS=config.consumer_registers,
        ),
        num_warps=config.num_warps,
        num_stages=1,
        max_registers=config.max_registers,
    )
