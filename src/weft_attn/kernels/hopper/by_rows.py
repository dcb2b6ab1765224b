"""What the Hopper kernels that walk the plan by rows, forward and dQ, share: programs that work alone or in pairs, and their warps' roles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from weft_attn.kernels.hopper.addresses import write_addresses
from weft_attn.kernels.hopper.channel import make_ring
from weft_attn.kernels.hopper.compat import builtin, value_of
from weft_attn.kernels.hopper.pair import (
    descriptor_parameter,
    make_pair,
    make_shared_ring,
    sit_out,
    words_before,
)
from weft_attn.kernels.hopper.schedule import PRODUCER_REGISTERS, Alone


@gluon.jit
def make_dealer(counter_ptr, IN_PAIRS: gl.constexpr):
    """The kernel's first call."""
    if IN_PAIRS:
        write_addresses()
        dealer = make_pair(counter_ptr)
    else:
        dealer = Alone(counter_ptr)
    return dealer


@gluon.jit
def make_key_rings(
    k_desc, v_desc, dealer, KERNEL: gl.constexpr, DESCRIPTORS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, IN_PAIRS: gl.constexpr,
):  # fmt: skip
    """Rings of k and v; in pairs their boxes are halves of the tiles.

    Args:
        KERNEL: its name.
        DESCRIPTORS: the kernel's arguments before k_desc, all of them descriptors; v_desc is the one after it.
    """
    if IN_PAIRS:
        k = make_shared_ring(k_desc, dealer, descriptor_parameter(KERNEL, DESCRIPTORS), words_before(0), K_STAGES, CONSUMERS)
        v = make_shared_ring(
            v_desc, dealer, descriptor_parameter(KERNEL, DESCRIPTORS + 1), words_before(K_STAGES), V_STAGES, CONSUMERS
        )
    else:
        k = make_ring(k_desc, K_STAGES, CONSUMERS)
        v = make_ring(v_desc, V_STAGES, CONSUMERS)
    return k, v


@builtin
def start(produce, consume, p, memory, CONSUMERS, CONSUMER_REGISTERS, IN_PAIRS, _semantic=None, _generator=None):
    """One warp produces, two or three warp groups consume, the first of them in the launch's own warps.

    In pairs, the three warps that Triton would add beside the producer to fill a warp group sit out.
    """
    consumers, registers = value_of(CONSUMERS), value_of(CONSUMER_REGISTERS)
    idle = [1, 2] if value_of(IN_PAIRS) else []
    roles = [
        *((consume, (p, memory, gl.constexpr(consumer))) for consumer in range(consumers)),
        (produce, (p, memory)),
        *((sit_out, (memory.schedule.dealer,)) for _ in idle),
    ]
    warps = [4] * (consumers - 1) + [1, *idle]
    kept = [registers] * (consumers - 1) + [PRODUCER_REGISTERS.value] * (1 + len(idle))
    functions = [(value_of(function), arguments) for function, arguments in roles]
    gl.warp_specialize(functions, warps, kept, _semantic=_semantic, _generator=_generator)
