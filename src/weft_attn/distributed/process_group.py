"""The process group of a program of Weft's own: its start, and an end after which no thread of it is left."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from weft_attn.errors import Unsupported


def own_device(on_gpu: bool) -> torch.device:
    """The device of this process of a job that `torchrun`, or torch's launcher, has started."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")


def backend_of(on_gpu: bool) -> str:
    """What the ranks of such a job talk through."""
    return "nccl" if on_gpu else "gloo"


@contextlib.contextmanager
def process_group(device: torch.device, *, copy_engines: bool = False) -> Iterator[None]:
    """The default process group of such a job.

    Args:
        device: this process's own.
        copy_engines: ask NCCL for collectives without multiprocessors, where it has them; on a GPU.

    Raises:
        Unsupported: copy_engines of a PyTorch that cannot ask.
    """
    on_gpu = device.type == "cuda"
    options = None
    if copy_engines:
        # Builds without GPUs do not have it.
        nccl: Any = getattr(dist, "ProcessGroupNCCL", None)
        if not hasattr(nccl, "NCCL_CTA_POLICY_ZERO"):
            raise Unsupported(f"copy engines gather: expected PyTorch 2.11 or newer with NCCL, given {torch.__version__}")
        options = nccl.Options()
        options.config.cta_policy = nccl.NCCL_CTA_POLICY_ZERO
    if on_gpu:
        torch.cuda.set_device(device)
    # With its device, a group of GPUs connects here, where a rank that cannot says so, not in the first collective.
    dist.init_process_group(backend_of(on_gpu), device_id=device if on_gpu else None, pg_options=options)
    yield
    # Not where a rank fails: it would wait for the others, or make them fail too and hide the one that failed first.
    # What still holds the group keeps its threads alive, and one that ends a collective while the interpreter goes down aborts the
    # process. References in cycles go here.
    gc.collect()
    dist.destroy_process_group()
