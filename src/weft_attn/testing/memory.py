"""Fresh memory that tells on whoever reads it before it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def memory_of_nan() -> Iterator[None]:
    """Inside, fresh floating-point tensors hold NaN instead of whatever the allocator had."""

    def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() and made.device.type != "meta" else made

        return call

    replaced = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    try:
        for owner, name, make in replaced:
            setattr(owner, name, filled(make))
        yield
    finally:
        for owner, name, make in replaced:
            setattr(owner, name, make)


_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
