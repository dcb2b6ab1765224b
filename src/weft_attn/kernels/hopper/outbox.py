"""dQ on its way out of a program: boxes of 64 queries and 64 columns that the copy engine adds to dq_sum (Hq, Tq, D) float32.

A warp group writes a box into one of a few places in turn. Where programs add in whatever order they come, it sends the box itself; where they
add in turn, it hands the box to a warp that waits for its turn (add_in_turn.py), so that nobody else does.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from weft_attn.kernels.hopper.channel import Slots, make_slots, make_tiles
from weft_attn.kernels.hopper.compat import add_box, aggregate
from weft_attn.kernels.hopper.tiles import ROWS
from weft_attn.kernels.triton.finish_dq import exchange_pairs

BOX_COLUMNS = gl.constexpr(64)


def boxes_of(dq_sum: torch.Tensor) -> TensorDescriptor:
    """The boxes of a contiguous (heads, tokens, dim) float32 tensor, read as (heads * tokens, dim)."""
    heads, tokens, dim = dq_sum.shape
    box = [ROWS.value, BOX_COLUMNS.value]
    return TensorDescriptor(dq_sum, [heads * tokens, dim], [dim, 1], box, gl.NVMMASharedLayout.get_default_for(box, gl.float32))


@aggregate
class Outbox:
    """The boxes of one warp group.

    Attributes:
        dq_sum_desc: `boxes_of` dq_sum.
        boxes: (PLACES, ROWS, BOX_COLUMNS) float32.
        slots: where programs add in turn: full once a box is there, empty once it has left.
    """

    dq_sum_desc: tma.tensor_descriptor
    boxes: gl.shared_memory_descriptor
    slots: Slots
    PLACES: gl.constexpr
    IN_TURN: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, dq_sum_desc, boxes, slots, PLACES, IN_TURN):
        self.dq_sum_desc, self.boxes, self.slots = dq_sum_desc, boxes, slots
        self.PLACES = gl.constexpr(PLACES)
        self.IN_TURN = gl.constexpr(IN_TURN)

    @gluon.jit
    def send(self, number, dq, row, column):
        """Send the `number`-th box from the kernel's start, or at least of its remainder by PLACES, to be added at (row, column).

        A row is never below zero: a load would fill such rows with zeros, an addition is an illegal instruction.
        """
        smem = self.boxes.index(number % self.PLACES)
        # The one that lay here must have left.
        if self.IN_TURN:
            self.slots.wait_empty(number)
        else:
            tma.store_wait(pendings=self.PLACES - 1)
        smem.store(exchange_pairs(dq))
        fence_async_shared()
        if self.IN_TURN:
            self.slots.fill(number)
        else:
            add_box(self.dq_sum_desc, [row, column], smem)


@gluon.jit
def make_outbox(dq_sum_desc, unused, PLACES: gl.constexpr, IN_TURN: gl.constexpr):
    """Room for PLACES boxes. `unused`: any slots, for an outbox that needs none (docs/adr/0020)."""
    slots = unused
    if IN_TURN:
        slots = make_slots(PLACES, 1)
    return Outbox(dq_sum_desc, make_tiles(dq_sum_desc, PLACES), slots, PLACES, IN_TURN)
