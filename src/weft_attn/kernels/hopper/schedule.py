"""Which item and head a program of a persistent grid works on next: the next in the list, taken by whoever is free first.

The list is in the order of `kernels/triton/tiles.py: program_item_and_head`. A program begins with its own number in it and then
takes numbers from a counter in global memory; only the producer asks, a turn ahead, and tells the other warps. The last program
to finish sets the counter back to zero for the next launch. Who works on what changes no result.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from weft_attn.kernels.hopper.compat import aggregate

# Numbers on their way to the consumers.
SLOTS = gl.constexpr(2)
# int32 of the counter: numbers taken, programs done.
COUNTER_SIZE = 2


@aggregate
class Schedule:
    """The way from the counter through the producer to the consumers.

    Attributes:
        counter_ptr: COUNTER_SIZE int32, zero between launches.
        numbers: (SLOTS, 1) int32.
        full, empty: (SLOTS, 1) barriers.
    """

    counter_ptr: gl.tensor
    n_items: gl.tensor
    n_heads: gl.tensor
    heads_per_wave: gl.tensor
    numbers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, counter_ptr, n_items, n_heads, heads_per_wave, numbers, full, empty):
        self.counter_ptr = counter_ptr
        self.n_items, self.n_heads, self.heads_per_wave = n_items, n_heads, heads_per_wave
        self.numbers, self.full, self.empty = numbers, full, empty

    @gluon.jit
    def exists(self, number):
        return number < self.n_items * self.n_heads

    @gluon.jit
    def item_and_head(self, number):
        """What a number stands for: waves of heads that fit the L2 cache, longest items first, an item's heads together."""
        wave = number // (self.n_items * self.heads_per_wave)
        first_head = wave * self.heads_per_wave
        heads = gl.minimum(self.heads_per_wave, self.n_heads - first_head)
        within = number - wave * self.n_items * self.heads_per_wave
        return within // heads, first_head + within % heads

    @gluon.jit
    def take(self, turn):
        """Producer: take the number of turn + 1 and tell the consumers."""
        number = gl.num_programs(0) + gl.atomic_add(self.counter_ptr, 1)
        slot = turn % SLOTS
        mbarrier.wait(self.empty.index(slot), ((turn // SLOTS) & 1) ^ 1)
        one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        self.numbers.index(slot).store(gl.full([1], 0, gl.int32, one) + number)
        mbarrier.arrive(self.full.index(slot), count=1)
        return number

    @gluon.jit
    def hear(self, turn):
        """Consumer: the number of turn + 1."""
        slot = turn % SLOTS
        mbarrier.wait(self.full.index(slot), (turn // SLOTS) & 1)
        one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        number = gl.max(self.numbers.index(slot).load(one), 0)
        mbarrier.arrive(self.empty.index(slot), count=1)
        return number

    @gluon.jit
    def finish(self):
        """Producer: nobody will take a number after the last program is here."""
        done = gl.atomic_add(self.counter_ptr + 1, 1)
        if done == gl.num_programs(0) - 1:
            gl.store(self.counter_ptr, 0)
            gl.store(self.counter_ptr + 1, 0)


@gluon.jit
def make_schedule(counter_ptr, n_items, n_heads, heads_per_wave, CONSUMERS: gl.constexpr):
    numbers = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    return Schedule(counter_ptr, n_items, n_heads, heads_per_wave, numbers, full, empty)
