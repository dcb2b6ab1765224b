"""The oracle: attention under a plan in plain PyTorch, any device, any dtype, differentiable by autograd.

    s_ij = softcap * tanh(scale * q_i.k_j / softcap)          (softcap 0: scale * q_i.k_j)
    lse_i = log(sum_j exp(s_ij) + exp(sink))                  (no sink: the sum alone)
    out_i = sum_j exp(s_ij - lse_i) v_j

where j runs over the keys that row i sees. Exact and slow: memory is one block of scores at a time (kept for autograd where
gradients are asked for). It is what CPU tensors run, and what every kernel is compared with.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from weft_attn.plan.slices import K_LEN, K_START, Q_LEN, Q_START, Plan, elementary_segments, visible_interval

# Scores held at a time, in elements over all heads: 2**26 float32 are 256 MiB.
MAX_BLOCK_SCORES = 2**26


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under a plan, by definition.

    Args:
        q: (total_q, Hq, D), k: (total_k, Hkv, D), v: (total_k, Hkv, Dv).
        plan: who attends to whom.
        softmax_scale: multiplies q.k; None: D ** -0.5.
        softcap: bound of the scores, 0 for none.
        sinks: (Hq,) logits that join each row's denominator, or None.
        compute_dtype: dtype of the arithmetic; None: float32, or float64 for float64 inputs. The input dtype itself gives the
            error that PyTorch makes in it, to which kernels are held.

    Returns:
        out (total_q, Hq, Dv) in q's dtype; lse (Hq, total_q) natural log, in float32 (float64 for float64 arithmetic).
    """
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    compute = compute_dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    stats = torch.float64 if compute == torch.float64 else torch.float32
    qc, kc, vc = (x.to(compute) for x in (q, k, v))
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    rows = plan.rows
    bounds = elementary_segments(rows, plan.total_q)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        seen = rows[(rows[:, Q_START] <= start) & (rows[:, Q_START] + rows[:, Q_LEN] >= stop)]
        keys = int(seen[:, K_LEN].sum())
        if keys == 0:
            outs.append(qc.new_zeros(stop - start, heads, v.shape[2]))
            lses.append(_empty_lse(sinks, heads, stop - start, stats, q.device))
            continue
        index = torch.from_numpy(np.concatenate([np.arange(s, s + n) for s, n in seen[:, [K_START, K_LEN]].tolist()]))
        index = index.to(q.device)
        k_seen = kc[index].repeat_interleave(group, dim=1)
        v_seen = vc[index].repeat_interleave(group, dim=1)
        step = max(1, MAX_BLOCK_SCORES // (keys * heads))
        for first in range(start, stop, step):
            last = min(stop, first + step)
            mask = torch.from_numpy(_block_mask(seen, first, last)).to(q.device)
            with _without_autocast(q.device):
                out, lse = _attend(qc[first:last], k_seen, v_seen, mask, scale, softcap, sinks, stats)
            outs.append(out)
            lses.append(lse)
    if not outs:
        empty = qc.new_zeros(0, heads, v.shape[2])
        return empty.to(q.dtype), torch.zeros(heads, 0, dtype=stats, device=q.device)
    return torch.cat(outs).to(q.dtype), torch.cat(lses, dim=1)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Arithmetic in the dtype of its operands: autocast would round the products' to its own."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def _block_mask(seen: np.ndarray, first: int, last: int) -> np.ndarray:
    """(rows, keys) bool: what rows [first, last) see of the slices' keys, one slice after the other."""
    blocks = []
    for q_start, _, _, k_len, lo, hi in seen.tolist():
        begin, end = visible_interval(np.arange(first - q_start, last - q_start), k_len, lo, hi)
        columns = np.arange(k_len)
        blocks.append((columns >= begin[:, None]) & (columns < end[:, None]))
    return np.concatenate(blocks, axis=1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
    stats: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    # q (R, H, D), k (K, H, D), v (K, H, Dv), mask (R, K) -> out (R, H, Dv), lse (H, R)
    scores = torch.einsum("rhd,khd->hrk", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf")).to(stats)
    peak = scores.amax(dim=-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks.to(stats)[:, None, None])
    peak = torch.where(torch.isinf(peak), torch.zeros_like(peak), peak).detach()
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.to(stats)[:, None, None] - peak)
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    probs = (weights / safe).to(v.dtype)
    out = torch.einsum("hrk,khd->rhd", probs, v)
    lse = torch.where(empty, torch.full_like(safe, float("-inf")), peak + torch.log(safe))
    return out, lse[..., 0]


def _empty_lse(sinks: torch.Tensor | None, heads: int, rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows that see no key: -inf, or the sink's own logit where there is one (its term is all the denominator holds)."""
    if sinks is None:
        return torch.full((heads, rows), float("-inf"), dtype=dtype, device=device)
    return sinks.to(dtype)[:, None].expand(heads, rows)


def reference_gradients(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    softmax_scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `reference_attention` by autograd, in float32: of q, k, v and the sinks (None without).

    Args:
        dout, dlse: gradients of out (Tq, Hq, Dv) and lse (Hq, Tq); dlse None: the loss does not read lse.
    """
    # inference_mode(False) also brings autograd back where a compiled graph has switched it off around the operator; the copies
    # make ordinary tensors of inference tensors.
    with torch.inference_mode(False), torch.enable_grad(), _without_autocast(q.device):
        own_q, own_k, own_v = (x.detach().to(torch.float32, copy=True).requires_grad_() for x in (q, k, v))
        own_sinks = None if sinks is None else sinks.detach().to(torch.float32, copy=True).requires_grad_()
        out, lse = reference_attention(own_q, own_k, own_v, plan, softmax_scale=softmax_scale, softcap=softcap, sinks=own_sinks)
        loss = (out * dout.to(torch.float32, copy=True)).sum()
        if dlse is not None:
            # A row that sees nothing has the constant lse -inf; it must not turn the sum into NaN.
            loss = loss + torch.where(torch.isinf(lse), 0.0, lse * dlse.clone()).sum()
        leaves = [own_q, own_k, own_v, *([] if own_sinks is None else [own_sinks])]
        grads: list[torch.Tensor | None] = [None] * len(leaves)
        if loss.requires_grad:
            grads = list(torch.autograd.grad(loss, leaves, allow_unused=True))
    dq, dk, dv, *dsinks = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))
    return dq, dk, dv, dsinks[0] if dsinks else None
