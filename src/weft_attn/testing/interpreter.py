"""Triton's interpreter without what it does again for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Inside, the interpreter computes the same, sooner."""
    with ExitStack() as stack:
        stack.enter_context(_language_patched_once())
        stack.enter_context(_overflow_sought_where_it_is_told())
        stack.enter_context(_dtypes_looked_up_once())
        yield


@contextmanager
def _language_patched_once() -> Iterator[None]:
    """Inside, a launch puts the interpreter's functions in the language's place once for each function that it calls.

    Triton does so at every call of a device function. They stay until the launch ends and puts back what was there.
    """
    patch = interpreter._patch_lang
    patched: set[Any] = set()

    def patch_once(fn: Any) -> Any:
        if fn in patched:
            return None
        patched.add(fn)
        scope = patch(fn)
        put_back = scope.restore

        def restore() -> None:
            put_back()
            patched.clear()

        # A launch calls it when it ends, a device function never.
        scope.restore = restore
        return scope

    with mock.patch.object(interpreter, "_patch_lang", patch_once):
        yield


@contextmanager
def _overflow_sought_where_it_is_told() -> Iterator[None]:
    """Inside, sums and products of integers are not computed once more in int64 where an assertion that they agree is left out (debug=False)."""
    seek = TritonSemantic.binary_op_sanitize_overflow_impl

    def seek_where_told(self: Any, *operation: Any) -> None:
        if self.builder.options.debug:
            seek(self, *operation)

    with mock.patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", seek_where_told):
        yield


@contextmanager
def _dtypes_looked_up_once() -> Iterator[None]:
    """Inside, numpy's dtype of one of Triton's is kept: the interpreter makes a table of all of them for each look into it."""
    look_up = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        # Types of blocks have no hash.
        name = (dtype.element_ty if isinstance(dtype, tl.block_type) else dtype).name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    with mock.patch.object(interpreter, "_get_np_dtype", remembered):
        yield
