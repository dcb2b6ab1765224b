"""The training run of a group's ranks: the same steps in one process and under context parallelism, compared at each."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from rich.console import Console

from weft_attn.demo.options import Setup
from weft_attn.demo.picture import draw_run
from weft_attn.demo.report import Outcome, Step, Telling
from weft_attn.demo.training import Trainer, largest_difference
from weft_attn.distributed.context_parallel import ContextParallel


def run_group(setup: Setup, device: torch.device, local_ranks: int) -> bool:
    """Train on this rank; rank 0 also trains alone, compares, tells and draws. Returns rank 0's verdict, on every rank."""
    parallel = ContextParallel(layout="zigzag")
    outcome = train(setup, device, parallel, Console() if parallel.rank == 0 else None, local_ranks)
    verdict = torch.tensor([outcome is None or outcome.passed], dtype=torch.int32, device=device)
    dist.broadcast(verdict, src=0)
    return bool(verdict.item())


def train(
    setup: Setup, device: torch.device, parallel: ContextParallel, console: Console | None, local_ranks: int
) -> Outcome | None:
    """All steps. On rank 0 with its console: the run's outcome, told and drawn; on other ranks: None.

    The one process and the group take turns at every step, so that neither has the machine's cores to share with the other.
    """
    cores = os.cpu_count() or 1
    together = Trainer(setup.sizes, device, parallel)
    if console is None:
        torch.set_num_threads(max(1, cores // local_ranks))
        for batch in setup.batches:
            together.backward(batch)
            together.update()
        return None

    alone = Trainer(setup.sizes, device)
    steps: list[Step] = []
    with Telling(setup, device, console) as telling:
        for batch in setup.batches:
            torch.set_num_threads(cores)
            loss_alone, seconds_alone = alone.timed_backward(batch)
            torch.set_num_threads(max(1, cores // local_ranks))
            loss_together, seconds_together = together.timed_backward(batch)
            gap, where = largest_difference(together.gradients(), alone.gradients())
            steps.append(Step(loss_alone, loss_together, gap, where, seconds_alone, seconds_together))
            telling.tell(steps)
            alone.update()
            together.update()
    outcome = Outcome(tuple(steps))
    draw_run(setup, outcome)
    telling.conclude(outcome)
    return outcome
