"""Starts the demo's processes with torch's own launcher; what each of them does.

`torchrun ... -m weft_attn.demo` starts the same function on any number of machines.
"""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from weft_attn.demo.options import Options, Setup
from weft_attn.distributed.process_group import own_device, process_group
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
    return all(start_ranks(train_rank, Setup.of(options).world_size, options))


def start_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call function(*args) in processes of this machine, started and watched as torchrun does.

    Args:
        function: found by name in each process, where RANK, WORLD_SIZE, MASTER_ADDR and so on say who it is.

    Returns:
        What the ranks return, in rank order.

    Raises:
        RankFailed: a rank raised, or died; the others have been ended.
    """
    # The launcher logs what RankFailed says again.
    for name in logging.root.manager.loggerDict:
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            results = elastic_launch(config, function)(*args)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise RankFailed(f"rank {rank} failed: {_told(failure)}") from None
    return [results[rank] for rank in range(world_size)]


def train_rank(options: Options) -> bool:
    """What one process of the group does; every rank returns the same verdict."""
    rank, group_size, local_ranks = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    require(
        options.world_size in (None, group_size),
        "the launcher decides how many ranks there are",
        expected=group_size,
        given=options.world_size,
    )
    setup = Setup.of(replace(options, world_size=group_size), local_ranks=local_ranks, draws=rank == 0)
    # Late: the process that only starts the others does without transformers.
    from weft_attn.demo.run import run_group

    device = own_device(setup.on_gpu)
    with process_group(device):
        return run_group(setup, device)


def _told(failure: ProcessFailure) -> str:
    """A rank's traceback; where it left none, how it ended."""
    message = failure.error_file_data["message"]
    traceback = message.get("extraInfo", {}).get("py_callstack") if isinstance(message, dict) else None
    return traceback or failure.message
