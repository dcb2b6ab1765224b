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
from weft_attn.ops.operators import attention_forward

__all__ = [
    "Backward",
    "attention_forward",
    "attention_into",
    "backward_problem",
    "begin_backward",
    "is_deterministic",
    "kernels_interpreted",
    "prepare_forward",
    "problem_of",
    "runs_reference",
]
