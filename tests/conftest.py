"""What all tests share. Triton is not imported here: tests/kernels decides first whether it interprets kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from weft_attn.testing.memory import memory_of_nan

hypothesis.settings.register_profile("weft", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("weft")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fresh tensors hold NaN instead of whatever the allocator had: an element that nobody writes shows."""
    with memory_of_nan():
        yield


GUARD = 1024
SENTINEL = -7


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh tensors lie between guards of a known value; at the end of the test nothing may have written there."""
    made: list[tuple[torch.Tensor, int]] = []

    def between_guards(shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = torch.Size(shape).numel()
        whole = torch.full((size + 2 * GUARD,), SENTINEL, dtype=dtype, device=device)
        made.append((whole, size))
        inside = whole[GUARD : GUARD + size].view(shape)
        return inside.fill_(float("nan")) if dtype.is_floating_point else inside

    def shape_of(sizes: tuple[Any, ...]) -> Any:
        return sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes

    def empty(*sizes: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> torch.Tensor:
        return between_guards(shape_of(sizes), dtype, torch.device(device))

    def empty_like(x: torch.Tensor) -> torch.Tensor:
        return between_guards(x.shape, x.dtype, x.device)

    def new_empty(x: torch.Tensor, *sizes: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        return between_guards(shape_of(sizes), dtype or x.dtype, torch.device(device or x.device))

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    monkeypatch.undo()
    assert made, "something was allocated"
    for whole, size in made:
        assert (whole[:GUARD] == SENTINEL).all(), "nothing is written before a tensor"
        assert (whole[GUARD + size :] == SENTINEL).all(), "nothing is written after a tensor"
