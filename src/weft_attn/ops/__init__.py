"""The one place where launch meets kernels: operators with fakes and autograd (operators.py) over what runs (execute.py)."""

from weft_attn.ops.execute import (
    Backward,
    attention_into,
    backward_problem,
    begin_backward,
    is_deterministic,
    kernels_interpreted,
    prepare_forward,
    problem_of,
    runs_reference,
)
from weft_attn.ops.operators import NOT_DENSE, attention_forward, warm_attention
from weft_attn.ops.warm import Warm, remember, warm_of

__all__ = [
    "NOT_DENSE",
    "Backward",
    "Warm",
    "attention_forward",
    "attention_into",
    "backward_problem",
    "begin_backward",
    "is_deterministic",
    "kernels_interpreted",
    "prepare_forward",
    "problem_of",
    "remember",
    "runs_reference",
    "warm_attention",
    "warm_of",
]
