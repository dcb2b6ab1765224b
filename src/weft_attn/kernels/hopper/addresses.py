"""Addresses in shared memory, which PTX wants where Gluon names an operation's operand only to itself.

Triton places the buffers and tells nobody where. So a program writes addresses all over its shared memory before it is anything else, and reads
one where a buffer is.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from weft_attn.kernels.hopper import ptx
from weft_attn.kernels.hopper.compat import as_barriers, as_words, synchronize
from weft_attn.kernels.hopper.tiles import one_a_lane

# Bytes of a tile's row that lie together (the widest swizzle), as the copy engine writes a box of so many columns of a row.
ROW_BYTES = gl.constexpr(128)
# Buffers whose addresses matter begin at multiples of so many bytes: eight such rows.
ALIGNMENT = gl.constexpr(1024)
# More than a program's shared memory.
MOST_BYTES = gl.constexpr(256 * 1024)
# Barriers and numbers whose addresses matter, an int64 each, as many as a buffer holds.
WORD_BYTES = gl.constexpr(8)
N_WORDS = gl.constexpr(ALIGNMENT.value // WORD_BYTES.value)


@gluon.jit
def write_addresses():
    """Before anything else: the first word of every ALIGNMENT bytes of the program's shared memory becomes its own address.

    What a swizzle of 128 bytes lies in begins at a multiple of ALIGNMENT, and `address_of` reads there.
    """
    n_bytes = gl.inline_asm_elementwise("mov.u32 $0, %dynamic_smem_size;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    offsets = gl.arange(0, MOST_BYTES // ALIGNMENT, one_a_lane(4)) * ALIGNMENT
    ptx.run(
        "{ .reg .pred inside; .reg .b32 at; mov.u32 at, global_smem; add.u32 at, at, $1; setp.lt.u32 inside, $1, $2; "
        "@inside st.shared.b32 [at], at; }",
        "rr",
        (offsets, n_bytes),
    )
    synchronize()


@gluon.jit
def address_of(buffer):
    """Where a buffer that lies in a swizzle of 128 bytes is, to which nothing was written since `write_addresses`."""
    return gl.max(as_words(buffer, 2).slice(0, 1).load(one_a_lane(4)), 0)


@gluon.jit
def make_words():
    """(N_WORDS, 1) int64 in shared memory, each as a barrier is, and the address of the first; after `write_addresses`."""
    box = gl.allocate_shared_memory(
        gl.bfloat16, [ALIGNMENT // ROW_BYTES, ROW_BYTES // 2], gl.NVMMASharedLayout(128, 16, rank=2)
    )
    words_at = address_of(box)
    # Everyone has read it before it becomes something else.
    synchronize()
    return as_barriers(box, N_WORDS), words_at
