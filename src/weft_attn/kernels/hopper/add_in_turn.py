"""Adding to dQ in turn, which makes its sums repeatable to the bit: the role of a warp of its own for each box of a query tile's columns.

Every box of a head has a word in memory that says which item added to it last, and the plan tells each run of tiles whom it comes
after (`Stream.afters`). An adder takes what a consumer has put into its outbox, waits until the one before is there, adds, and
leaves its own number once the sums have arrived. The consumer waits for none of that. Items come after items in front of them in the
list, and a program takes items from the list one by one: there is always one that waits for nobody.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from weft_attn.kernels.hopper import ptx
from weft_attn.kernels.hopper.compat import add_box, aggregate
from weft_attn.kernels.hopper.outbox import BOX_COLUMNS
from weft_attn.kernels.triton.visibility import edges_of_part, first_tile_of_walk, interior_of_part, next_tile_of_walk


def turns_shape(heads: int, total_q: int, head_dim: int) -> tuple[int, int]:
    """(adders, Hq * Tq): room for `Turns.turns_ptr`."""
    return head_dim // BOX_COLUMNS.value, heads * total_q


@gluon.constexpr_function
def _wait_text():
    """PTX: read the word until it is the one that is waited for; nothing is added before."""
    return (
        "{ .reg .pred come; .reg .b32 seen; "
        "LOOK${:uid}: ld.acquire.gpu.global.b32 seen, [$1]; setp.eq.s32 come, seen, $2; "
        "vote.sync.all.pred come, come, 0xffffffff; @!come bra.uni LOOK${:uid}; fence.proxy.async.global; }"
    )


@gluon.constexpr_function
def _leave_text():
    """PTX: wait until what was added has arrived, then write the word.

    The copy engine's completion is a promise to the thread that asked for it. To make it one to all who read the word takes both fences, that
    between the copy engine and the rest and the release; without them sums of distant programs came in another order now and then.
    """
    return "cp.async.bulk.wait_group 0; fence.proxy.async.global; bar.warp.sync 0xffffffff; st.release.gpu.global.b32 [$1], $2;"


@aggregate
class Turns:
    """Whose turn it is to add.

    Attributes:
        turns_ptr: (adders, Hq * Tq) int32, zero before: of the tile of a head that begins at a row, the item whose adder added last,
            as its first key + 1.
        afters_ptr: (runs,) int32, the stream's afters: whom a run's tiles come after, likewise; 0: nobody.
        rows: Hq * Tq.
    """

    turns_ptr: gl.tensor
    afters_ptr: gl.tensor
    rows: gl.tensor

    @gluon.constexpr_function
    def __init__(self, turns_ptr, afters_ptr, rows):
        self.turns_ptr, self.afters_ptr, self.rows = turns_ptr, afters_ptr, rows

    @gluon.jit
    def word(self, row, ADDER: gl.constexpr):
        return self.turns_ptr + ADDER * self.rows + row


@gluon.jit
def _add_tiles(p, outbox, turns, step, run, n_tiles, direction, first_head, first_key, ADDER: gl.constexpr):
    """Add the boxes of so many tiles, each of all heads of the group; the step after them."""
    col, left = first_tile_of_walk(p.runs_ptr, run, direction, p.BLOCK_Q)
    for _ in range(n_tiles):
        after = gl.load(turns.afters_ptr + run)
        for member in range(p.GROUP):
            row = (first_head + member) * p.stride_stats_h + col
            place = outbox.slots.wait(step)
            word = turns.word(row, ADDER)
            ptx.run(_wait_text(), "lr", (word, after))
            add_box(outbox.dq_sum_desc, [row, ADDER * BOX_COLUMNS], outbox.boxes.index(place))
            tma.store_wait(pendings=0)
            outbox.slots.release(step)
            ptx.run(_leave_text(), "lr", (word, first_key + 1))
            step += 1
        run, col, left = next_tile_of_walk(p.runs_ptr, run, col, left, direction, p.BLOCK_Q)
    return step


@gluon.jit
def add_in_turn(p, memory, outbox, turns, ADDER: gl.constexpr):
    """The adder of the ADDER-th boxes, which come through `outbox`."""
    schedule = memory.schedule
    step = 0
    turn = 0
    schedule.hear(turn)
    number = schedule.number(turn)
    while schedule.exists(number):
        first_head = schedule.head(turn) * p.GROUP
        direction = schedule.direction(turn)
        first_key, _, edge_run, edge_tiles, interior_run, interior_tiles = schedule.item(turn, 0)
        late = schedule.late_edges(turn)
        for part in range(2):
            run, tiles = edges_of_part(part, direction, edge_run, edge_tiles, late)
            step = _add_tiles(p, outbox, turns, step, run, tiles, direction, first_head, first_key, ADDER)
            interior = interior_of_part(part, interior_tiles)
            step = _add_tiles(p, outbox, turns, step, interior_run, interior, direction, first_head, first_key, ADDER)
        schedule.heard(turn)
        turn += 1
        schedule.hear(turn)
        number = schedule.number(turn)
