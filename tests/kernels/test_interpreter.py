"""What makes the interpreter's tests quick loses none of them: device functions patched once a launch, one case of each test."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

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


def test_one_case_of_each_test_together_bring_what_one_may() -> None:
    def case(**values: object) -> SimpleNamespace:
        return SimpleNamespace(callspec=SimpleNamespace(params=values))

    first = [case(dtype="half", heads=1), case(dtype="float", heads=2)]
    second = [case(dtype="half"), case(dtype="float")]
    alone = SimpleNamespace()
    assert covering([first, second, [alone]]) == [first[1], second[0], alone]
