"""Which item and head a program of a persistent grid works on next: the next in the list, taken by whoever is free first.

The list is that of `kernels/triton/tiles.py: place_in_list`. A program begins with its own number in it (one by one: with the next) and then
takes numbers from a counter in global memory; only the producer asks, ahead of the turn, and tells the other warps, with the rows of
the tables that they begin with. It asks without any order among other accesses to memory (`relaxed`): nothing is read because of a number but
tables that nobody writes, and a fence would make it wait for all that its program has written, and forget what it has read. The last program to
finish, which does ask in order, sets the counter back to zero for the next launch. Who works on what changes no result.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from weft_attn.errors import require
from weft_attn.kernels.hopper.compat import aggregate
from weft_attn.kernels.hopper.pair import Pair
from weft_attn.kernels.hopper.tiles import ROWS, one_a_lane
from weft_attn.kernels.triton import layout
from weft_attn.kernels.triton.tiles import direction_of_walk, place_in_list
from weft_attn.kernels.triton.visibility import edges_of_part

# Turns on their way to the consumers: one that they work on, which they hold to its end, the next, the one that is told, and one more,
# so that the producer waits for nobody's end.
SLOTS = gl.constexpr(4)
# Tiles of an item that is over soon.
SHORT = gl.constexpr(8)
# Rows that a turn is told in, a power of two, each as wide as a row of a table: the number; head and direction; the item's; its first edge
# run's. A walk by keys has two parts (`edges_of_part`): the first edge run of each, and the first interior run.
RECORD_ROWS = gl.constexpr(8)
NUMBER, HEAD, ITEM, EDGES, EDGES_OF_NEXT_PART, INTERIOR = (gl.constexpr(row) for row in range(6))
# Registers a thread that are left to the producer, as launch/config.py has it.
PRODUCER_REGISTERS = gl.constexpr(24)
# int32 of the counter: numbers taken, programs done.
COUNTER_SIZE = 2


def grid_of(multiprocessors: int, n_items: int, heads: int, group: int = 1, cluster: int = 1) -> tuple[int, ...]:
    """Programs, or clusters of programs, of a persistent grid over the items of so many heads, `group` of each KV head."""
    require(
        group % cluster == 0,
        "programs of a cluster share a KV head",
        expected=f"groups of a multiple of {cluster}",
        given=group,
    )
    return (min(max(1, multiprocessors // cluster), n_items * heads // cluster),)


@aggregate
class Alone:
    """Deals the list to programs that each work alone.

    Attributes:
        counter_ptr: COUNTER_SIZE int32, zero between launches.
        ONE_BY_ONE: a program takes its first number from the counter too. Whoever has a number then runs, and so does whoever has one
            before it, even where the grid's programs do not all run at a time.
    """

    counter_ptr: gl.tensor
    ONE_BY_ONE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, counter_ptr, ONE_BY_ONE=False):
        self.counter_ptr = counter_ptr
        self.ONE_BY_ONE = gl.constexpr(ONE_BY_ONE)

    @gluon.jit
    def programs(self):
        """How many walk the list."""
        return gl.num_programs(0)

    @gluon.jit
    def first(self):
        """The number that this program begins with."""
        if self.ONE_BY_ONE:
            return gl.atomic_add(self.counter_ptr, 1, sem="relaxed")
        return gl.program_id(0)

    @gluon.jit
    def head(self, place):
        """The head at a place in the list."""
        return place

    @gluon.jit
    def take(self, _turn):
        """Producer, once a turn: the number of the turn after this one."""
        if self.ONE_BY_ONE:
            return gl.atomic_add(self.counter_ptr, 1, sem="relaxed")
        return gl.num_programs(0) + gl.atomic_add(self.counter_ptr, 1, sem="relaxed")

    @gluon.jit
    def meet(self):
        """Nobody."""


@aggregate
class Schedule:
    """The way from the counter through the producer to the consumers.

    Attributes:
        dealer: who takes numbers from the counter: a program, or a pair of them.
        n_heads, heads_per_wave, last_heads: of a dealer's places: heads, or pairs of them.
        records: (SLOTS * RECORD_ROWS, layout.ITEM_WIDTH) int32.
        full, empty: (SLOTS, 1) barriers.
        PRODUCER_WARPS: of the producer; a consumer has four.
    """

    dealer: Alone | Pair
    n_items: gl.tensor
    n_heads: gl.tensor
    heads_per_wave: gl.tensor
    last_heads: gl.tensor
    records: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    PRODUCER_WARPS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, dealer, n_items, n_heads, heads_per_wave, last_heads, records, full, empty, PRODUCER_WARPS):
        self.dealer = dealer
        self.n_items, self.n_heads, self.heads_per_wave, self.last_heads = n_items, n_heads, heads_per_wave, last_heads
        self.records, self.full, self.empty = records, full, empty
        self.PRODUCER_WARPS = gl.constexpr(PRODUCER_WARPS)

    @gluon.jit
    def exists(self, number):
        return number < self.n_items * self.n_heads

    @gluon.jit
    def locate(self, number):
        """What a number stands for: item, head, wave and round (`place_in_list`)."""
        item, place, wave, round_number = place_in_list(
            number, self.n_items, self.n_heads, self.heads_per_wave, self.last_heads, self.dealer.programs()
        )
        return item, self.dealer.head(place), wave, round_number

    @gluon.jit
    def direction_of(self, number, items_ptr):
        """Producer: which way the number's program walks (`direction_of_walk`), in a backward by keys."""
        item, _, wave, round_number = self.locate(number)
        return direction_of_walk(gl.load(items_ptr + item * layout.ITEM_WIDTH + layout.ITEM_WALK), wave, round_number)

    @gluon.jit
    def is_short(self, n_tiles):
        """Producer, where steps are quick: whether an item's successor is to be taken when it begins, so that nobody waits for the counter.

        That of a long one is taken when its last tiles are on their way: a program that holds two long items keeps one from
        another that is free.
        """
        return n_tiles <= SHORT

    @gluon.jit
    def tell(self, turn, number, items_ptr, runs_ptr, BY_KEYS: gl.constexpr):
        """Producer: tell the consumers what `turn` works on, with the rows of tables that they would wait for (RECORD_ROWS)."""
        slot = turn % SLOTS
        mbarrier.wait(self.empty.index(slot), ((turn // SLOTS) & 1) ^ 1)
        record = slot * RECORD_ROWS
        fields = gl.arange(0, layout.ITEM_WIDTH, one_a_lane(self.PRODUCER_WARPS))
        self.records.index(record + NUMBER).store(gl.zeros_like(fields) + number)
        if self.exists(number):
            item, head, _, _ = self.locate(number)
            item_ptr = items_ptr + item * layout.ITEM_WIDTH
            item_row = gl.load(item_ptr + fields)
            edge_run = gl.load(item_ptr + layout.ITEM_EDGE_RUN)
            # All rows are asked for before the first is written: they come together.
            if BY_KEYS:
                direction = self.direction_of(number, items_ptr)
                late = gl.load(item_ptr + layout.ITEM_LATE_EDGES)
                interior_run = gl.load(item_ptr + layout.ITEM_INTERIOR_RUN)
                first_run, _ = edges_of_part(0, direction, edge_run, 0, late)
                next_run, _ = edges_of_part(1, direction, edge_run, 0, late)
                edges_row = gl.load(runs_ptr + first_run * layout.RUN_WIDTH + fields)
                next_row = gl.load(runs_ptr + next_run * layout.RUN_WIDTH + fields)
                interior_row = gl.load(runs_ptr + interior_run * layout.RUN_WIDTH + fields)
                self.records.index(record + HEAD).store(gl.where(fields == 0, head, direction))
                self.records.index(record + ITEM).store(item_row)
                self.records.index(record + EDGES).store(edges_row)
                self.records.index(record + EDGES_OF_NEXT_PART).store(next_row)
                self.records.index(record + INTERIOR).store(interior_row)
            else:
                edges_row = gl.load(runs_ptr + edge_run * layout.RUN_WIDTH + fields)
                self.records.index(record + HEAD).store(gl.zeros_like(fields) + head)
                self.records.index(record + ITEM).store(item_row)
                self.records.index(record + EDGES).store(edges_row)
        mbarrier.arrive(self.full.index(slot), count=1)

    @gluon.jit
    def hear(self, turn):
        """Consumer: wait for what the producer tells of `turn`, which the methods from here to `heard` read."""
        mbarrier.wait(self.full.index(turn % SLOTS), (turn // SLOTS) & 1)

    @gluon.jit
    def number(self, turn):
        return self._read(turn, NUMBER, 0)

    @gluon.jit
    def head(self, turn):
        return self._read(turn, HEAD, 0)

    @gluon.jit
    def direction(self, turn):
        """Which way a backward by keys walks the item."""
        return self._read(turn, HEAD, 1)

    @gluon.jit
    def item(self, turn, CONSUMER: gl.constexpr):
        """A consumer's rows of the item, and its streams: edge and interior, first run and how many tiles."""
        first_row = self._read(turn, ITEM, layout.ITEM_ROW) + CONSUMER * ROWS
        n_rows = self._read(turn, ITEM, layout.ITEM_N_ROWS) - CONSUMER * ROWS
        edge_run = self._read(turn, ITEM, layout.ITEM_EDGE_RUN)
        edge_tiles = self._read(turn, ITEM, layout.ITEM_EDGE_TILES)
        interior_run = self._read(turn, ITEM, layout.ITEM_INTERIOR_RUN)
        interior_tiles = self._read(turn, ITEM, layout.ITEM_INTERIOR_TILES)
        return first_row, n_rows, edge_run, edge_tiles, interior_run, interior_tiles

    @gluon.jit
    def late_edges(self, turn):
        """Of an item by keys: layout.LATE_TILES."""
        return self._read(turn, ITEM, layout.ITEM_LATE_EDGES)

    @gluon.jit
    def run(self, turn, row):
        """A told run: its first column and how many tiles it has, as `first_tile` does; `row` EDGES, by keys plus the part, or INTERIOR."""
        return self._read(turn, row, layout.RUN_COL), self._read(turn, row, layout.RUN_N_TILES)

    @gluon.jit
    def slice_of_run(self, turn, row):
        """The slice of a told edge run, as `interval_in_slice` takes it."""
        row_start = self._read(turn, row, layout.RUN_ROW_START)
        row_len = self._read(turn, row, layout.RUN_ROW_LEN)
        col_start = self._read(turn, row, layout.RUN_COL_START)
        col_len = self._read(turn, row, layout.RUN_COL_LEN)
        return (
            row_start,
            row_len,
            col_start,
            col_len,
            self._read(turn, row, layout.RUN_LO),
            self._read(turn, row, layout.RUN_HI),
        )

    @gluon.jit
    def _read(self, turn, row, FIELD: gl.constexpr):
        return gl.max(self.records.index(turn % SLOTS * RECORD_ROWS + row).slice(FIELD, 1).load(one_a_lane(gl.num_warps())), 0)

    @gluon.jit
    def heard(self, turn):
        """Consumer: done with `turn`. At its end: what was read has come only where it was used (docs/adr/0018)."""
        mbarrier.arrive(self.empty.index(turn % SLOTS), count=1)

    @gluon.jit
    def finish(self):
        """Producer: nobody will take a number after the last program is here."""
        counter_ptr = self.dealer.counter_ptr
        done = gl.atomic_add(counter_ptr + 1, 1)
        if done == gl.num_programs(0) - 1:
            gl.store(counter_ptr, 0)
            gl.store(counter_ptr + 1, 0)


@gluon.jit
def load_item(items_ptr, item):
    """Producer: an item's first row and its streams."""
    item_ptr = items_ptr + item * layout.ITEM_WIDTH
    row = gl.load(item_ptr + layout.ITEM_ROW)
    edge_run = gl.load(item_ptr + layout.ITEM_EDGE_RUN)
    edge_tiles = gl.load(item_ptr + layout.ITEM_EDGE_TILES)
    interior_run = gl.load(item_ptr + layout.ITEM_INTERIOR_RUN)
    interior_tiles = gl.load(item_ptr + layout.ITEM_INTERIOR_TILES)
    return row, edge_run, edge_tiles, interior_run, interior_tiles


@gluon.jit
def make_schedule(dealer, n_items, n_heads, heads_per_wave, last_heads, CONSUMERS: gl.constexpr, PRODUCER_WARPS: gl.constexpr):
    """A schedule that `CONSUMERS` partitions hear. The last wave has `last_heads` heads or more; 0: those that are left."""
    records = gl.allocate_shared_memory(
        gl.int32, [SLOTS * RECORD_ROWS, layout.ITEM_WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    return Schedule(dealer, n_items, n_heads, heads_per_wave, last_heads, records, full, empty, PRODUCER_WARPS)
