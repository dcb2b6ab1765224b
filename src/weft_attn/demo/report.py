"""What the demo finds, what it demands, and how it tells both on a console."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from weft_attn.demo.options import STEPS, Setup

# Bounds of float32, about twenty times what was found. At the first step both have the same parameters, so that gradients differ
# by one step's rounding. Each update then carries the difference on and makes it larger, for AdamW divides small gradients by
# their own size: the other bounds are of as many steps as the demo takes by itself.
LOSS_BOUND = 2e-5
FIRST_GRADIENT_BOUND = 1e-5
GRADIENT_BOUND = 1e-2
BOUND_STEPS = STEPS

LINES = 8


@dataclass(frozen=True)
class Step:
    """One step of both runs.

    Attributes:
        loss_alone, loss_together: nats per byte, before the update.
        gradient_gap: the largest difference of an element of a gradient, as a share of its tensor's largest element.
        parameter: whose gradient that is.
        seconds_alone, seconds_together: forward, backward, and the reduction over ranks.
    """

    loss_alone: float
    loss_together: float
    gradient_gap: float
    parameter: str
    seconds_alone: float
    seconds_together: float

    @property
    def loss_gap(self) -> float:
        return abs(self.loss_alone - self.loss_together)


@dataclass(frozen=True)
class Finding:
    """A difference and what it may be; not a number is never within."""

    words: str
    found: float
    bound: float
    where: str = ""

    @property
    def passed(self) -> bool:
        return self.found <= self.bound


@dataclass(frozen=True)
class Outcome:
    """A run of at least one step."""

    steps: tuple[Step, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        bound = self.steps[:BOUND_STEPS]
        first, worst = bound[0], max(bound, key=lambda step: _size(step.gradient_gap))
        loss_gap = max((step.loss_gap for step in bound), key=_size)
        return (
            Finding(f"loss, steps 1 to {len(bound)}", loss_gap, LOSS_BOUND),
            Finding("gradients, step 1, equal parameters", first.gradient_gap, FIRST_GRADIENT_BOUND, first.parameter),
            Finding(f"gradients, steps 1 to {len(bound)}", worst.gradient_gap, GRADIENT_BOUND, worst.parameter),
        )

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)


def _size(gap: float) -> float:
    """Not a number counts as the largest."""
    return math.inf if math.isnan(gap) else gap


class Telling:
    """Introduces a run, tells its steps above a progress bar, and concludes."""

    def __init__(self, setup: Setup, device: torch.device, console: Console) -> None:
        self.setup = setup
        self.console = console
        self.begin = time.monotonic()
        self.group = f"{setup.world_size} zigzag ranks"
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("first step", total=len(setup.batches))
        self._introduce(device)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def tell(self, steps: Sequence[Step]) -> None:
        """After each step: the bar, and now and then a line that stays."""
        done, step = len(steps), steps[-1]
        self.progress.update(self.task, completed=done, description=f"loss {step.loss_alone:.4f} | {step.loss_together:.4f}")
        if done in (1, len(self.setup.batches)) or done % math.ceil(len(self.setup.batches) / LINES) == 0:
            self.console.print(
                f"{done:>5}  {step.loss_alone:>12.6f}  {step.loss_together:>15.6f}  "
                f"{step.loss_gap:>15.1e}  {step.gradient_gap:>20.1e}"
            )

    def conclude(self, outcome: Outcome) -> None:
        tokens = self.setup.sizes.tokens
        # The first step also pays for what is made once.
        steady = outcome.steps[1:] or outcome.steps
        table = Table(title="Largest difference", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("", "found", "bound", "", "where"):
            table.add_column(name, justify="right" if name in ("found", "bound") else "left")
        for finding in outcome.findings:
            table.add_row(
                finding.words, f"{finding.found:.1e}", f"{finding.bound:.0e}", _verdict(finding.passed), finding.where
            )
        self.console.print(table)
        self.console.print(
            "Losses in nats per byte; gradients as a share of the tensor's largest element. The bounds are of float32: one step's "
            "rounding, and what updates make of it.",
            style="dim",
        )
        alone = tokens / statistics.median(step.seconds_alone for step in steady)
        together = tokens / statistics.median(step.seconds_together for step in steady)
        threads = "" if self.setup.on_gpu else ", one thread each"
        self.console.print(
            f"tokens/s, forward and backward: {alone:,.0f} in one process, {together:,.0f} on {self.group}{threads}"
        )
        if not self.setup.on_gpu:
            self.console.print("On a CPU attention is Weft's reference; `weft check` runs the kernels here.", style="dim")
        self.console.print(f"picture: {self.setup.picture}", soft_wrap=True, markup=False)
        what = "both runs are one training" if outcome.passed else "the runs differ by more than rounding"
        self.console.print(f"{_verdict(outcome.passed)}  {what}  ({time.monotonic() - self.begin:.0f} s)")

    def _introduce(self, device: torch.device) -> None:
        setup, sizes = self.setup, self.setup.sizes
        documents = sum(len(batch.documents) for batch in setup.batches)
        self.console.print(
            f"[bold]{len(setup.batches)} batches of {sizes.tokens:,} tokens[/] (bytes), {documents} packed documents of "
            f"{escape(setup.batches[0].source)}"
        )
        self.console.print(
            f"a Llama of transformers: {sizes.layers} layers, {sizes.heads} query heads, {sizes.kv_heads} KV heads, head dim "
            f"{sizes.head_dim}, float32, random weights; AdamW"
        )
        where = torch.cuda.get_device_name(device) if setup.on_gpu else "CPU"
        self.console.print(
            f"one process with PyTorch's attention | {self.group} with Weft's, {setup.backend} ({where})", highlight=False
        )
        self.console.print(
            f"\n[bold]{'step':>5}  {'loss: alone':>12}  {'loss: ' + str(setup.world_size) + ' ranks':>15}  "
            f"{'loss difference':>15}  {'gradient difference':>20}[/]"
        )


def _verdict(passed: bool) -> str:
    return "[bold green]PASS[/]" if passed else "[bold red]FAIL[/]"
