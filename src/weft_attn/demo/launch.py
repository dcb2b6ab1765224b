"""Starts the demo's processes with torch's own launcher; what each of them does.

`torchrun ... -m weft_attn.demo` starts the same function on any number of machines.
"""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from weft_attn.demo.options import Options, Setup
from weft_attn.errors import require


class RankFailed(RuntimeError):
    """A rank raised, or died, and the launcher has ended the others."""


def run_demo(options: Options) -> bool:
    """Train in one process and on the ranks of a group, and compare. Returns whether every difference is within its bound.

    In a process that torchrun started, this is one rank of torchrun's group. Elsewhere it starts the ranks.

    Raises:
        InvalidInput, Unsupported: as `Setup.of`, before any process starts.
        RankFailed: with the traceback of the rank.
    """
    if dist.is_torchelastic_launched():
        return train_rank(options)
    setup = Setup.of(options)
    # The launcher logs what RankFailed says again.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=setup.world_size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            verdicts = elastic_launch(config, train_rank)(options)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise RankFailed(f"rank {rank} failed: {_told(failure)}") from None
    return all(verdicts.values())


def train_rank(options: Options) -> bool:
    """What one process of the group does; every rank returns the same verdict."""
    group_size, local_ranks = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    require(
        options.world_size in (None, group_size),
        "the launcher decides how many ranks there are",
        expected=group_size,
        given=options.world_size,
    )
    setup = Setup.of(replace(options, world_size=group_size), local_ranks=local_ranks)
    # Late: the process that only starts the others does without transformers.
    from weft_attn.demo.run import run_group

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if setup.on_gpu else torch.device("cpu")
    if setup.on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(setup.backend)
    passed = run_group(setup, device, local_ranks)
    # Not after an error: the others would then fail too, and hide the rank that failed first.
    dist.destroy_process_group()
    return passed


def _told(failure: ProcessFailure) -> str:
    """A rank's traceback; where it left none, how it ended."""
    message = failure.message
    if isinstance(message, dict):
        message = message.get("extraInfo", {}).get("py_callstack") or message.get("message", "")
    return str(message) or f"exit code {failure.exitcode}"
