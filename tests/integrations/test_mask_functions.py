"""What transformers asks for in a mask: recognised or read cell by cell, the plan holds the cells that transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import masking_utils as known

from weft_attn.errors import InvalidInput, Unsupported
from weft_attn.integrations import mask_functions
from weft_attn.integrations.mask_functions import Asked, Pattern, recognise, to_mask
from weft_attn.integrations.plan_mask import Mask, PlanMask
from weft_attn.integrations.transformers import make_mask

B, T = 2, 13
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 0], list(range(5, 12)) + list(range(6))])
PACKED = known.find_packed_sequence_indices(POSITIONS)
LEFT = torch.tensor([0, 3])


def packed(inner: Callable[..., Any]) -> Callable[..., Any]:
    remapped = known.remap_positions_for_packed_sequence(inner, POSITIONS)
    return known.and_masks(remapped, known.packed_sequence_mask_function(PACKED))


WHOLE = {
    "causal": known.causal_mask_function,
    "full": known.bidirectional_mask_function,
    "window": known.sliding_window_causal_mask_function(4),
    "window of one": known.sliding_window_causal_mask_function(1),
    "window both ways": known.sliding_window_bidirectional_mask_function(3),
    "chunks": known.chunked_causal_mask_function(4, LEFT),
}
PACKINGS = {f"packed {name}": packed(function) for name, function in WHOLE.items()}
# A part that is not known: read cell by cell.
OTHERS = {
    "blocks": known.or_masks(
        known.causal_mask_function, known.blockwise_overlay(torch.tensor([[-1, 0, 0, 0, -1] + [1] * 8] * 2))
    ),
    "own": known.and_masks(known.causal_mask_function, lambda b, h, q, k: (k % 3 != 1) | (q == k)),
    "packed twice": known.and_masks(packed(known.causal_mask_function), packed(known.causal_mask_function)),
    "positions without documents": known.remap_positions_for_packed_sequence(known.causal_mask_function, POSITIONS),
    "chunks across positions": known.and_masks(WHOLE["chunks"], packed(known.causal_mask_function)),
}


def padding(kind: str) -> torch.Tensor | None:
    if kind == "no padding":
        return None
    mask = torch.ones(B, T, dtype=torch.bool)
    if kind == "left":
        mask[1, :3] = False
    if kind == "right":
        mask[0, 9:] = False
    if kind == "holes":
        mask[0, 4:6] = mask[1, 0] = mask[1, 7] = False
    return mask


def cells_of(asked: Asked) -> torch.Tensor:
    return known.sdpa_mask(
        asked.batch,
        asked.rows,
        asked.keys,
        asked.row_offset,
        asked.key_offset,
        asked.function,
        asked.padding,
        allow_is_causal_skip=False,
    )[:, 0]


def assert_same_cells(mask: Mask, asked: Asked) -> None:
    assert mask.plan is not None
    mask.plan.check()
    full = mask.plan.to_mask().reshape(asked.batch, asked.rows, asked.batch, asked.keys)
    expected = cells_of(asked)
    for index in range(asked.batch):
        assert torch.equal(full[index, :, index], expected[index])
    assert full.sum() == expected.sum()


@pytest.mark.parametrize("pads", ["no padding", "all visible", "left", "right", "holes"])
@pytest.mark.parametrize("name", [*WHOLE, *PACKINGS, *OTHERS])
def test_a_mask_over_its_own_tokens(name: str, pads: str) -> None:
    function = {**WHOLE, **PACKINGS, **OTHERS}[name]
    asked = Asked(B, T, T, 0, 0, function, padding(pads))
    mask = to_mask(asked)
    assert_same_cells(mask, asked)
    assert (mask.window is None) == (name in OTHERS)
    assert mask.is_plain == (name in WHOLE and name != "chunks" and pads in ("no padding", "all visible"))


@pytest.mark.parametrize("pads", ["no padding", "left", "holes"])
@pytest.mark.parametrize("sizes", [(1, 9, 8, 0), (3, 13, 10, 0), (5, 13, 4, 0), (2, 6, 11, 7), (9, 16, 0, 0)])
@pytest.mark.parametrize("name", WHOLE)
def test_a_mask_over_a_cache(name: str, sizes: tuple[int, int, int, int], pads: str) -> None:
    """A step, a few tokens after others, a window's keys only, a static cache with room behind."""
    asked = Asked(B, *sizes, WHOLE[name], padding(pads))
    assert_same_cells(to_mask(asked), asked)


def test_the_meaning_of_each_building_block() -> None:
    assert recognise(WHOLE["causal"]) == Pattern(right=0)
    assert recognise(WHOLE["window"]) == Pattern(left=3, right=0)
    assert recognise(WHOLE["window both ways"]) == Pattern(left=3, right=3)
    assert recognise(lambda b, h, q, k: k <= q) is None


def test_packing_whose_numbers_come_back_is_read_cell_by_cell() -> None:
    numbers = torch.tensor([[0, 0, 1, 1, 0]])
    function = known.and_masks(known.causal_mask_function, known.packed_sequence_mask_function(numbers))
    asked = Asked(1, 5, 5, 0, 0, function, None)
    assert_same_cells(to_mask(asked), asked)


def test_a_function_of_single_indices_is_read_as_one() -> None:
    tokens = torch.tensor([3, 0, 1, 1, 2])

    def own(batch: Any, head: Any, row: Any, key: Any) -> Any:
        return tokens[row] >= tokens[key]

    mask = make_mask(1, 5, 5, mask_function=known.and_masks(known.causal_mask_function, own), use_vmap=True)
    expected = torch.ones(5, 5).tril().bool() & (tokens[:, None] >= tokens)
    assert mask.mask.plan is not None
    assert torch.equal(mask.mask.plan.to_mask(), expected)


def test_a_mask_without_bands_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_functions, "MAX_CELLS", B * T * T - 1)
    with pytest.raises(Unsupported, match="cell by cell"):
        to_mask(Asked(B, T, T, 0, 0, OTHERS["own"], None))
    to_mask(Asked(B, T, T, 0, 0, WHOLE["window"], padding("holes")))


def test_a_padding_mask_of_another_batch_is_refused() -> None:
    with pytest.raises(InvalidInput, match="padding mask"):
        to_mask(replace(Asked(B, T, T, 0, 0, WHOLE["causal"], None), padding=torch.zeros(B + 1, T, dtype=torch.bool)))


def test_a_mask_is_passed_on_moved_and_looked_at_but_holds_no_cells() -> None:
    mask = make_mask(2, 3, 4, q_offset=torch.tensor(1))
    assert tuple(mask.shape) == (2, 1, 3, 4)
    assert mask.ndim == 4
    assert mask.dtype == torch.bool
    assert mask.untyped_storage().nbytes() == 1
    for same in (mask.to("cpu"), mask.contiguous(), mask.detach(), mask.clone(), mask.to("meta"), mask.to(torch.bool)):
        assert isinstance(same, PlanMask)
        assert same.mask is mask.mask
        assert same.shape == mask.shape
    for use in (
        lambda: mask[:, :, :, :2],
        lambda: mask & mask,
        lambda: mask.float(),
        lambda: mask.to(torch.float32),
        lambda: torch.where(mask, 0.0, 1.0),
        lambda: mask.all(),
        lambda: mask.sum(),
        lambda: mask.expand(2, 4, 3, 4),
        lambda: torch.cat([mask, mask]),
        lambda: mask.fill_(True),
        lambda: np.asarray(mask),
    ):
        with pytest.raises(Unsupported):
            use()


def test_an_unknown_argument_of_a_mask_is_refused() -> None:
    make_mask(1, 2, 2, local_size=3, config=object(), something=None)
    with pytest.raises(Unsupported, match="something"):
        make_mask(1, 2, 2, something=1)
