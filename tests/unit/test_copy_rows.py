"""Copies of rows of heads, in words of 8 bytes where both sides allow it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from weft_attn.distributed.gathered import copy_rows

# Dims of a head, where the first lies in memory, and the step between its elements.
PLACES = [(8, 0, 1), (8, 4, 1), (8, 1, 1), (6, 0, 1), (5, 0, 1), (16, 0, 2)]


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def rows_at(dtype: torch.dtype, dims: int, offset: int, step: int) -> torch.Tensor:
    """(7, 3, dims) of any bits, NaNs too."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    memory = torch.randint(-(2**15), 2**15, (7 * 3 * dims * step + offset,), dtype=bits).view(dtype)
    return memory[offset:].view(7, 3, dims * step)[..., ::step]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("dims", "offset", "step"), PLACES)
def test_rows_are_copied_bit_by_bit_wherever_they_lie(dtype: torch.dtype, dims: int, offset: int, step: int) -> None:
    source = rows_at(dtype, dims, offset, step)
    target = torch.zeros(9, 5, dims, dtype=dtype)
    copy_rows(target[1:8, 2:], source)
    assert torch.equal(bits_of(target[1:8, 2:]), bits_of(source))
    assert not target[:, :2].any()
    assert not target[[0, 8]].any()


def test_a_stride_or_a_target_that_is_no_word_is_copied_in_elements() -> None:
    memory = torch.arange(7 * 26, dtype=torch.int16).view(torch.bfloat16)
    by_odd_rows = memory.as_strided((7, 3, 8), (26, 8, 1))
    apart = torch.zeros(1 + 7 * 3 * 8, dtype=torch.bfloat16)[1:].view(7, 3, 8)
    for target, source in ((torch.zeros(7, 3, 8, dtype=torch.bfloat16), by_odd_rows), (apart, by_odd_rows.contiguous())):
        copy_rows(target, source)
        assert torch.equal(bits_of(target), bits_of(by_odd_rows))


@pytest.mark.parametrize(("dims", "offset", "step"), PLACES)
def test_what_lies_in_words_is_copied_in_words(dims: int, offset: int, step: int) -> None:
    source, seen = rows_at(torch.bfloat16, dims, offset, step), []
    copy = torch.Tensor.copy_

    def logged(target: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return copy(target, x)

    with mock.patch.object(torch.Tensor, "copy_", logged):
        copy_rows(torch.zeros(7, 3, dims, dtype=torch.bfloat16), source)
    assert seen == [torch.int64 if dims % 4 == offset % 4 == 0 and step == 1 else torch.bfloat16]
