"""Two programs on neighbouring multiprocessors, a cluster, that attend two query heads of one KV head at the same rows.

They walk the same tiles of k and v: each fetches half of every tile, and the copy engine writes it to the shared memory of both. That
halves what the multiprocessors read from the L2 cache, which takes of the power that bounds the products (docs/adr/0023).

Triton 3.6 names nothing of a cluster, and programs that each think they are alone are nearly all that is needed: this file says the
rest in PTX, with addresses in shared memory that the programs find out by themselves (addresses.py), alike in both.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from weft_attn.kernels.hopper import ptx
from weft_attn.kernels.hopper.addresses import N_WORDS, ROW_BYTES, WORD_BYTES, address_of, make_words
from weft_attn.kernels.hopper.barriers import WARPS
from weft_attn.kernels.hopper.compat import aggregate, as_words
from weft_attn.kernels.hopper.tiles import one_a_lane

PROGRAMS = gl.constexpr(2)
# Numbers on their way from the first program to the second.
LETTERS = gl.constexpr(2)
# Parameters that a tensor descriptor of two dimensions is passed as: itself, its shape, its strides.
DESCRIPTOR_PARAMETERS = 5


# ---- PTX ------------------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _one_thread(text):
    """PTX whose instructions marked `@leader` one thread of each warp runs."""
    declared = ".reg .pred leader; .reg .b16 both; .reg .b32 there, other; .reg .b64 desc;"
    return f"{{ {declared} elect.sync _|leader, 0xffffffff; {text} }}"


@gluon.constexpr_function
def descriptor_parameter(kernel, before):
    """What PTX calls the parameter that holds a kernel's descriptor after `before` others, the first of its arguments."""
    return f"{kernel}_param_{before * DESCRIPTOR_PARAMETERS}"


@gluon.constexpr_function
def _fetch_text(parameter):
    return _one_thread(
        f"mov.b64 desc, {parameter}; cvta.param.u64 desc, desc; mov.b16 both, 3; "
        "@leader cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[$3], [desc, {$1, $2}], [$4], both;"
    )


@gluon.jit
def _fetch_for_both(PARAMETER: gl.constexpr, column, row, address, barrier):
    """Ask for a box, to the same address and counted at the same barrier in both programs."""
    ptx.run(_fetch_text(PARAMETER), "rrrr", (column, row, address, barrier))


@gluon.jit
def _await(barrier, phase):
    """Each warp waits until the mbarrier at this address of its program has completed this phase; Gluon's wait lets its warp group meet before."""
    ptx.run(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2; @!done bra again; }",
        "rr",
        (barrier, phase),
    )


@gluon.jit
def _arrive_in_both(barrier):
    """Each warp arrives at the barrier at this address of both programs.

    Without the cluster's scope, which would wait for the warp's writes to global memory as well: products have read the tile, which
    the warp has waited for, and the zeros that it may have written there were handed to them before (tiles.py: `agree`).
    """
    ptx.run(
        _one_thread(
            "mapa.shared::cluster.u32 there, $1, 0; @leader mbarrier.arrive.shared::cluster.b64 _, [there]; "
            "mapa.shared::cluster.u32 other, $1, 1; @leader mbarrier.arrive.shared::cluster.b64 _, [other];"
        ),
        "r",
        (barrier,),
    )


@gluon.jit
def _arrive_in(barrier, program):
    """The warp arrives at the barrier at this address of one of the programs."""
    ptx.run(
        _one_thread("mapa.shared::cluster.u32 there, $1, $2; @leader mbarrier.arrive.shared::cluster.b64 _, [there];"),
        "rr",
        (barrier, program),
    )


@gluon.jit
def _send(word, address, barrier, program):
    """Write a word to this address of one of the programs, counted at its barrier."""
    ptx.run(
        _one_thread(
            "mapa.shared::cluster.u32 there, $2, $4; mapa.shared::cluster.u32 other, $3, $4; "
            "@leader st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], $1, [other];"
        ),
        "rrrr",
        (word, address, barrier, program),
    )


@gluon.jit
def _meet():
    """Wait for all warps of both programs."""
    ptx.run("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;", "", ())


# ---- who works on what ----------------------------------------------------------------------------------------------------


@aggregate
class Pair:
    """Deals schedule.py's list to pairs of programs: it is one of pairs of heads, of which each program attends one.

    The first program's producer takes the numbers and sends each to the second's.

    Attributes:
        counter_ptr: as `schedule.Alone` has it.
        program: 0 or 1.
        words: (N_WORDS, 1) int64: the letters, and the barriers of all that both programs use. First the letters', then the rings'.
        words_at: address of the first of them.
    """

    counter_ptr: gl.tensor
    program: gl.tensor
    words: gl.shared_memory_descriptor
    words_at: gl.tensor

    @gluon.constexpr_function
    def __init__(self, counter_ptr, program, words, words_at):
        self.counter_ptr, self.program = counter_ptr, program
        self.words, self.words_at = words, words_at

    @gluon.jit
    def programs(self):
        """How many walk the list."""
        return gl.num_programs(0) // PROGRAMS

    @gluon.jit
    def first(self):
        """The number that this program begins with."""
        return gl.program_id(0) // PROGRAMS

    @gluon.jit
    def head(self, place):
        """This program's head, of those at a place in the list."""
        return place * PROGRAMS + self.program

    @gluon.jit
    def address(self, word):
        """Of the word of this number, alike in both programs."""
        return self.words_at + word * WORD_BYTES

    @gluon.jit
    def take(self, turn):
        """Producer, once a turn: the number of the turn after this one."""
        letter = turn % LETTERS
        full = LETTERS + letter
        empty = 2 * LETTERS + letter
        phase = (turn // LETTERS) & 1
        number = 0
        if self.program == 0:
            number = self.programs() + gl.atomic_add(self.counter_ptr, 1, sem="relaxed")
            mbarrier.wait(self.words.index(empty), phase ^ 1)
            _send(number, self.address(letter), self.address(full), 1)
        else:
            mbarrier.expect(self.words.index(full), 4)
            mbarrier.wait(self.words.index(full), phase)
            number = gl.max(as_words(self.words.index(letter), 2).slice(0, 1).load(one_a_lane(1)), 0)
            # No number is negative, but the address depends on it: what was read has come only where it was used (docs/adr/0018).
            _arrive_in(self.address(empty) + (number >> 31), 0)
        return number

    @gluon.jit
    def meet(self):
        """All warps, before the first and after the last word to the other program: its barriers are made, and it is still there."""
        _meet()


@gluon.jit
def make_pair(counter_ptr):
    """After `write_addresses`."""
    words, words_at = make_words()
    for letter in gl.static_range(LETTERS):
        mbarrier.init(words.index(LETTERS + letter), count=1)
        mbarrier.init(words.index(2 * LETTERS + letter), count=1)
    return Pair(counter_ptr, gl.program_id(0) % PROGRAMS, words, words_at)


@gluon.jit
def sit_out(dealer):
    """A warp without work. Triton rounds a program's warps up to warp groups, and a cluster's barrier counts them all."""
    dealer.meet()
    dealer.meet()


# ---- tiles that both read -------------------------------------------------------------------------------------------------


@aggregate
class SharedRing:
    """As channel.py's `Ring`, of tiles that both programs read and of which each asks for half the rows.

    A slot is filled when both halves are there, and free when the consumers of both programs have released it: neither program may
    write to the other's slot before.

    Attributes:
        pair: has the barriers: STAGES of filled slots from FIRST on, then as many of free ones.
        tiles: (STAGES, rows, columns).
        tiles_at: address of the first.
        PARAMETER: PTX's name of the tensor's descriptor, of boxes of half a tile.
        MEETS: a consumer's warps meet before they wait. Two consumers are faster so, three where each warp waits by itself (docs/adr/0037).
    """

    pair: Pair
    tiles: gl.shared_memory_descriptor
    tiles_at: gl.tensor
    FIRST: gl.constexpr
    STAGES: gl.constexpr
    PARAMETER: gl.constexpr
    MEETS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, pair, tiles, tiles_at, FIRST, STAGES, PARAMETER, MEETS):
        self.pair, self.tiles, self.tiles_at = pair, tiles, tiles_at
        self.FIRST = gl.constexpr(FIRST)
        self.STAGES = gl.constexpr(STAGES)
        self.PARAMETER = gl.constexpr(PARAMETER)
        self.MEETS = gl.constexpr(MEETS)

    @gluon.jit
    def load(self, step, desc, row, column):
        """Producer: ask for this program's half of the tile at (row, column), once the slot is free in both."""
        HALF: gl.constexpr = desc.block_type.shape[0]
        HALF_BYTES: gl.constexpr = desc.block_type.nbytes
        COLUMNS: gl.constexpr = ROW_BYTES * 8 // desc.dtype.primitive_bitwidth
        program = self.pair.program
        slot = step % self.STAGES
        full = self.FIRST + slot
        mbarrier.wait(self.pair.words.index(full + self.STAGES), ((step // self.STAGES) & 1) ^ 1)
        mbarrier.expect(self.pair.words.index(full), PROGRAMS * HALF_BYTES)
        # A tile lies in shared memory as boxes of all its rows, side by side.
        half_at = self.tiles_at + slot * (PROGRAMS * HALF_BYTES) + program * (HALF * ROW_BYTES)
        for box in gl.static_range(desc.block_type.shape[1] // COLUMNS):
            _fetch_for_both(
                self.PARAMETER,
                column + box * COLUMNS,
                row + program * HALF,
                half_at + box * (PROGRAMS * HALF * ROW_BYTES),
                self.pair.address(full),
            )

    @gluon.jit
    def wait(self, step):
        """Consumer: the tile, once both halves are there."""
        slot = step % self.STAGES
        if self.MEETS:
            mbarrier.wait(self.pair.words.index(self.FIRST + slot), (step // self.STAGES) & 1)
        else:
            _await(self.pair.address(self.FIRST + slot), (step // self.STAGES) & 1)
        return self.tiles.index(slot)

    @gluon.jit
    def release(self, step):
        """Consumer: done with the tile."""
        _arrive_in_both(self.pair.address(self.FIRST + self.STAGES + step % self.STAGES))


@gluon.jit
def make_shared_ring(desc, pair, PARAMETER: gl.constexpr, FIRST: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """A ring of tiles of two of `desc`'s boxes, one below the other, that `CONSUMERS` partitions of each program read.

    Args:
        PARAMETER: `descriptor_parameter` of `desc`.
        FIRST: words of the pair that others use: `words_before(STAGES of the rings before)`.
    """
    ROWS: gl.constexpr = PROGRAMS * desc.block_type.shape[0]
    COLUMNS: gl.constexpr = desc.block_type.shape[1]
    gl.static_assert(FIRST + 2 * STAGES <= N_WORDS, "a pair has words for the barriers")
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], desc.dtype)
    gl.static_assert(SHARED.swizzle_byte_width == ROW_BYTES, "a tile lies as boxes of rows of 128 bytes")
    tiles = gl.allocate_shared_memory(desc.dtype, [STAGES, ROWS, COLUMNS], SHARED)
    tiles_at = address_of(tiles.index(0))
    for slot in gl.static_range(STAGES):
        mbarrier.init(pair.words.index(FIRST + slot), count=1)
        mbarrier.init(pair.words.index(FIRST + STAGES + slot), count=PROGRAMS * WARPS * CONSUMERS)
    return SharedRing(pair, tiles, tiles_at, FIRST, STAGES, PARAMETER, CONSUMERS < 3)


@gluon.constexpr_function
def words_before(stages):
    """Words of a pair that its letters and rings with so many stages take."""
    return 3 * LETTERS.value + 2 * stages
