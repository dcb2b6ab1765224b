"""Weft: exact attention of many query groups over one stream of keys, in one launch, forward and backward."""

from weft_attn import launch
from weft_attn.api import attention, plan_attention, varlen_attention
from weft_attn.errors import InvalidInput, InvalidPlan, Unsupported, WeftError
from weft_attn.plan import Plan, Slice

__version__ = "0.1.0"

__all__ = [
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
