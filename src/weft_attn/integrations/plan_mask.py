"""`PlanMask`: what the mask function hands to every layer of a model in place of a tensor of cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft_attn.distributed.context_parallel import ActiveBatch
from weft_attn.errors import Unsupported
from weft_attn.integrations.positions import PositionRule
from weft_attn.plan import Plan

Window = tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class Mask:
    """Who attends to whom in one kind of layer, for one forward of a model.

    Attributes:
        plan: over the packed batch; None where `batch` holds one of its own.
        window: (left, right) keys around a row's position, None on a side: no bound. None as a whole: the mask was read cell by
            cell, and its window is in the plan.
        is_plain: whole sequences, no padding and no segments.
        is_left_out: transformers would make no mask here: rows see all keys, however many their layer has.
        is_chunked: rows see keys of their own chunk of positions alone.
        batch: the context-parallel batch that was active. Kept here because a checkpointed layer runs again in the backward,
            perhaps in another thread and after the batch's scope.
        positions: what a layer's position ids must be, where the mask has not seen them; None: anything.
    """

    plan: Plan | None
    window: Window | None
    is_plain: bool = False
    is_left_out: bool = False
    is_chunked: bool = False
    batch: ActiveBatch | None = None
    positions: PositionRule | None = None


class PlanMask(torch.Tensor):
    """A boolean (B, 1, rows, keys) tensor by its shape, and a `Mask` by its meaning.

    Models pass masks on, look at their shape and may move or checkpoint them; all that works. It holds no cells: whatever would
    read or change them raises `Unsupported`. Memory: one element.
    """

    mask: Mask

    @staticmethod
    def of(mask: Mask, shape: Sequence[int], device: torch.device | str) -> PlanMask:
        # No view of one element, which torch.compile would look through.
        made = torch.empty_strided(tuple(shape), (0,) * len(shape), dtype=torch.bool, device=device).as_subclass(PlanMask)
        made.mask = mask
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            name = getattr(func.__self__, "__name__", name)  # type: ignore[attr-defined]
        if name in _SAME:
            return args[0]
        if name in _MOVES:
            return args[0]._moved(func, *args[1:], **(kwargs or {}))
        if name not in _FACTS and not name.startswith(("is_", "_is_")):
            raise Unsupported(
                "a mask of attn_implementation='weft' is a plan, it has no cells to compute with: "
                f"expected it to be passed on to the attention, given a call of {name}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def _moved(self, move: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> PlanMask:
        """The same mask where `move` puts a tensor, none of its cells copied."""
        element = move(torch.zeros((), dtype=torch.bool, device=self.device), *args, **kwargs)
        if element.dtype != torch.bool:
            raise Unsupported(f"a mask of attn_implementation='weft' stays boolean: expected torch.bool, given {element.dtype}")
        return PlanMask.of(self.mask, self.shape, element.device)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PlanMask({tuple(self.shape)}, {self.mask})"


# What may be asked of a mask, beside is_*; what moves it; and what would only rearrange its cells.
_FACTS = frozenset(
    ("shape", "ndim", "dtype", "device", "layout", "size", "stride", "dim", "numel", "nelement", "element_size", "__len__")
    + ("requires_grad", "_base", "grad", "grad_fn", "storage_offset", "untyped_storage", "__hash__", "_version")
)
_MOVES = frozenset(("to", "cuda", "cpu"))
_SAME = frozenset(("contiguous", "clone", "detach", "alias"))
