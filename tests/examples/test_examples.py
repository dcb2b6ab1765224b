"""The examples run as they stand, and train as one process does on any number of processes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weft_attn.testing.ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 4


def log_of(rank: int, world_size: int, path: str) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = runpy.run_path(path)["train"](torch.device("cpu"), STEPS)
    return found


def run_file(*arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "world_size"), [("plain_pytorch", 3), ("transformers_llama", 2), ("fsdp2_context_parallel", 4)]
)
def test_ranks_train_as_one_process_does(name: str, world_size: int) -> None:
    path = str(EXAMPLES / f"{name}.py")
    (alone,) = run_ranks(log_of, 1, path)
    assert len(alone) == STEPS
    assert alone[-1][0] < alone[0][0], "it learns"
    # Later steps are of parameters that all gradients have moved; a norm shows a mean where the sum is due, which AdamW hides.
    for log in run_ranks(log_of, world_size, path):
        for ours, theirs in zip(log, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_an_example_starts_under_torchrun() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    lines = run_file(*launcher, EXAMPLES / "plain_pytorch.py").splitlines()
    assert len(lines) == 20
    assert ": 2 ranks, " in lines[-1]


def test_the_first_example_needs_no_group() -> None:
    assert "a document in a batch is as it is alone" in run_file(EXAMPLES / "packed_documents.py")


def test_every_example_is_tested_and_listed() -> None:
    tested = {"plain_pytorch", "transformers_llama", "fsdp2_context_parallel", "packed_documents"}
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in tested
        assert path.name in listed
