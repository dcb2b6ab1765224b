"""What makes the interpreter's tests quick loses none of them: device functions patched once a launch, one case of each test."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

covering: Any = next(module.covering for name, module in list(sys.modules.items()) if name.endswith("kernels.conftest"))


@triton.jit
def _doubled(x):  # type: ignore[no-untyped-def]
    return x + x


@triton.jit
def _doubling_kernel(x_ptr, out_ptr, FAILS: tl.constexpr):  # type: ignore[no-untyped-def]
    x = _doubled(tl.load(x_ptr))
    tl.static_assert(not FAILS)
    tl.store(out_ptr, _doubled(x))


def test_the_language_is_patched_once_a_launch_and_put_back_also_after_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    patched: list[Any] = []
    patch = interpreter._patch_lang_tensor
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", lambda tensor, scope: patched.append(tensor) or patch(tensor, scope))
    own, x = tl.load, torch.ones(1)
    for fails in (False, True, False):
        out, before = torch.zeros(1), len(patched)
        if fails:
            with pytest.raises(Exception, match=r"(?i)assert"):
                _doubling_kernel[(1,)](x, out, fails)
        else:
            _doubling_kernel[(1,)](x, out, fails)
            assert out.item() == 4
        assert len(patched) == before + 2, "the kernel and its device function, not each call of it"
        assert tl.load is own


@triton.jit
def _overflowing_kernel(x_ptr, out_ptr):  # type: ignore[no-untyped-def]
    x = tl.load(x_ptr)
    tl.store(out_ptr, x + x)


@pytest.mark.parametrize("debug", [False, True])
def test_overflow_is_computed_where_an_assertion_tells_of_it(debug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sought: list[Any] = []
    compare = tl.semantic.TritonSemantic.less_equal
    monkeypatch.setattr(tl.semantic.TritonSemantic, "less_equal", lambda self, *x: sought.append(x) or compare(self, *x))
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=debug))
    x, out = torch.full((1,), 2**30 + 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    if debug:
        with pytest.raises(Exception, match="overflow detected"):
            _overflowing_kernel[(1,)](x, out)
    else:
        _overflowing_kernel[(1,)](x, out)
        assert out.item() == 2 - 2**31
    assert bool(sought) is debug


def test_dtypes_that_are_kept_are_those_of_their_names() -> None:
    pointer, block = tl.pointer_type(tl.int8), tl.block_type
    for _ in range(2):
        found = [
            interpreter._get_np_dtype(x) for x in (tl.bfloat16, block(tl.int32, [4]), tl.int32, pointer, block(pointer, [2]))
        ]
        assert found == [np.dtype(x) for x in (np.uint16, np.int32, np.int32, np.uint64, np.uint64)]


def test_one_case_of_each_test_together_bring_what_one_may() -> None:
    def case(**values: object) -> SimpleNamespace:
        return SimpleNamespace(callspec=SimpleNamespace(params=values))

    first = [case(dtype="half", heads=1), case(dtype="float", heads=2)]
    second = [case(dtype="half"), case(dtype="float")]
    alone = SimpleNamespace()
    assert covering([first, second, [alone]]) == [first[1], second[0], alone]
