"""Votes of a warp group: whether any of its threads has a number beyond a limit, at the price of one barrier.

A reduction says the same, through shuffles and shared memory with two barriers, 200 cycles later. The hardware's barrier takes a
predicate of every thread and gives each the result; Gluon has no scalar that comes of a tensor without a reduction, so the result stays
in a register of PTX, which one assembly writes and another one reads (docs/adr/0033).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from weft_attn.kernels.hopper.turns import BARRIERS

THREADS = gl.constexpr(128)


@gluon.constexpr_function
def _register(consumer):
    """The consumer's own: all consumers are one function of PTX."""
    return f"weft_vote_{consumer}"


@gluon.constexpr_function
def _declare(consumer):
    return f".reg .pred {_register(consumer)}; mov.u32 $0, 0;"


@gluon.constexpr_function
def _vote(consumer, consumers, limit):
    """PTX: whether a value of a thread is not up to the limit, and with it all of the warp group know; the values as they were.

    The barrier comes before those of `turns.py`.
    """
    compared = " ".join(f"setp.gtu{'.or' * (i > 0)}.f32 mine, ${4 + i}, {limit}{', mine' * (i > 0)};" for i in range(4))
    kept = " ".join(f"mov.b32 ${i}, ${4 + i};" for i in range(4))
    barrier = BARRIERS.value - 2 * consumers + consumer
    return f"{{ .reg .pred mine; {compared} barrier.red.or.pred.aligned {_register(consumer)}, {barrier}, {THREADS.value}, mine; {kept} }}"


@gluon.constexpr_function
def _read(consumer):
    return f"selp.u32 $0, 1, 0, {_register(consumer)};"


@gluon.jit
def begin_votes(CONSUMER: gl.constexpr):
    """Before a consumer's first vote, once."""
    gl.inline_asm_elementwise(_declare(CONSUMER), "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def any_exceeds(values, LIMIT: gl.constexpr, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Whether one of a consumer's (64, 8) float32 values exceeds a limit, a float32 of PTX, or is NaN; and the values.

    Who uses the values that come back uses them after the vote.
    """
    values = gl.inline_asm_elementwise(
        _vote(CONSUMER, CONSUMERS, LIMIT), "=f,=f,=f,=f,f,f,f,f", [values], dtype=gl.float32, is_pure=False, pack=4
    )
    return gl.inline_asm_elementwise(_read(CONSUMER), "=r", [], dtype=gl.int32, is_pure=False, pack=1) != 0, values
