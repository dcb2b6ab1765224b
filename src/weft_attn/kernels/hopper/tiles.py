"""What the Hopper kernels share: layouts, descriptors, zeroing what a slice does not own, writing rows."""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from weft_attn.kernels.triton.visibility import first_tile, next_tile

CONSUMERS = gl.constexpr(2)
# Rows of a consumer: what one warp group multiplies at a time.
ROWS = gl.constexpr(64)
# How a warp group reads and writes a tile by rows, 16 bytes a thread.
BY_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))

# PTX of what hidden scores and hidden weights are.
MINUS_INFINITY = gl.constexpr("0fFF800000")
ZERO = gl.constexpr("0f00000000")

ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def head_box(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """As `kernels.call.tensor_descriptor`, with the layout in shared memory that the products read."""
    tokens, heads, dim = x.shape
    shared = gl.NVMMASharedLayout.get_default_for([rows, dim], ELEMENTS[x.dtype])
    return TensorDescriptor(x, [tokens, (heads - 1) * x.stride(1) + dim], [x.stride(0), 1], [rows, dim], shared)


@gluon.constexpr_function
def one_a_lane(warps):
    """How so many warps hold words, such as a row of a table."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def product_layout(columns):
    """Registers of a warp group that hold a (64, columns) product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def as_operand(tile, dtype: gl.constexpr, product: gl.constexpr):
    """A tile rounded to the input dtype, as the left operand of a product, in registers."""
    return gl.convert_layout(tile.to(dtype), gl.DotOperandLayout(0, product, 2))


@gluon.constexpr_function
def _round_pair(dtype):
    """PTX: two float32 as 16-bit values of one register, the first in its low half."""
    return f"cvt.rn.{'bf16' if dtype == gl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"


@gluon.jit
def pack_operand(tile, dtype: gl.constexpr):
    """A (rows, columns) tile rounded to the input dtype, neighbours in one int32, (rows, columns / 2): how a loop carries it on.

    16-bit values that a loop carries may cost two instructions a register and turn: compilers take them apart and put them together.
    """
    low, high = gl.split(tile.reshape([tile.shape[0], tile.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(_round_pair(dtype), "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack_operand(words, dtype: gl.constexpr, product: gl.constexpr):
    """What `pack_operand` packed, as the left operand of a product."""
    low, high = (words & 0xFFFF).to(gl.int16), (words >> 16).to(gl.int16)
    tile = gl.join(low, high).reshape([words.shape[0], 2 * words.shape[1]]).to(dtype, bitcast=True)
    return gl.convert_layout(tile, gl.DotOperandLayout(0, product, 2))


@gluon.constexpr_function
def _in_place(values, second):
    """Constraints of as many results that take the registers of the first operands, and as many second operands."""
    return ",".join(["=f"] * values + [str(i) for i in range(values)] + [second] * values)


@triton.jit
def visible_bits(first, stop):
    """Which of a thread's columns 8 j + b of a product, b 0 or 1, are in [first, stop): bit 2 j + b of a word."""
    return _bits_below(stop) & ~_bits_below(first)


@triton.jit
def _bits_below(column):
    n = tl.minimum(tl.maximum((column >> 3) * 2 + tl.minimum(column & 7, 2), 0), 32)
    # A shift by 32 is for 64 bits.
    return ((1 << n.to(tl.int64)) - 1).to(tl.int32)


@gluon.jit
def visible_words(first, stop, col, product: gl.constexpr):
    """For `hide`: which columns a tile's rows see, (64, columns), of a thread's columns one word a row: row i sees [first_i, stop_i), and
    the tile begins at `col`.
    """
    COLUMNS: gl.constexpr = product.instr_shape[1]
    gl.static_assert(COLUMNS <= 128, "a thread has a quarter of a row's columns, and a word 32 bits")
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, product))
    # A thread holds the columns 8 j + {0, 1} from its first one.
    begin = (col + (columns & 6))[None, :]
    return visible_bits(first[:, None] - begin, stop[:, None] - begin)


@gluon.constexpr_function
def _select(values, other):
    """PTX: so many values of a thread, in pairs of two rows by turns, where their bits of the rows' words are set, else `other`."""
    words = 2 * values
    selected = []
    for i in range(values):
        word, bit = words + (i & 2), 2 * (i >> 2) + (i & 1)
        selected.append(f"and.b32 bit, ${word}, {1 << bit}; setp.ne.u32 seen, bit, 0; selp.f32 ${i}, ${i}, {other}, seen;")
    return "{ .reg .b32 bit; .reg .pred seen; " + " ".join(selected) + " }"


@gluon.jit
def hide(tile, words, OTHER: gl.constexpr):
    """A (64, columns) float32 product where its rows see its columns (`visible_words`), elsewhere `OTHER`, a float32 of PTX.

    Two instructions an element: a tensor of booleans takes four more, because the compiler keeps it in bytes.
    """
    VALUES: gl.constexpr = tile.shape[1] // 2
    return gl.inline_asm_elementwise(
        _select(VALUES, OTHER), _in_place(VALUES, "r"), [tile, words], dtype=gl.float32, is_pure=True, pack=VALUES
    )


@gluon.jit
def clean_rows(tile, n_valid):
    """Zero the rows of a tile from the n_valid-th on: they are another slice's or a buffer's padding, and zero times NaN is NaN."""
    rows = gl.arange(0, tile.shape[0], gl.SliceLayout(1, BY_ROWS))
    values = tile.load(BY_ROWS)
    tile.store(gl.where((rows < n_valid)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def zero_rows(tile, n_valid, product: gl.constexpr):
    """A (64, columns) product with zeros from the n_valid-th row on: others' rows, and a hidden NaN makes NaN of a zero weight."""
    rows = gl.arange(0, tile.shape[0], gl.SliceLayout(1, product))
    return gl.where((rows < n_valid)[:, None], tile, 0.0)


@gluon.jit
def clean_half(tile, n_valid, CONSUMER: gl.constexpr):
    """As `clean_rows`, a half of a streamed tile, by each of the first two consumers. `agree` before the tile is read."""
    HALF: gl.constexpr = tile.shape[0] // 2
    if CONSUMER < 2:
        clean_rows(tile.slice(CONSUMER * HALF, HALF, dim=0), n_valid - CONSUMER * HALF)


@gluon.jit
def make_agreement(CONSUMERS: gl.constexpr):
    """A barrier for `agree` of so many consumers, of kernels that use it: memory that nothing uses again is given to the tiles too (docs/adr/0020)."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=CONSUMERS)
    return barrier


@gluon.jit
def agree(barrier, times):
    """All consumers are here, for the `times`-th time from 0, and what they wrote to shared memory is seen by the products."""
    fence_async_shared()
    mbarrier.arrive(barrier, count=1)
    mbarrier.wait(barrier, times & 1)


@gluon.jit
def load_keys_and_values(p, memory, step, kv_head, run, n_tiles):
    """Producer: ask for the key and value tiles of one stream, into `memory.k` and `memory.v`; the step after them."""
    k_column = kv_head * p.stride_kh
    v_column = kv_head * p.stride_vh
    col, left = first_tile(p.runs_ptr, run)
    for _ in range(n_tiles):
        memory.k.load(step, p.k_desc, col, k_column)
        memory.v.load(step, p.v_desc, col, v_column)
        step += 1
        run, col, left = next_tile(p.runs_ptr, run, col, left, p.BLOCK_K)
    return step


@gluon.constexpr_function
def _by_neighbours(columns, width):
    """How a warp group holds a (64, columns) tile so that a thread has `width` neighbours of a row, 4 or 8.

    A row stays with the four lanes that hold it as a product, where each has two neighbours of every eight columns. `columns`: a power of
    two from 32 on.
    """
    bits = [1 << i for i in range(columns.bit_length() - 1)]
    lanes = [8, 4] if width == 4 else [8, 16]
    values = (
        [[0, bit] for bit in bits if bit < width] + [[8, 0]] + [[0, bit] for bit in bits if bit >= width and bit not in lanes]
    )
    return gl.DistributedLinearLayout(
        values, [[0, bit] for bit in lanes] + [[1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, columns]
    )


@gluon.jit
def write_rows(ptr, stride_row, tile, first_row, n_rows):
    """Write the first n_rows rows of a (64, columns) product in the dtype of `ptr`, which points at the tensor's row 0, 16 bytes a thread.

    As products hold a row, a thread would write two columns at a time: of 16 bits four times as many stores, of half a sector each, of 32
    twice as many. Lanes exchange one bit of the column at a time: then they do it by shuffles, and both at once would take shared memory.
    """
    IS_WIDE: gl.constexpr = ptr.dtype.element_ty.primitive_bitwidth == 32
    values = gl.convert_layout(tile, _by_neighbours(tile.shape[1], 4)).to(ptr.dtype.element_ty)
    neighbours: gl.constexpr = _by_neighbours(tile.shape[1], 4 if IS_WIDE else 8)
    if not IS_WIDE:
        values = gl.convert_layout(values, neighbours)
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, neighbours))
    columns = gl.arange(0, tile.shape[1], gl.SliceLayout(0, neighbours))
    offsets = rows.to(gl.int64)[:, None] * stride_row + columns[None, :]
    gl.store(ptr + offsets, values, mask=(rows < first_row + n_rows)[:, None])
