"""Tiles in shared memory that a producer fills and consumers empty in turn: slots, their barriers, and whose turn it is.

Both sides count the tiles from the kernel's start; tile `step` lies in slot step % STAGES, and each barrier of the slot has completed
step // STAGES phases before.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from weft_attn.kernels.hopper.barriers import WarpBarriers, make_warp_barriers
from weft_attn.kernels.hopper.compat import aggregate, load_box


@aggregate
class Slots:
    """`STAGES` slots in turn.

    Attributes:
        full: a barrier for each slot, complete when it is filled.
        empty: likewise, when every consumer has released it.
        FILLED_BY_WARPS, RELEASED_BY_WARPS: at `full`, at `empty`, each warp arrives by itself (barriers.py).
    """

    full: gl.shared_memory_descriptor | WarpBarriers
    empty: gl.shared_memory_descriptor | WarpBarriers
    STAGES: gl.constexpr
    FILLED_BY_WARPS: gl.constexpr
    RELEASED_BY_WARPS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, full, empty, STAGES, FILLED_BY_WARPS, RELEASED_BY_WARPS):
        self.full = full
        self.empty = empty
        self.STAGES = gl.constexpr(STAGES)
        self.FILLED_BY_WARPS = gl.constexpr(FILLED_BY_WARPS)
        self.RELEASED_BY_WARPS = gl.constexpr(RELEASED_BY_WARPS)

    @gluon.jit
    def acquire(self, step, N_BYTES: gl.constexpr):
        """Producer: wait until the slot is free, and announce how many bytes will come; the slot, and the barrier that counts them."""
        gl.static_assert(not self.FILLED_BY_WARPS, "an announcement is one arrival")
        slot = self.wait_empty(step)
        full = self.full.index(slot)
        mbarrier.expect(full, N_BYTES)
        return slot, full

    @gluon.jit
    def wait_empty(self, step):
        """Producer: the slot, once it is free."""
        slot = step % self.STAGES
        mbarrier.wait(self.empty.index(slot), ((step // self.STAGES) & 1) ^ 1)
        return slot

    @gluon.jit
    def fill(self, step):
        """Producer that is a warp group: the slot is filled."""
        if self.FILLED_BY_WARPS:
            self.full.arrive(step % self.STAGES)
        else:
            mbarrier.arrive(self.full.index(step % self.STAGES), count=1)

    @gluon.jit
    def wait(self, step):
        """Consumer: the slot, once it is filled."""
        slot = step % self.STAGES
        mbarrier.wait(self.full.index(slot), (step // self.STAGES) & 1)
        return slot

    @gluon.jit
    def release(self, step):
        """Consumer: done with the slot."""
        if self.RELEASED_BY_WARPS:
            self.empty.arrive(step % self.STAGES)
        else:
            mbarrier.arrive(self.empty.index(step % self.STAGES), count=1)


@aggregate
class Ring:
    """Slots that hold one tile each: tiles (STAGES, rows, columns)."""

    tiles: gl.shared_memory_descriptor
    slots: Slots

    @gluon.constexpr_function
    def __init__(self, tiles, slots):
        self.tiles = tiles
        self.slots = slots

    @gluon.jit
    def load(self, step, desc, row, column):
        """Producer: ask for the box at (row, column), once its slot is free."""
        slot, full = self.slots.acquire(step, desc.block_type.nbytes)
        load_box(desc, [row, column], full, self.tiles.index(slot))

    @gluon.jit
    def put(self, step, tile, zero):
        """Producer that is a warp group: write a tile for the products of others, and its own, once its slot is free.

        `zero` is 0: the compiler must not know that the slot is always the same (backward_dkdv.py).
        """
        self.tiles.index(self.slots.wait_empty(step) + zero).store(tile)
        fence_async_shared()
        self.slots.fill(step)

    @gluon.jit
    def wait(self, step):
        """Consumer: the tile, once it is there."""
        return self.tiles.index(self.slots.wait(step))

    @gluon.jit
    def release(self, step):
        """Consumer: done with the tile."""
        self.slots.release(step)


@gluon.jit
def make_slots(
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, FILLERS: gl.constexpr = 1,
    FILLED_BY_WARPS: gl.constexpr = False, RELEASED_BY_WARPS: gl.constexpr = False,
):  # fmt: skip
    """Slots that `CONSUMERS` partitions read. One is filled once `FILLERS` have arrived, of which `acquire`'s announcement is one, and what it
    announced has come. Where each warp arrives by itself, consumers or fillers are warp groups, and nothing is announced to such fillers.
    """
    full = _make_barriers(STAGES, FILLERS, FILLED_BY_WARPS)
    empty = _make_barriers(STAGES, CONSUMERS, RELEASED_BY_WARPS)
    return Slots(full, empty, STAGES, FILLED_BY_WARPS, RELEASED_BY_WARPS)


@gluon.jit
def _make_barriers(BARRIERS: gl.constexpr, ARRIVALS: gl.constexpr, BY_WARPS: gl.constexpr):
    if BY_WARPS:
        barriers = make_warp_barriers(BARRIERS, ARRIVALS)
    else:
        barriers = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
        for number in gl.static_range(BARRIERS):
            mbarrier.init(barriers.index(number), count=ARRIVALS)
    return barriers


@gluon.jit
def make_tiles(desc, STAGES: gl.constexpr):
    """Room for `STAGES` of `desc`'s boxes."""
    return gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_type.shape, desc.layout)


@gluon.jit
def make_ring(desc, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """A ring of `desc`'s boxes that `CONSUMERS` partitions read."""
    return Ring(make_tiles(desc, STAGES), make_slots(STAGES, CONSUMERS))
