"""A place in the program that waits for products stay behind: values have been made by then.

The assembler moves a wait for products that reads nothing up, past the arithmetic before it. It moves none past a barrier of the
hardware, and no barrier past what chooses it. Arithmetic behind the place may still come before it (docs/adr/0037).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from weft_attn.kernels.hopper.turns import BARRIERS

# Threads of a warp: one completes a barrier, at which nobody waits.
THREADS = gl.constexpr(32)


@gluon.constexpr_function
def _hold(consumers):
    """PTX: arrive at one of two barriers, by the values of the warp's threads, two each, which stay. They come before those of `votes.py`."""
    barrier = BARRIERS.value - 2 * consumers - 2
    return (
        "{ .reg .pred some; setp.gt.f32 some, $0, 0f3F800000; setp.gt.or.f32 some, $1, 0f3F800000, some; "
        "vote.sync.any.pred some, some, 0xffffffff; "
        f"@some barrier.arrive.aligned {barrier}, {THREADS.value}; @!some barrier.arrive.aligned {barrier + 1}, {THREADS.value}; }}"
    )


@gluon.jit
def hold(values, CONSUMERS: gl.constexpr):
    """float32 values, two a thread, as they are; what waits for products behind this does not wait before they have been made."""
    return gl.inline_asm_elementwise(_hold(CONSUMERS), "=f,=f,0,1", [values], dtype=gl.float32, is_pure=False, pack=2)
