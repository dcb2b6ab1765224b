"""`weft compile`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from weft_attn.kernels.matrix import Outcome

# Bytes a thread. The fastest dK/dV config measured on an H200 spills 408 of them; configs that ruin a kernel spill thousands.
MAX_SPILL = 512


def compile(  # noqa: A001 (a command takes its function's name)
    more: Annotated[list[str] | None, typer.Argument(metavar="[ARCH]...", help="More targets for --arch.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="Targets: sm_80 sm_90 gfx942 ... Default: all known.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Only this kernel; may be repeated.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Only this head dim. Default: those of the tables.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only what selection gives bfloat16 of head dim 128, and the forward of 72.")
    ] = False,
    max_spill: Annotated[int, typer.Option(min=0, help="Bytes that a thread may spill.")] = MAX_SPILL,
    workers: Annotated[int, typer.Option(min=1, help="Compiler processes.")] = 2,
) -> None:
    """Compile every kernel of every launch table for targets that need not be here, and check what they need.

    Exit code 1: a kernel does not compile, spills more than --max-spill, needs more shared memory than the target has or than
    launch/resources.py computes, holds an atomic (a persistent grid: more than the three it counts with), or sets up a barrier that
    nobody uses.
    """
    from rich.console import Console
    from rich.progress import track

    from weft_attn.kernels.matrix import compile_all, variants
    from weft_attn.launch.device import TARGETS

    archs = [*(arch or []), *(more or [])] or list(TARGETS)
    chosen = variants(archs, kernels=kernel or (), head_dim=head_dim, quick=quick)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    outcomes = list(track(compile_all(chosen, workers), "compiling", len(chosen), console=console, transient=True))
    console.print(_table(outcomes, max_spill))
    wrong = [outcome for outcome in outcomes if outcome.faults(max_spill)]
    console.print(f"{len(outcomes) - len(wrong)} of {len(outcomes)} variants compile and fit, for {', '.join(archs)}")
    if wrong or not outcomes:
        raise typer.Exit(1)


def _table(outcomes: list[Outcome], max_spill: int) -> Table:
    from rich import box
    from rich.table import Table

    from weft_attn.launch.device import target
    from weft_attn.launch.explain import numbers

    table = Table(box=box.SIMPLE_HEAD)
    for name in (
        "target",
        "kernel",
        "table",
        "numbers",
        "variant",
        "registers",
        "spills",
        "shared memory <= bound <= room",
        "",
    ):
        table.add_column(name, overflow="fold", justify="right" if name in ("registers", "spills") else "left")
    for outcome in outcomes:
        variant, faults = outcome.variant, outcome.faults(max_spill)
        table.add_row(
            variant.arch,
            variant.kernel,
            variant.source,
            numbers(variant.config, brief=True),
            str(variant),
            "?" if outcome.registers is None else str(outcome.registers),
            str(outcome.spilled_bytes),
            f"{outcome.shared_memory:,} <= {outcome.shared_memory_bound:,} <= {target(variant.arch).shared_memory:,}",
            "[red]" + "; ".join(faults) if faults else "[green]ok",
        )
    return table
