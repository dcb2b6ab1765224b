"""A kernel launch as data: run it on a device, or compile it for a target that is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class KernelCall:
    """What a launcher would launch.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs along the first axis (and more, if any).
        arguments: run-time arguments by name: tensors, descriptors, numbers, None.
        constants: constexpr arguments by name.
        num_warps, num_stages: launch parameters.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Compile options. Multiply-adds are fused whatever the Triton release's default."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)

    def launch(self) -> None:
        """Run on the device of the arguments; an empty grid is no launch."""
        if 0 in self.grid:
            return
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def tensor_descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A 2-D descriptor over [tokens, heads * dim] of (tokens, heads, dim) with boxes of one head's `rows` rows.

    No copy: the box of head h begins at column h * stride(1). Needs a base and row stride of whole 16 bytes, a contiguous last
    dimension, and a head dim that is a power of two.
    """
    tokens, heads, dim = x.shape
    return TensorDescriptor(x, [tokens, (heads - 1) * x.stride(1) + dim], [x.stride(0), 1], [rows, dim])


def vector_descriptor(x: torch.Tensor, length: int) -> TensorDescriptor:
    """A 1-D descriptor over all elements of a contiguous tensor, with boxes of `length` of them."""
    return TensorDescriptor(x.view(-1), [x.numel()], [1], [length])
