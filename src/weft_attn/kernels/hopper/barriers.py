"""Barriers at which each warp arrives by itself.

Gluon's arrival is one thread's for its whole warp group, between two of the hardware's barriers: all four warps wait for the slowest, twice.
Here a warp that is done says so and goes on (docs/adr/0035).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from weft_attn.kernels.hopper import ptx
from weft_attn.kernels.hopper.addresses import N_WORDS, WORD_BYTES, make_words
from weft_attn.kernels.hopper.compat import aggregate

# Of a warp group.
WARPS = gl.constexpr(4)


@aggregate
class WarpBarriers:
    """Barriers that warp groups arrive at, each warp by itself.

    Attributes:
        words: (N_WORDS, 1) int64: the barriers and, behind them, nothing.
        words_at: address of the first.
    """

    words: gl.shared_memory_descriptor
    words_at: gl.tensor

    @gluon.constexpr_function
    def __init__(self, words, words_at):
        self.words, self.words_at = words, words_at

    @gluon.jit
    def index(self, number):
        """A barrier, to wait for."""
        return self.words.index(number)

    @gluon.jit
    def arrive(self, number):
        """The warp arrives: what its threads have read and written before, others may rely on once the barrier completes."""
        ptx.run(
            "{ .reg .pred leader; bar.warp.sync 0xffffffff; elect.sync _|leader, 0xffffffff; "
            "@leader mbarrier.arrive.shared::cta.b64 _, [$1]; }",
            "r",
            (self.words_at + number * WORD_BYTES,),
        )


@gluon.jit
def make_warp_barriers(BARRIERS: gl.constexpr, WARP_GROUPS: gl.constexpr):
    """So many barriers, each complete when so many warp groups have arrived; after `addresses.write_addresses`."""
    gl.static_assert(BARRIERS <= N_WORDS, "the barriers fit their buffer")
    words, words_at = make_words()
    for number in gl.static_range(BARRIERS):
        mbarrier.init(words.index(number), count=WARP_GROUPS * WARPS)
    return WarpBarriers(words, words_at)
