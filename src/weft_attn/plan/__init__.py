"""Who attends to whom: host integers only."""

from weft_attn.plan.slices import Plan, Slice

__all__ = ["Plan", "Slice"]
