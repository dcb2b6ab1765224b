"""The process group of a program of Weft's own: its start, and an end after which no thread of it is left."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


def own_device(on_gpu: bool) -> torch.device:
    """The device of this process of a job that `torchrun`, or torch's launcher, has started."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The default process group of such a job: NCCL on GPUs, gloo on the CPU.

    Args:
        device: this process's own.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # With its device, a group connects here, where a rank that cannot says so, not in the first collective.
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    yield
    # Not where a rank fails: it would wait for the others, or make them fail too and hide the one that failed first.
    # What still holds the group keeps its threads alive, and one that ends a collective while the interpreter goes down aborts the
    # process. References in cycles go here.
    gc.collect()
    dist.destroy_process_group()
