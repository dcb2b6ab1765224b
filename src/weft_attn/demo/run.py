"""The training run of a group's ranks: the same steps in one process and under context parallelism, compared at each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from rich.console import Console

from weft_attn.demo.options import Setup
from weft_attn.demo.picture import draw_run
from weft_attn.demo.report import Outcome, Step, Telling
from weft_attn.demo.training import Trainer, largest_difference
from weft_attn.distributed.context_parallel import ContextParallel


def run_group(setup: Setup, device: torch.device) -> bool:
    """Train on this rank; rank 0 also trains alone, compares, tells and draws. Returns rank 0's verdict, on every rank."""
    # One thread a process: ranks that share cores would wait for each other's threads.
    torch.set_num_threads(1)
    # The bounds are of float32: products must not be of fewer bits, whatever the environment prefers on a GPU.
    torch.set_float32_matmul_precision("highest")
    parallel = ContextParallel(layout="zigzag")
    passed = True
    if parallel.rank == 0:
        telling = Telling(setup, device, Console())
        outcome = train_and_compare(setup, device, parallel, telling)
        draw_run(setup, outcome)
        telling.conclude(outcome)
        passed = outcome.passed
    else:
        together = Trainer(setup.sizes, device, parallel)
        for batch in setup.batches:
            together.backward(batch)
            together.update()
    verdict = torch.tensor(passed, dtype=torch.int32, device=device)
    dist.broadcast(verdict, src=0)
    return bool(verdict.item())


def train_and_compare(setup: Setup, device: torch.device, parallel: ContextParallel, telling: Telling) -> Outcome:
    """All steps in this process and as a rank of the group, told on a console.

    The one process and the group take turns at every step, so that neither has the machine's cores to share with the other.
    """
    alone, together = Trainer(setup.sizes, device), Trainer(setup.sizes, device, parallel)
    steps: list[Step] = []
    with telling:
        for batch in setup.batches:
            loss_alone, seconds_alone = alone.timed_backward(batch)
            loss_together, seconds_together = together.timed_backward(batch)
            gap, where = largest_difference(together.gradients(), alone.gradients())
            steps.append(Step(loss_alone, loss_together, gap, where, seconds_alone, seconds_together))
            telling.tell(steps)
            alone.update()
            together.update()
    return Outcome(tuple(steps))
