"""Shared memory that tells on a kernel which reads it before it was written; on NVIDIA GPUs that give a program 227 KB."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from weft_attn.kernels.call import KernelCall

NUM_WARPS = 8
# What the kernel takes: 224 of 227 KB, so that a multiprocessor holds one program.
BYTES = 224 * 1024


@gluon.jit
def _make_block(SIZE: gl.constexpr):
    return gl.allocate_shared_memory(gl.float32, [SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _write_block(block, value, NUM_WARPS: gl.constexpr):
    four_a_thread: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    block.store(gl.full([block.shape[0]], 0.0, gl.float32, four_a_thread) + value)


@gluon.jit
def _read_last(block, ptr, NUM_WARPS: gl.constexpr):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    gl.store(ptr + gl.arange(0, 1, one), block.slice(block.shape[0] - 1, 1).load(one))


@gluon.jit
def _fill_kernel(last_ptr, value, NUM_WARPS: gl.constexpr):
    # Powers of two. All are there before one is read: none takes another's place.
    first, second, third = _make_block(32768), _make_block(16384), _make_block(8192)
    _write_block(first, value, NUM_WARPS)
    _write_block(second, value, NUM_WARPS)
    _write_block(third, value, NUM_WARPS)
    _read_last(first, last_ptr + 3 * gl.program_id(0), NUM_WARPS)
    _read_last(second, last_ptr + 3 * gl.program_id(0) + 1, NUM_WARPS)
    _read_last(third, last_ptr + 3 * gl.program_id(0) + 2, NUM_WARPS)


def fill_call(read: torch.Tensor, value: float) -> KernelCall:
    """The launch: `value` into the shared memory of as many multiprocessors as read (multiprocessors, 3) float32 has rows."""
    return KernelCall(
        kernel=_fill_kernel,
        grid=(len(read),),
        arguments=dict(last_ptr=read, value=value),
        constants=dict(NUM_WARPS=NUM_WARPS),
        num_warps=NUM_WARPS,
        num_stages=1,
    )


def fill_shared_memory(device: torch.device, value: float = float("nan")) -> torch.Tensor:
    """Leave `value` in the shared memory of every multiprocessor, for the next kernel of the current stream to find.

    Returns:
        (multiprocessors, 3) float32: what the last elements of three parts of it were read back as.
    """
    read = torch.zeros(torch.cuda.get_device_properties(device).multi_processor_count, 3, device=device)
    fill_call(read, value).launch()
    return read
