"""`weft check` from documents to verdict, told on a console."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from weft_attn.demo.attention_ranks import (
    GPU_SIZES,
    INTERPRETER_SIZES,
    RankResult,
    Sizes,
    ZigzagRanks,
    choose_device,
    project,
)
from weft_attn.demo.documents import Pack, pack_documents
from weft_attn.demo.panels import names_of, zigzag_panels
from weft_attn.errors import require
from weft_attn.plan.cost import backward_flops, forward_flops
from weft_attn.plan.draw import draw_plans, require_picture
from weft_attn.plan.slices import Plan
from weft_attn.testing.cases import Case, Inputs
from weft_attn.testing.compare import Budget, blockwise, budget, truncates


@dataclass(frozen=True)
class Options:
    """What a caller may choose.

    Attributes:
        documents: files and folders to pack; empty: the Python standard library.
        tokens: most tokens to pack; None: what the device does in about a minute.
        world_size: ranks.
        device: "cpu" or "cuda"; None: a GPU if there is one.
        picture: where the plan's picture goes.
    """

    documents: Sequence[Path] = ()
    tokens: int | None = None
    world_size: int = 4
    device: str | None = None
    picture: Path = Path("out/weft-check.png")


@dataclass(frozen=True)
class Checks:
    """Every rank's rows, and the gradients that all ranks add to, held to one device's."""

    out: tuple[Budget, ...]
    dq: tuple[Budget, ...]
    dk: Budget
    dv: Budget

    @property
    def passed(self) -> bool:
        return all(found.passed for found in (*self.out, *self.dq, self.dk, self.dv))


def run_check(options: Options, console: Console) -> bool:
    """Pack, cut, compute, compare, draw. Returns whether every error is within its bound.

    Raises:
        InvalidInput: an option that is out of range, a picture that could not be written, or documents without a byte.
        Unsupported: no such device, no Triton, or no matplotlib.
    """
    begin = time.monotonic()
    require(options.world_size >= 1, "ranks are counted", expected=">= 1", given=options.world_size)
    require(options.tokens is None or options.tokens >= 1, "tokens are counted", expected=">= 1", given=options.tokens)
    require_picture(options.picture)
    device = choose_device(options.device)
    on_gpu = device.type == "cuda"
    sizes = GPU_SIZES if on_gpu else INTERPRETER_SIZES
    pack = pack_documents(options.documents, options.tokens or sizes.tokens)
    _introduce(pack, sizes, options.world_size, device, console)

    inputs = project(pack, sizes, device)
    ranks = ZigzagRanks(inputs, pack.cu_seqlens, options.world_size)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=options.world_size + 2)
        results = []
        for rank in range(options.world_size):
            progress.update(task, description=f"rank {rank}: forward and backward")
            results.append(ranks.run(rank))
            progress.advance(task)
        progress.update(task, description="one device")
        checks = compare(ranks, results, inputs, sizes)
        progress.advance(task)
        progress.update(task, description="picture")
        picture = draw_plans(zigzag_panels(pack.cu_seqlens, options.world_size), options.picture, names_of(pack))
        progress.advance(task)

    console.print(_rank_table(results, checks, sizes))
    console.print(_sum_table(checks))
    console.print(
        "Errors are norms relative to float64 attention of the whole pack on one device. The bound is twice the error of the "
        f"same in plain {_name(sizes.dtype)} PyTorch, and a rounding; the worst row of each tensor has a bound of its own.",
        style="dim",
    )
    console.print(f"picture: {picture}", soft_wrap=True)
    what = "every row and gradient is within its bound" if checks.passed else "an error exceeds its bound"
    console.print(f"{_verdict(checks.passed)}  {what}  ({time.monotonic() - begin:.0f} s)")
    return checks.passed


def compare(ranks: ZigzagRanks, results: Sequence[RankResult], inputs: Inputs, sizes: Sizes) -> Checks:
    """Hold what the ranks computed to causal attention of the whole pack on one device."""
    whole = Plan.from_cu_seqlens(ranks.cu_seqlens, ranks.cu_seqlens, causal=True)
    case = Case(heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, dtype=sizes.dtype, lse_gradient=False)
    exact = blockwise(case, whole, inputs, torch.float64)
    baseline = blockwise(case, whole, inputs, sizes.dtype)
    truncated = truncates(sizes.dtype, inputs.q.device)

    def held(name: str, actual: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> Budget:
        return budget(actual, getattr(exact, name)[rows], getattr(baseline, name)[rows], dtype=sizes.dtype, truncated=truncated)

    return Checks(
        out=tuple(held("out", result.out, result.tokens) for result in results),
        dq=tuple(held("dq", result.dq, result.tokens) for result in results),
        dk=held("dk", ranks.summed(results, "dk")),
        dv=held("dv", ranks.summed(results, "dv")),
    )


def _introduce(pack: Pack, sizes: Sizes, world_size: int, device: torch.device, console: Console) -> None:
    total = int(pack.cu_seqlens[-1])
    console.print(f"[bold]{len(pack.documents)} documents, {total:,} tokens[/] (bytes) of {pack.source}")
    console.print(", ".join(f"{document.name} {len(document.tokens):,}" for document in pack.documents), style="dim")
    if pack.left_out:
        console.print(f"left out, for room: {pack.left_out} documents (see --tokens)")
    console.print(
        f"{sizes.heads} query heads, {sizes.kv_heads} KV heads, head dim {sizes.head_dim}, {_name(sizes.dtype)}; "
        f"{world_size} zigzag ranks, keys in gathered order; forward and backward"
    )
    if device.type == "cuda":
        console.print(f"device: {torch.cuda.get_device_name(device)}")
    else:
        console.print("device: CPU. [yellow]The Triton kernels run in Triton's interpreter[/]: right results, slowly.")


def _rank_table(results: Sequence[RankResult], checks: Checks, sizes: Sizes) -> Table:
    table = _table("Each rank's rows", "rank", "rows", "pairs", "work", "out: error <= bound", "dQ: error <= bound", "")
    if results[0].forward_ms is not None:
        table.add_column("forward TFLOP/s", justify="right")
        table.add_column("backward TFLOP/s", justify="right")
    work = sum(result.plan.pairs for result in results)
    for rank, (result, out, dq) in enumerate(zip(results, checks.out, checks.dq, strict=True)):
        plan = result.plan
        cells = [str(rank), f"{plan.total_q:,}", f"{plan.pairs:,}", f"{plan.pairs / max(1, work):.1%}"]
        cells += [_shown(out), _shown(dq), _verdict(out.passed and dq.passed)]
        if result.forward_ms is not None and result.backward_ms is not None:
            cells.append(f"{forward_flops(plan, sizes.heads, sizes.head_dim) / result.forward_ms / 1e9:.0f}")
            cells.append(f"{backward_flops(plan, sizes.heads, sizes.head_dim) / result.backward_ms / 1e9:.0f}")
        table.add_row(*cells)
    return table


def _sum_table(checks: Checks) -> Table:
    table = _table("Summed over the ranks", "", "error <= bound", "")
    for name, found in (("dK", checks.dk), ("dV", checks.dv)):
        table.add_row(name, _shown(found), _verdict(found.passed))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _shown(found: Budget) -> str:
    """An error and its bound; where only a row fails, that row's."""
    if found.reason:
        return found.reason
    if found.error <= found.bound and not found.passed:
        return f"row {found.worst}: {found.row_error:.1e} > {found.row_bound:.1e}"
    return f"{found.error:.1e} {'<=' if found.passed else '>'} {found.bound:.1e}"


def _verdict(passed: bool) -> str:
    return "[bold green]PASS[/]" if passed else "[bold red]FAIL[/]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
