"""Plans made from device tensors, kept with them: a model passes the same tensors to every layer, and reading one waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from weft_attn.plan import Plan

_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def kept(sources: tuple[Any, ...], key: tuple[Any, ...], make: Callable[[], Plan]) -> Plan:
    """The plan that `make` made from the present values of its sources, made again when PyTorch has counted a change of them.

    Args:
        sources: what `make` reads. Where one is no device tensor, or counts no changes (inference tensors), the plan is made on
            each call: host memory may be written to behind PyTorch's back, and reading it costs nothing.
        key: what else decides about the plan.
        make: builds the plan.
    """
    return kept_with(sources, key, make) if all(_counts_changes(x) for x in sources) else make()


def kept_with(sources: tuple[torch.Tensor, ...], key: tuple[Any, ...], make: Callable[[], Plan]) -> Plan:
    """As `kept`, for tensors that count their changes; plans live as long as the first one."""
    first, *others = sources
    # The first tensor must not be held by what is kept with it.
    marks = tuple(None if x is first else (_Same(x), x._version) for x in others)
    plans: dict[tuple[Any, ...], Plan] = _plans.setdefault(first, {})
    key = (first._version, *key, *marks)
    if key not in plans:
        for old in [old for old in plans if old[0] != first._version]:
            del plans[old]
        plans[key] = make()
    return plans[key]


def _counts_changes(source: Any) -> bool:
    return isinstance(source, torch.Tensor) and source.device.type != "cpu" and not source.is_inference()


@dataclass(frozen=True, eq=False)
class _Same:
    """A tensor as a key: equal to itself alone."""

    tensor: torch.Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tensor is other.tensor

    def __hash__(self) -> int:
        return id(self.tensor)
