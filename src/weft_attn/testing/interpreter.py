"""Triton's interpreter without what it does again for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton.runtime import interpreter


@contextmanager
def language_patched_once() -> Iterator[None]:
    """Inside, a launch puts the interpreter's functions in the language's place once for each function that it calls.

    Triton does so at every call of a device function, in a third of all the time. They stay until the launch ends and puts back
    what was there.
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
