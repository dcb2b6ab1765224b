"""Every kernel of every launch table, compiled for targets that are not there, and what is wrong with the result.

A variant is a table's row at one head dim, dtype and set of features. Rows are compiled at their own head dim (where the target
cannot hold that, at the widest that it holds: selection takes them for narrow heads) and at one that is no power of two, whose
columns are masked and which tensor descriptors cannot describe.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
import triton

from weft_attn.errors import Unsupported, require
from weft_attn.kernels.call import KernelCall
from weft_attn.kernels.offline import Compiled, compile_call
from weft_attn.launch.config import (
    CONFIGS,
    CombineConfig,
    DeltaConfig,
    FinishDqConfig,
    ForwardConfig,
    HopperBackwardConfig,
    HopperBackwardDkdvConfig,
    HopperConfig,
    HopperForwardConfig,
    LaunchConfig,
    StreamConfig,
)
from weft_attn.launch.device import Device, target
from weft_attn.launch.resources import Shape, padded, shared_memory, shortfall
from weft_attn.launch.select import FUSED_KERNEL, MANY_ROWS, Problem, is_served, select, tables, tma_usable

DTYPES = {16: (torch.bfloat16, torch.float16), 32: (torch.float32,)}
# A call's shape where only strides and dtypes matter: Llama 3 8B.
TOKENS, HEADS, KV_HEADS = 4096, 32, 8
SOFTCAP = 30.0
MAX_HEAD_DIM = 256
# What `quick` compiles.
# 72: padded columns, and head strides that are multiples of 8 but not of 16.
QUICK_HEAD_DIM, QUICK_RAGGED = 128, 72


@dataclass(frozen=True)
class Variant:
    """One compilation.

    Attributes:
        source: the table whose row this is.
        few_rows: the forward's keys are split and query heads share a tile.
        all_features: softcap, sinks, a gradient of lse, float32 dK and dV: whatever the kernel knows of these.
        in_turn: programs add to dQ in turn.
    """

    arch: str
    kernel: str
    source: str
    config: LaunchConfig
    head_dim: int
    dtype: torch.dtype
    few_rows: bool
    all_features: bool
    in_turn: bool = False

    @property
    def shape(self) -> Shape:
        return Shape(self.head_dim, self.head_dim, self.dtype.itemsize * 8)

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"D={self.head_dim}"]
        parts += ["few rows"] * self.few_rows + ["all features"] * self.all_features + ["in turn"] * self.in_turn
        return " ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """What the compiler says of a variant; `error` where it failed."""

    variant: Variant
    registers: int | None = None
    spilled_bytes: int = 0
    shared_memory: int = 0
    atomics: int = 0
    undefined_reads: tuple[str, ...] = ()
    added_waits: int = 0
    idle_barriers: tuple[str, ...] = ()
    error: str = ""

    @property
    def shared_memory_bound(self) -> int:
        """What launch/resources.py computes."""
        return shared_memory(self.variant.config, self.variant.shape, self.variant.arch)

    def faults(self, max_spill: int) -> list[str]:
        """What is wrong with it, in words; a thread may spill `max_spill` bytes."""
        if self.error:
            return [self.error]
        available = target(self.variant.arch).shared_memory
        found = []
        if self.spilled_bytes > max_spill:
            found.append(f"spills {self.spilled_bytes} bytes, more than {max_spill}")
        if self.shared_memory > available:
            found.append(f"needs {self.shared_memory} bytes of shared memory of {available}")
        if self.shared_memory > self.shared_memory_bound:
            found.append(f"needs {self.shared_memory} bytes of shared memory, computed bound {self.shared_memory_bound}")
        if self.atomics > allowed_atomics(self.variant):
            found.append(f"holds {self.atomics} atomics, expected at most {allowed_atomics(self.variant)}")
        if self.undefined_reads:
            found.append(
                f"reads undefined registers in {len(self.undefined_reads)} places, the first: {self.undefined_reads[0]}"
            )
        if self.added_waits:
            found.append(f"waits for matrix products in {self.added_waits:+} places, counted from what it asks for")
        if self.idle_barriers:
            found.append(f"sets up barriers that nobody uses: {', '.join(self.idle_barriers)}")
        return found


def allowed_atomics(variant: Variant) -> int:
    """Results are summed without atomics that return something. A persistent grid counts with two: which item is next, and who is done;
    in turn it asks for the first item too, and all but the fused backward ask in two places, so that short items' successors are known early.
    """
    if not isinstance(variant.config, HopperConfig):
        return 0
    return 2 + (variant.in_turn if isinstance(variant.config, HopperBackwardConfig) else 1)


def variants(
    archs: Sequence[str], *, kernels: Sequence[str] = (), head_dim: int | None = None, quick: bool = False
) -> list[Variant]:
    """What to compile for targets.

    Args:
        archs: "sm_90", "gfx942", ...
        kernels: only these; empty: all.
        head_dim: only this one; None: of each row its own and one that is no power of two.
        quick: for each kernel only what selection gives QUICK_HEAD_DIM, and the forward of QUICK_RAGGED.

    Raises:
        Unsupported: an unknown target.
        InvalidInput: an unknown kernel, or a head dim that attention does not take.
    """
    if head_dim is not None:
        require(
            8 <= head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0,
            f"a head dim is a multiple of 8 up to {MAX_HEAD_DIM}",
            expected=f"8, 16, ..., {MAX_HEAD_DIM}",
            given=head_dim,
        )
    for kernel in kernels:
        require(kernel in CONFIGS, "a kernel is known", expected=f"one of {sorted(CONFIGS)}", given=repr(kernel))
    found: dict[Any, Variant] = {}
    for arch in dict.fromkeys(archs):
        device = target(arch)
        for each in _quick_variants(device, head_dim) if quick else _row_variants(device, head_dim):
            if not kernels or each.kernel in kernels:
                # The same numbers in two tables compile to the same kernel.
                found.setdefault(replace(each, source=""), each)
    return list(found.values())


def _row_variants(device: Device, head_dim: int | None) -> Iterator[Variant]:
    for table in tables():
        if table.arch not in (device.arch, "any"):
            continue
        for row in table.rows:
            if head_dim is None:
                dims = _dims_of(row.config, row.head_dim, row.dtype_bits, device)
            else:
                serves = head_dim == row.head_dim if isinstance(row.config, HopperConfig) else padded(head_dim) <= row.head_dim
                dims = [head_dim] if serves else []
            for dim in dims:
                for dtype in DTYPES[row.dtype_bits]:
                    for all_features in (False, True):
                        yield from _if_it_fits(
                            device, table.name, row.config, dim, dtype, row.few_rows != MANY_ROWS, all_features
                        )


def _dims_of(config: LaunchConfig, widest: int, dtype_bits: int, device: Device) -> list[int]:
    """The widest power of two up to `widest` that the device holds, and three quarters of it; empty when none fits."""
    if isinstance(config, HopperConfig):
        return [] if shortfall(config, Shape(widest, widest, dtype_bits), device) else [widest]
    dim = widest
    while dim >= 16 and shortfall(config, Shape(dim, dim, dtype_bits), device):
        dim //= 2
    return [] if dim < 16 else [dim, max(8, dim * 3 // 4 // 8 * 8)]


def _quick_variants(device: Device, head_dim: int | None) -> Iterator[Variant]:
    dim = QUICK_HEAD_DIM if head_dim is None else head_dim
    served = [kernel for kernel in CONFIGS if is_served(kernel, Problem(dim, dim, 16), device)]
    if FUSED_KERNEL not in served:
        # What ends a fused backward runs after one only.
        served = [kernel for kernel in served if kernel != FinishDqConfig.kernel]
    wanted = [(kernel, dim, MANY_ROWS) for kernel in served] + [("forward", dim, HEADS // KV_HEADS)]
    if head_dim is None:
        wanted.append(("forward", QUICK_RAGGED, MANY_ROWS))
    for kernel, dim, few_rows in wanted:
        # Of these heads, and of others that no pair of programs shares.
        groups = (HEADS // KV_HEADS, 1)
        for choice in dict.fromkeys(select(kernel, Problem(dim, dim, 16, few_rows, group=group), device) for group in groups):
            yield from _if_it_fits(device, choice.source, choice.config, dim, torch.bfloat16, few_rows != MANY_ROWS, True)


def _if_it_fits(
    device: Device, source: str, config: LaunchConfig, head_dim: int, dtype: torch.dtype, few_rows: bool, all_features: bool
) -> Iterator[Variant]:
    """The variant as selection would launch it; none where it would pass the row over."""
    problem = Problem(head_dim, head_dim, dtype.itemsize * 8)
    if isinstance(config, StreamConfig) and config.use_tma and not tma_usable(problem, device):
        config = replace(config, use_tma=False)
    if not shortfall(config, problem.shape, device):
        variant = Variant(device.arch, config.kernel, source, config, head_dim, dtype, few_rows, all_features)
        yield variant
        if isinstance(config, HopperBackwardConfig) and config.in_turn:
            yield replace(variant, in_turn=True)


def call_of(variant: Variant) -> KernelCall:
    """The variant's launch, on tensors without storage."""
    from weft_attn.kernels.triton.backward_dkdv import backward_dkdv_call
    from weft_attn.kernels.triton.backward_dq import backward_dq_call
    from weft_attn.kernels.triton.combine import combine_call
    from weft_attn.kernels.triton.delta import SHIFTED_COPIES, delta_call, stats_shape
    from weft_attn.kernels.triton.finish_dq import finish_dq_call
    from weft_attn.kernels.triton.forward import forward_call

    def empty(*shape: int, dtype: torch.dtype = variant.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    config, dim, has_all = variant.config, variant.head_dim, variant.all_features
    rows, keys = empty(TOKENS, HEADS, dim), empty(TOKENS, KV_HEADS, dim)
    dq_sum = empty(HEADS, TOKENS, dim, dtype=torch.float32)
    statistics = empty(HEADS, TOKENS, dtype=torch.float32)
    sinks = empty(HEADS, dtype=torch.float32) if has_all else None
    table = empty(100, 8, dtype=torch.int32)
    softcap = SOFTCAP if has_all else 0.0
    stream: dict[str, Any] = dict(items=table, runs=table, n_items=100, softmax_scale=dim**-0.5, softcap=softcap, config=config)
    backward: dict[str, Any] = dict(
        q=rows, k=keys, v=keys, dout=rows, lse_log2=statistics, delta=statistics, heads_per_wave=KV_HEADS, **stream
    )
    # As over several ranks. In turn the other way round, so that both kinds occur with and without a softcap.
    gradient = empty(TOKENS, KV_HEADS, dim, dtype=torch.float32) if has_all != variant.in_turn else keys
    pack = HEADS // KV_HEADS if variant.few_rows or isinstance(config, CombineConfig) else 1
    block_q = config.block_q if isinstance(config, ForwardConfig) else 16
    partial = empty(100, HEADS // pack, block_q, dim, dtype=torch.float32)
    partial_lse = empty(100, HEADS // pack, block_q, dtype=torch.float32)
    if isinstance(config, ForwardConfig):
        return forward_call(
            q=rows,
            k=keys,
            v=keys,
            sinks=sinks,
            out=rows,
            lse=statistics,
            partial_out=partial if variant.few_rows else None,
            partial_lse=partial_lse if variant.few_rows else None,
            pack=pack,
            heads_per_wave=HEADS // pack,
            **stream,
        )
    if isinstance(config, CombineConfig):
        return combine_call(
            partial_out=partial,
            partial_lse=partial_lse,
            sinks=sinks,
            out=rows,
            lse=statistics,
            combines=empty(10, 4, dtype=torch.int32),
            n_combines=10,
            pack=pack,
            config=config,
        )
    if isinstance(config, DeltaConfig):
        copies = empty(*stats_shape(HEADS, TOKENS, SHIFTED_COPIES if has_all else 1), dtype=torch.float32)
        return delta_call(
            out=rows,
            dout=rows,
            lse=statistics,
            dlse=statistics if has_all else None,
            delta=copies,
            lse_log2=copies,
            dq_sum=dq_sum if has_all else None,
            turns=table if has_all else None,
            config=config,
        )
    if isinstance(config, FinishDqConfig):
        return finish_dq_call(dq_sum=dq_sum, dq=rows, softmax_scale=dim**-0.5, config=config)
    if isinstance(config, HopperConfig):
        counter = empty(2, dtype=torch.int32)
        turns = dict(turns=counter, afters=counter) if variant.in_turn else {}
        return _hopper_call(config, rows, keys, sinks, statistics, gradient, dq_sum, counter, backward, turns)
    if config.kernel == "backward_dkdv":
        return backward_dkdv_call(dk=gradient, dv=gradient, **backward)
    return backward_dq_call(dq=rows, **backward)


def _hopper_call(
    config: HopperConfig,
    rows: torch.Tensor,
    keys: torch.Tensor,
    sinks: torch.Tensor | None,
    statistics: torch.Tensor,
    gradient: torch.Tensor,
    dq_sum: torch.Tensor,
    counter: torch.Tensor,
    backward: dict[str, Any],
    turns: dict[str, Any],
) -> KernelCall:
    from weft_attn.kernels.hopper.backward import hopper_backward_call
    from weft_attn.kernels.hopper.backward_dq import hopper_backward_dq_call
    from weft_attn.kernels.hopper.forward import hopper_forward_call

    grid: dict[str, Any] = dict(counter=counter, multiprocessors=100)
    if isinstance(config, HopperForwardConfig):
        names = ("items", "runs", "n_items", "softmax_scale", "softcap", "config", "heads_per_wave")
        stream = {name: backward[name] for name in names}
        return hopper_forward_call(q=rows, k=keys, v=keys, sinks=sinks, out=rows, lse=statistics, **grid, **stream)
    if isinstance(config, HopperBackwardConfig | HopperBackwardDkdvConfig):
        summed = dq_sum if isinstance(config, HopperBackwardConfig) else None
        return hopper_backward_call(dk=gradient, dv=gradient, dq_sum=summed, last_heads=1, **turns, **grid, **backward)
    dlse = None if sinks is None else statistics
    return hopper_backward_dq_call(dq=rows, out=rows, lse=statistics, dlse=dlse, **grid, **backward)


def compile_all(chosen: Sequence[Variant], workers: int = 2) -> Iterator[Outcome]:
    """Compile variants in processes of their own, from nothing (no cache is read); outcomes in order.

    Raises:
        Unsupported: this process interprets kernels, and so would the workers.
    """
    if triton.knobs.runtime.interpret:
        raise Unsupported("kernels are compiled: expected TRITON_INTERPRET unset, given a Triton that interprets them")
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(workers, get_context("spawn"), _use_cache, (cache,)) as pool,
    ):
        futures = [pool.submit(compile_variant, variant) for variant in chosen]
        for variant, future in zip(chosen, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield Outcome(variant, error="a compiler process died (find out which with --workers 1)")


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def compile_variant(variant: Variant) -> Outcome:
    """Compile one variant here."""
    try:
        compiled = compile_call(call_of(variant), variant.arch)
    except Exception as error:  # noqa: BLE001 (Triton, LLVM and assemblers raise what they like; it is the outcome)
        return Outcome(variant, error=_in_a_line(error))
    return outcome_of(variant, compiled)


def outcome_of(variant: Variant, compiled: Compiled) -> Outcome:
    """What became of a variant that compiled."""
    return Outcome(
        variant,
        compiled.registers,
        compiled.spilled_bytes,
        compiled.shared_memory,
        compiled.atomics,
        compiled.undefined_reads,
        compiled.added_waits,
        compiled.idle_barriers,
    )


def _in_a_line(error: BaseException) -> str:
    """What went wrong at the root: Triton wraps an error once for each function that it compiles, with the source and a caret."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
