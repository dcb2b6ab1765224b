"""Consumers that start their products in turn: 0, 1, 2, 0, 1, 2, ...

Three consumers left to themselves weigh their scores at the same time and then all wait for the tensor cores; in turn, the products of
one run beside the weights of the others (docs/adr/0022). Each has a barrier of the hardware that it waits at and its predecessor
arrives at. Every consumer takes as many turns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from weft_attn.kernels.hopper import ptx

# The hardware has 16 barriers: Triton counts its own from 0; these are the last ones, before them those of votes.py, then of hold.py.
BARRIERS = gl.constexpr(16)
# Threads at a barrier: a consumer's and its predecessor's.
THREADS = gl.constexpr(256)


@gluon.constexpr_function
def _barrier(operation, consumer, consumers):
    """PTX: what a consumer's barrier is told."""
    return f"barrier.{operation}.aligned {BARRIERS.value - consumers + consumer}, {THREADS.value};"


@gluon.jit
def _tell(OPERATION: gl.constexpr, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    ptx.run(_barrier(OPERATION, CONSUMER, CONSUMERS), "", ())


@gluon.jit
def begin_turns(CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Before the first turn: nobody comes before the first consumer, so the last one lets it begin."""
    if CONSUMER == CONSUMERS - 1:
        pass_turn(CONSUMER, CONSUMERS)


@gluon.jit
def await_turn(CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Wait until the consumer before has passed the turn on."""
    _tell("sync", CONSUMER, CONSUMERS)


@gluon.jit
def pass_turn(CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Let the consumer after this one take its turn."""
    _tell("arrive", (CONSUMER + 1) % CONSUMERS, CONSUMERS)


@gluon.jit
def end_turns(CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """After the last turn: take the one that was passed on for nothing."""
    if CONSUMER == 0:
        await_turn(CONSUMER, CONSUMERS)
