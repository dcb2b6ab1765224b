"""What kernels are told of their tensors' strides."""

from __future__ import annotations

import torch

from weft_attn.kernels.triton import tiles


def stride_unit(*tensors: torch.Tensor) -> int:
    return tiles.stride_unit(tiles.row_strides(**{f"x{number}": x for number, x in enumerate(tensors)}))


def test_a_kernel_gets_token_and_head_strides_by_name() -> None:
    assert tiles.row_strides(q=heads_of(72), dk=heads_of(8, heads=2)) == dict(
        stride_qt=288, stride_qh=72, stride_dkt=16, stride_dkh=8
    )


def heads_of(dim: int, heads: int = 4) -> torch.Tensor:
    return torch.empty(5, heads, dim)


def test_strides_that_are_multiples_of_eight_but_not_of_sixteen_are_told() -> None:
    for dim in (8, 24, 72, 200, 248):
        assert stride_unit(heads_of(dim)) == 8
    assert stride_unit(heads_of(128), heads_of(72)) == 8
    # One head: strides of 72 and 72.
    assert stride_unit(heads_of(72, heads=1)) == 8
    # A view of a wider tensor.
    assert stride_unit(torch.empty(5, 4, 80)[:, :, 8:][:, :3]) == 1
    assert stride_unit(torch.empty(5, 3, 88)[:, :, 8:]) == 8


def test_what_triton_sees_by_itself_and_what_is_no_multiple_of_eight_is_not() -> None:
    for dim in (16, 64, 80, 96, 128, 256):
        assert stride_unit(heads_of(dim)) == 1
    assert stride_unit(heads_of(72), torch.empty(5, 4, 73)[:, :, :72]) == 1
    assert stride_unit(torch.empty(5, 4, 73)[:, :, 1:]) == 1
    assert stride_unit(heads_of(128).expand(5, 4, 128)) == 1
