"""Where a compiled graph ends for the work of the host.

Loaded while a graph is traced, and not before: it loads PyTorch's compiler, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="plans are built on the host, outside of compiled graphs: expected weft_attn.Plan.from_cu_seqlens(...), or another "
    "builder, before the graph and weft_attn.plan_attention(q, k, v, plan) in it, given a call that builds a plan"
)
def run_outside(work: Callable[..., _Result], *args: object, **kwargs: object) -> _Result:
    """`work` of these arguments. A graph that is traced breaks here; with fullgraph=True the compiler raises and says why."""
    return work(*args, **kwargs)
