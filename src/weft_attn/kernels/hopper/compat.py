"""What differs between the Gluon of Triton 3.6 and of 3.9: the one place that knows."""

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr as value_of
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

__all__ = ["add_box", "aggregate", "as_barriers", "as_words", "builtin", "load_box", "store_box", "synchronize", "value_of"]

load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
synchronize = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@builtin
def _add_box(desc, coord, src, _semantic=None):
    """`async_atomic_add` of 3.9, which 3.6 compiles but does not name."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


add_box = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _add_box


@builtin
def as_words(buffer, n, _semantic=None):
    """The first n int32 of a buffer in shared memory: `reinterpret` of 3.9, which 3.6 has with an underscore."""
    return _semantic.memdesc_reinterpret(buffer, gl.int32, [value_of(n)], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@builtin
def as_barriers(buffer, n, _semantic=None):
    """The first n int64 of a buffer in shared memory, each as a barrier is: (n, 1)."""
    return _semantic.memdesc_reinterpret(buffer, gl.int64, [value_of(n), 1], mbarrier.MBarrierLayout())
