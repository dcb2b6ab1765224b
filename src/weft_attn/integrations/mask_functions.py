"""What a mask function of transformers means: a band, segments, chunks; or, for any other, its cells.

transformers describes a mask by a function of (batch, head, row, key) indices, composed of a few public building blocks of
`transformers.masking_utils`. Those are recognised by their code; what is not recognised is evaluated, cell by cell, by
transformers itself. Both ways are exact; the first costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import CodeType
from typing import Any

import numpy as np
import torch

from weft_attn.errors import Unsupported, require
from weft_attn.integrations import masks
from weft_attn.integrations.masks import BoolArray, IntArray, Window
from weft_attn.integrations.plan_mask import Mask
from weft_attn.integrations.positions import PositionRule
from weft_attn.plan import Plan

# Cells of a mask that are read one by one: 2**27 bools are 128 MiB, and about a second on the host.
MAX_CELLS = 2**27


@dataclass(frozen=True)
class Asked:
    """A mask that transformers asks for: sizes, the position of the first row and key, and who sees whom.

    Attributes:
        function: (batch, head, row, key) indices to visible or not, positions counted from 0.
        padding: (B, any) bool, False where the key at that position is padding; None: nowhere.
        needs_vmap: the function takes single indices only.
        may_be_left_out: where it hides nothing, layers see all their keys.
        device: where transformers would make the mask.
    """

    batch: int
    rows: int
    keys: int
    row_offset: int
    key_offset: int
    function: Callable[..., Any]
    padding: torch.Tensor | None
    needs_vmap: bool = False
    may_be_left_out: bool = False
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class Pattern:
    """What a recognised function means.

    Attributes:
        left, right: keys that a row sees before and after its position; None: no bound.
        packed: (B, T) number of the document of each token, or None.
        positions: (B, T) position of each token in its document, or None: positions count through.
        chunk: (size, (B,) positions before the first chunk): rows see keys of their own chunk only; or None.
    """

    left: int | None = None
    right: int | None = None
    packed: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    chunk: tuple[int, torch.Tensor] | None = None

    @property
    def window(self) -> Window:
        return self.left, self.right


# ---- recognising ----------------------------------------------------------------------------------------------------------


def recognise(function: Callable[..., Any]) -> Pattern | None:
    """The meaning of a mask function, or None where it holds a part that is not known."""
    kind = _known_code().get(getattr(function, "__code__", None))  # type: ignore[arg-type]
    held = _held(function)
    if kind == "causal":
        return Pattern(right=0)
    if kind == "full":
        return Pattern()
    if kind == "window":
        return Pattern(left=held["sliding_window"] - 1)
    if kind == "both_sides":
        return Pattern(left=held["sliding_window"], right=held["sliding_window"])
    if kind == "chunk":
        return Pattern(chunk=(held["chunk_size"], held["left_padding"]))
    if kind == "packed":
        return Pattern(packed=held["packed_sequence_mask"])
    if kind == "positions":
        inner = recognise(held["mask_function"])
        if inner is None or inner.packed is not None or inner.positions is not None:
            return None
        return replace(inner, positions=held["position_ids"])
    if kind == "and":
        parts = [recognise(part) for part in held["mask_functions"]]
        whole: Pattern | None = Pattern()
        for part in parts:
            whole = None if whole is None or part is None else _intersection(whole, part)
        return whole
    return None


def _intersection(one: Pattern, other: Pattern) -> Pattern | None:
    """Both at once, where one pattern can say it."""
    for name in ("packed", "positions", "chunk"):
        if getattr(one, name) is not None and getattr(other, name) is not None:
            return None
    if (one.chunk and other.positions is not None) or (other.chunk and one.positions is not None):
        return None  # a chunk counts its own side's positions
    return Pattern(
        _smaller(one.left, other.left),
        _smaller(one.right, other.right),
        one.packed if other.packed is None else other.packed,
        one.positions if other.positions is None else other.positions,
        one.chunk or other.chunk,
    )


def _smaller(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


@cache
def _known_code() -> dict[CodeType, str]:
    """The code of each building block, taken from one that transformers makes: closures of one function share it."""
    from transformers import masking_utils as known

    numbers = torch.zeros(1, 1, dtype=torch.int64)
    blocks: dict[str, Callable[[], Any]] = {
        "causal": lambda: known.causal_mask_function,
        "full": lambda: known.bidirectional_mask_function,
        "window": lambda: known.sliding_window_overlay(1),
        "both_sides": lambda: known.sliding_window_bidirectional_overlay(1),
        "chunk": lambda: known.chunked_overlay(1, numbers[0]),
        "packed": lambda: known.packed_sequence_mask_function(numbers),
        "positions": lambda: known.remap_positions_for_packed_sequence(known.causal_mask_function, numbers),
        "and": lambda: known.and_masks(known.causal_mask_function),
    }
    return {make().__code__: name for name, make in blocks.items()}


def _held(function: Callable[..., Any]) -> dict[str, Any]:
    """What a closure holds, by name."""
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))


# ---- to a mask ------------------------------------------------------------------------------------------------------------


def to_mask(asked: Asked) -> Mask:
    """The plan of a mask that transformers asks for.

    Host reads: none for a mask without padding, packing or chunks; otherwise one copy of each tensor that says where they are.
    """
    pattern = recognise(asked.function)
    if pattern is None or not _has_segments(pattern, asked):
        return Mask(_evaluated(asked), None)
    if pattern.left is not None and pattern.left < 0:
        # A window of 0, as configs say of a window that no layer has: rows see nothing.
        return Mask(Plan([], asked.batch * asked.rows, asked.batch * asked.keys), None)
    visible = host_padding(asked)
    shift = asked.row_offset - asked.key_offset
    one_document = asked.padding is None and pattern.right == 0 and asked.rows == asked.keys and shift == asked.row_offset == 0
    if pattern.packed is None and pattern.chunk is None and visible is None:
        plan = masks.band(asked.batch, asked.rows, asked.keys, shift, pattern.window)
        rule = PositionRule(None, pattern.window) if one_document else None
        is_left_out = asked.may_be_left_out and pattern.window == (None, None)
        return Mask(plan, pattern.window, is_plain=True, is_left_out=is_left_out, positions=rule)
    segments = _segments(pattern, asked)
    if not all(masks.are_segments(numbers) for numbers in segments):
        return Mask(_evaluated(asked), None)
    # Chunks count positions of their own.
    rule = PositionRule(None) if one_document and pattern.packed is None else None
    plan = masks.segmented_band(*segments, visible, shift, pattern.window)
    return Mask(plan, pattern.window, is_chunked=pattern.chunk is not None, positions=rule)


def host_padding(asked: Asked) -> BoolArray | None:
    """(B, keys) bool on the host, False where a key is padding; None where none is."""
    if asked.padding is None:
        return None
    given = asked.padding.detach().to(device="cpu", dtype=torch.bool).numpy()
    require(
        given.ndim == 2 and given.shape[0] == asked.batch,
        "a padding mask is (batch, keys)",
        expected=f"({asked.batch}, keys)",
        given=given.shape,
    )
    # Keys beyond a padding mask are places of a cache that nobody has filled.
    visible = np.zeros((asked.batch, asked.keys), dtype=bool)
    part = given[:, asked.key_offset : asked.key_offset + asked.keys]
    visible[:, : part.shape[1]] = part
    return None if visible.all() else visible


def _has_segments(pattern: Pattern, asked: Asked) -> bool:
    """Whether packing, if there is any, is that of documents whose positions count up by one."""
    if pattern.packed is None:
        return pattern.positions is None
    if asked.row_offset or asked.key_offset or pattern.packed.shape != (asked.batch, asked.rows) or asked.rows != asked.keys:
        return False
    if pattern.positions is None:
        return True
    numbers, positions = _host(pattern.packed), _host(pattern.positions)
    inside = numbers[:, 1:] == numbers[:, :-1]
    return bool((np.diff(positions, axis=1)[inside] == 1).all())


def _segments(pattern: Pattern, asked: Asked) -> tuple[IntArray, IntArray]:
    """(B, rows) and (B, keys): the document and chunk of each, as one number."""
    both = []
    for length, offset in ((asked.rows, asked.row_offset), (asked.keys, asked.key_offset)):
        numbers = masks.one_segment(asked.batch, length)
        if pattern.packed is not None:
            numbers = numbers + _host(pattern.packed)
        if pattern.chunk is not None:
            size, before = pattern.chunk
            counted = np.arange(length)[None] + offset if pattern.positions is None else _host(pattern.positions)
            chunk = (counted - _host(before)[:, None]) // size
            # More chunks than a tensor has rows do not exist, so that the two numbers do not run into each other.
            numbers = numbers * 2**32 + chunk
        both.append(np.broadcast_to(numbers, (asked.batch, length)))
    return both[0], both[1]


def _host(x: torch.Tensor) -> IntArray:
    return x.detach().to(device="cpu", dtype=torch.int64).numpy()


def cells_to_plan(cells: torch.Tensor) -> Plan:
    """The plan of a boolean (B, 1, rows, keys) tensor. One copy to the host."""
    return masks.cells(cells[:, 0].detach().cpu().numpy())


def check_cells(batch: int, rows: int, keys: int) -> None:
    """Refuse a mask that is too large to be read cell by cell."""
    if batch * rows * keys > MAX_CELLS:
        raise Unsupported(
            "a mask that is no band of padded or packed sequences is read cell by cell: "
            f"expected at most {MAX_CELLS} cells, given {batch} x {rows} x {keys}"
        )


def _evaluated(asked: Asked) -> Plan:
    """The plan of every cell, as transformers computes it."""
    from transformers.masking_utils import sdpa_mask

    check_cells(asked.batch, asked.rows, asked.keys)
    cells = sdpa_mask(
        batch_size=asked.batch,
        q_length=asked.rows,
        kv_length=asked.keys,
        q_offset=asked.row_offset,
        kv_offset=asked.key_offset,
        mask_function=asked.function,
        attention_mask=asked.padding,
        allow_is_causal_skip=False,
        use_vmap=asked.needs_vmap,
        device=asked.device,
    )
    assert cells is not None, "no skip is allowed"
    return cells_to_plan(cells)
