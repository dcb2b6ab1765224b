"""A forward whose tensors lie as those of one before it, under the same plan: what was checked of them holds, and what it launches is known.

More than a third of the host's time of a short call would go to finding that out again (docs/adr/0016).
"""

from __future__ import annotations

from typing import Any

import torch

from weft_attn.launch.select import current_overrides
from weft_attn.ops import execute
from weft_attn.ops.plain import is_plain
from weft_attn.ops.recipes import Recipe, Tensors
from weft_attn.plan.slices import Plan

# Layouts of q, k and v that a plan remembers: one for each model that attends under it.
MAX_LAYOUTS = 64


class Warm:
    """Plain q, k and v of one layout, checked against each other and against their plan. Made by `remember`, found by `warm_of`."""

    def __init__(self, q: torch.Tensor, v: torch.Tensor) -> None:
        self._device = q.device
        self._out = (q.shape[0], q.shape[1], v.shape[2])
        self._lse = (q.shape[1], q.shape[0])
        # Of the last call: what else it depended on, and what it launched. One object, so that no thread sees half of another's.
        self._last: tuple[tuple[object, ...], Recipe] | None = None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, softmax_scale: float, softcap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out (Tq, Hq, Dv) and lse (Hq, Tq), without sinks; outside of autograd."""
        out = q.new_empty(self._out)
        lse = q.new_empty(self._lse, dtype=torch.float32)
        tensors: Tensors = dict(q=q, k=k, v=v, sinks=None, out=out, lse=lse)
        scalars = (softmax_scale, softcap, current_overrides())
        last = self._last
        if last is not None and last[0] == scalars:
            addresses = dict(
                q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), sinks=None, out=out.data_ptr(), lse=lse.data_ptr()
            )  # fmt: skip
            run = last[1].begin(tensors, addresses, self._device)
        else:
            run = execute.begin_forward(tensors, plan, softmax_scale, softcap, self._device)
            self._last = scalars, run.recipe
        run.launch(run.recipe.steps)
        return out, lse


def warm_of(q: Any, k: Any, v: Any, plan: Any) -> Warm | None:
    """What is remembered of tensors that lie like these; None of any others, of calls that are not plain, and of no tensors at all."""
    if not (_could_be_warm(q, k, v, plan) and is_plain(q, k, v)):
        return None
    found: Warm | None = plan._warm.get(_layout(q, k, v))
    return found


def remember(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> None:
    """Note tensors that have been checked, where kernels read them as they lie, aligned, and write something."""
    if not _could_be_warm(q, k, v, plan) or any(x.stride(2) != 1 for x in (q, k, v)) or not is_plain(q, k, v):
        return
    if execute.runs_reference(q.device) or any(x.data_ptr() % 16 for x in (q, k, v)) or 0 in (*q.shape, v.shape[2]):
        return
    if len(plan._warm) >= MAX_LAYOUTS:
        plan._warm.clear()
    plan._warm[_layout(q, k, v)] = Warm(q, v)


def _could_be_warm(q: Any, k: Any, v: Any, plan: Any) -> bool:
    """Of a parameter or a subclass each call is as the first."""
    return type(q) is type(k) is type(v) is torch.Tensor and type(plan) is Plan


def _layout(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[object, ...]:
    """All that checks and recipes read of tensors."""
    return (
        q.shape, k.shape, v.shape,
        q.stride(), k.stride(), v.stride(),
        q.dtype, k.dtype, v.dtype,
        q.get_device(), k.get_device(), v.get_device(),
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16,
    )  # fmt: skip
