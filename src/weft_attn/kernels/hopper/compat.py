"""What differs between the Gluon of Triton 3.6 and of 3.9: the one place that knows."""

from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate as aggregate

__all__ = ["aggregate", "load_box", "store_box"]

load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
