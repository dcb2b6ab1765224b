"""Votes of a warp group: whether any of its threads has a number beyond a limit, at the price of one barrier.

A reduction says the same, through shuffles, shared memory and two barriers. The hardware's barrier takes a predicate of every thread
and gives each the result; but Gluon has no scalar that comes of a tensor without a reduction, so the result stays in a register of PTX,
which one assembly writes and the next one reads (docs/adr/0033).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from weft_attn.kernels.hopper import ptx
from weft_attn.kernels.hopper.turns import BARRIERS

THREADS = gl.constexpr(128)
# Columns of what is voted on, one of each of the four lanes that have a row's part of a product (`tiles.py: product_layout`).
COLUMNS = gl.constexpr(4)
BALLOT = gl.constexpr(
    gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, COLUMNS.value])
)


@gluon.constexpr_function
def _register(consumer):
    """The consumer's own: in PTX all consumers are one function."""
    return f"weft_vote_{consumer}"


@gluon.constexpr_function
def _declare(consumer):
    return f".reg .pred {_register(consumer)};"


@gluon.constexpr_function
def _vote(consumer, consumers, limit):
    """PTX: whether one of a thread's two values is beyond the limit or no number; all of the warp group know of each other; the values stay.

    Its barriers come before those of `turns.py`.
    """
    barrier = BARRIERS.value - 2 * consumers + consumer
    return (
        f"{{ .reg .pred mine; setp.gtu.f32 mine, $0, {limit}; setp.gtu.or.f32 mine, $1, {limit}, mine; "
        f"barrier.red.or.pred.aligned {_register(consumer)}, {barrier}, {THREADS.value}, mine; }}"
    )


@gluon.constexpr_function
def _read(consumer):
    return f"selp.u32 $0, 1, 0, {_register(consumer)};"


@gluon.jit
def begin_votes(CONSUMER: gl.constexpr):
    """Before a consumer's first vote, once."""
    ptx.run(_declare(CONSUMER), "", ())


@gluon.jit
def any_exceeds(values, LIMIT: gl.constexpr, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Whether one of a consumer's (64, COLUMNS) float32 values, held as BALLOT, exceeds a limit, a float32 of PTX, or is NaN; and the
    values, which nobody uses before the vote if they use these.
    """
    values = gl.inline_asm_elementwise(
        _vote(CONSUMER, CONSUMERS, LIMIT), "=f,=f,0,1", [values], dtype=gl.float32, is_pure=False, pack=2
    )
    return gl.inline_asm_elementwise(_read(CONSUMER), "=r", [], dtype=gl.int32, is_pure=False, pack=1) != 0, values
