"""Runs a function in several processes that form a process group, as the ranks of a job would, on one machine."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Loaded once by the server that ranks are forked from, instead of once in each rank. None of them starts a thread or a GPU.
_PRELOADED = ["torch", "torch.distributed", "weft_attn.distributed.context_parallel"]


class RankTraceback(Exception):
    """The traceback of a rank, as text; the cause of the error that is raised for it."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class _Setup:
    """What a process needs to become a rank: the function's module and its file, the environment, the group."""

    module: str
    source: str | None
    environment: dict[str, str]
    rank: int
    world_size: int
    backend: str
    store: str
    timeout: float


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """Call function(rank, world_size, *args) in `world_size` processes of one process group.

    Args:
        function: defined at the top of a module, so that a process finds it by name.
        args: copied to each process; results are copied back.
        timeout: seconds for the whole, and for each collective.
        backend: of the process group. With "nccl" rank r uses GPU r.

    Returns:
        What the ranks return, in rank order.

    Raises:
        TimeoutError: naming the ranks that did not finish. No process is left behind.
        Exception: what the first rank to fail raised, caused by a `RankTraceback`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    module = function.__module__
    source = getattr(sys.modules[module], "__file__", None)
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            setup = _Setup(module, source, dict(os.environ), rank, world_size, backend, str(Path(folder) / "store"), timeout)
            process = context.Process(target=_rank, args=(sender, setup, pickle.dumps((function, args))), daemon=True)
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            return _collect([receiver for _, receiver in ranks], time.monotonic() + timeout)
        finally:
            for process, receiver in ranks:
                receiver.close()
                process.join(timeout=0.5)
                process.kill()
                process.join()


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    """Every rank's result; raises the failure that came first: the others fail because of it."""
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = {rank: receiver for rank, receiver in enumerate(receivers) if rank not in results}
        if not wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"ranks {sorted(waiting)} of {len(receivers)} did not finish in time")
        failures = []
        # Asked again: whatever came before what has woken us is there too.
        for rank, receiver in waiting.items():
            if receiver.poll():
                outcome = _receive(rank, receiver)
                if isinstance(outcome, _Failure):
                    failures.append(outcome)
                else:
                    results[rank] = pickle.loads(outcome)
        if failures:
            first = min(failures, key=lambda failure: failure.time)
            raise first.error() from RankTraceback(f"rank {first.rank}:\n{first.traceback}")
    return [results[rank] for rank in range(len(receivers))]


def _receive(rank: int, receiver: Connection) -> bytes | _Failure:
    try:
        outcome: bytes | _Failure = receiver.recv()
    except EOFError:
        return _Failure(rank, time.monotonic(), b"", "it ended without a result")
    return outcome


@dataclass(frozen=True)
class _Failure:
    """What a rank raised: when (the machine's monotonic clock), pickled where that can be, and as text."""

    rank: int
    time: float
    pickled: bytes
    traceback: str

    def error(self) -> Exception:
        with suppress(Exception):
            error = pickle.loads(self.pickled)
            if isinstance(error, Exception):
                return error
        return RuntimeError(f"rank {self.rank} failed")


def _rank(sender: Connection, setup: _Setup, payload: bytes) -> None:
    os.environ.clear()
    os.environ.update(setup.environment)
    torch.set_num_threads(1)
    try:
        sender.send(pickle.dumps(_in_group(setup, payload)))
    except Exception as error:  # noqa: BLE001 (sent to the caller, who raises it)
        when, text, pickled = time.monotonic(), traceback.format_exc(), b""
        with suppress(Exception):
            pickled = pickle.dumps(error)
        # Before the group goes down, which makes the other ranks fail.
        # The caller may have gone already, with another rank's failure.
        with suppress(OSError):
            sender.send(_Failure(setup.rank, when, pickled, text))
    sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _in_group(setup: _Setup, payload: bytes) -> Any:
    _load_module(setup.module, setup.source)
    function, args = pickle.loads(payload)
    if setup.backend == "nccl":
        torch.cuda.set_device(setup.rank)
    dist.init_process_group(
        setup.backend,
        init_method=f"file://{setup.store}",
        rank=setup.rank,
        world_size=setup.world_size,
        timeout=timedelta(seconds=setup.timeout),
    )
    return function(setup.rank, setup.world_size, *args)


def _load_module(name: str, path: str | None) -> None:
    """Make a function's module known by its name, also where it is no package's: a test file."""
    if name in sys.modules or path is None or name == "__main__":
        return
    with suppress(ImportError):
        if importlib.util.find_spec(name) is not None:
            return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
