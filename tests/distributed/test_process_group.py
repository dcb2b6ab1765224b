"""A process group ends with its program: no thread of it is left that the interpreter could go down under."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weft_attn.distributed.process_group import process_group
from weft_attn.errors import Unsupported

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(not TASKS.exists(), reason="threads are found by name where Linux lists them")

PROLOGUE = """
import os
import time
from pathlib import Path
import torch
import weft_attn as weft

def name_of(task):
    try:
        return (task / "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        # It has ended since it was listed.
        return ""

def threads():
    return sorted(name for name in map(name_of, Path("/proc/self/task").iterdir()) if "gloo" in name)

def become(running):
    # A thread has its name a moment after it has started, and is listed a moment after it was joined.
    patience = time.monotonic() + 10
    while bool(threads()) != running and time.monotonic() < patience:
        time.sleep(0.01)
    assert bool(threads()) == running, threads()

def attend():
    cp = weft.ContextParallel()
    x = torch.ones(4, 2, 16)
    cp.attention(x, x, x, [0, 4])
    return cp
"""

# As a user writes it: whatever brings torch._dynamo comes after the group, ContextParallel among it.
PLAIN = """
import torch.distributed as dist
dist.init_process_group("gloo")
become(running=True)
attend()
import torch._dynamo
import torch.distributed.fsdp
dist.destroy_process_group()
become(running=False)
"""

# As the library's own programs do; an object that holds the group is part of a cycle.
OWN = """
from weft_attn.distributed.process_group import process_group
with process_group(torch.device("cpu")):
    become(running=True)
    cp = attend()
    cp.itself = cp
    del cp
become(running=False)
"""


@pytest.mark.parametrize("program", [PLAIN, OWN], ids=["a user's", "its own"])
def test_no_thread_is_left_when_the_group_has_ended(program: str) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + program], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


FAILS = """
from weft_attn.distributed.process_group import process_group
import torch.distributed as dist
try:
    with process_group(torch.device("cpu")):
        raise ValueError("planted")
except ValueError:
    assert dist.is_initialized()
    os._exit(0)
"""


def test_a_rank_that_fails_leaves_the_group_up() -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + FAILS], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_copy_engines_are_refused_before_a_group_is_made_where_pytorch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed, "ProcessGroupNCCL", raising=False)
    with (
        pytest.raises(Unsupported, match=r"expected PyTorch 2\.11 or newer with NCCL"),
        process_group(torch.device("cuda", 0), copy_engines=True),
    ):
        pass
    assert not torch.distributed.is_initialized()
