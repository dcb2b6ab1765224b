"""What differs between the Gluon of Triton 3.6 and of 3.9: the one place that knows."""

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate as aggregate

__all__ = ["add_box", "aggregate", "load_box", "store_box"]

load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@builtin
def _add_box(desc, coord, src, _semantic=None):
    """`async_atomic_add` of 3.9, which 3.6 compiles but does not name."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


add_box = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _add_box
