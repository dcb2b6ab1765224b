"""Weft: exact attention of many query groups over one stream of keys, in one launch, forward and backward."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from weft_attn import launch
from weft_attn.api import attention, plan_attention, varlen_attention
from weft_attn.errors import InvalidInput, InvalidPlan, Unsupported, WeftError
from weft_attn.plan import Plan, Slice

if TYPE_CHECKING:
    from weft_attn.distributed.context_parallel import ContextParallel

# Before there is a process group: default arguments of these functions are the group of the moment they are imported, which keeps it and
# its threads after `destroy_process_group`, and a gloo thread that outlives the interpreter aborts the process. Whatever brings
# torch._dynamo brings them: torch.compiler.disable, many an optimizer, torch.compile. A torch without torch.distributed has none.
with contextlib.suppress(ImportError):
    importlib.import_module("torch.distributed.nn.functional")

__version__ = "0.1.0"

__all__ = [
    "ContextParallel",
    "InvalidInput",
    "InvalidPlan",
    "Plan",
    "Slice",
    "Unsupported",
    "WeftError",
    "attention",
    "launch",
    "plan_attention",
    "varlen_attention",
]


def __getattr__(name: str) -> Any:
    # Not at import: it brings torch.distributed and the compiler's switch along.
    if name == "ContextParallel":
        from weft_attn.distributed.context_parallel import ContextParallel

        return ContextParallel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
