"""A few small shapes that go through every kernel, with nothing else on the GPU, and NaN in memory and in shared memory before.

A test, and a script to run under a memory checker:

    compute-sanitizer --tool memcheck python tests/gpu/test_sanitizer_shapes.py
    compute-sanitizer --tool synccheck python tests/gpu/test_sanitizer_shapes.py
    compute-sanitizer --tool racecheck python tests/gpu/test_sanitizer_shapes.py
    compute-sanitizer --tool synccheck python tests/gpu/test_sanitizer_shapes.py 20 head_dim=256    (20 times those of this name)
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

import weft_attn as weft
from weft_attn.launch import HopperForwardConfig, override
from weft_attn.launch.device import device_of
from weft_attn.launch.select import FORWARD_KERNELS, Problem, select_first, select_fused
from weft_attn.testing.cases import Case, make_inputs
from weft_attn.testing.compare import evaluate
from weft_attn.testing.memory import memory_of_nan
from weft_attn.testing.shared_memory import BYTES, fill_shared_memory

CASES = [
    Case(plan="packed", size=101, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16),
    Case(plan="zigzag_padded", size=101, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, sinks=True, softcap=2.0),
    Case(plan="causal_more_rows", size=101, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16),
    Case(plan="packed", size=101, heads=8, kv_heads=2, head_dim=256, dtype=torch.bfloat16),
    Case(plan="packed", size=101, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16),
    Case(plan="concat", size=61, heads=4, kv_heads=2, head_dim=80, dtype=torch.float16),
    Case(plan="odd", heads=2, kv_heads=1, head_dim=64, dtype=torch.float32),
    Case(plan="window_both", size=61, heads=2, kv_heads=1, head_dim=192, head_dim_v=128, dtype=torch.bfloat16),
    Case(plan="decode_16", size=301, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, sinks=True),
    Case(plan="decode_batch", size=101, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16),
    Case(plan="unseen", size=61, heads=2, kv_heads=1, head_dim=24, dtype=torch.float16),
]


def run(case: Case) -> None:
    """Once as selection says, and with Hopper's forward, in pairs and alone, and fused backward where they serve: selection leaves them few rows."""
    device = device_of(torch.device("cuda"))
    problem = Problem(case.head_dim, case.dim_v, case.dtype.itemsize * 8, group=case.heads // case.kv_heads)
    choice, fused = select_first(FORWARD_KERNELS, problem, device), select_fused(problem, device)
    alone = select_first(FORWARD_KERNELS, replace(problem, group=1), device)
    launch(case)
    if isinstance(choice.config, HopperForwardConfig) and fused:
        for forward in dict.fromkeys((choice.config, alone.config)):
            with override(forward, fused.config):
                launch(case)


def launch(case: Case) -> None:
    plan = case.make_plan()
    inputs = make_inputs(case, plan, "cuda")

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        leave_nan()
        out, lse = weft.plan_attention(q, k, v, plan, sinks=sinks, return_lse=True, **case.options)  # type: ignore[arg-type, misc]
        # Before the backward's first kernel.
        out.register_hook(leave_nan)
        return out, lse

    found = evaluate(attention, inputs)
    torch.cuda.synchronize()
    broken = {name: where_nan(tensor) for name, tensor in found.items() if tensor.isnan().any()}
    assert not broken, f"NaN of {case}: {broken}"


def leave_nan(_gradient: torch.Tensor | None = None) -> None:
    """NaN for the next kernel to find, where shared memory is as large as Hopper's."""
    device = torch.device("cuda", torch.cuda.current_device())
    if device_of(device).shared_memory >= BYTES:
        assert fill_shared_memory(device).isnan().all()
        # Again: what looked at it took some for itself.
        fill_shared_memory(device)


def where_nan(tensor: torch.Tensor) -> str:
    """How many, and which indices they have in each dimension: one tile, one warp's rows, half of the columns, or all."""
    places = tensor.isnan().nonzero()
    return f"{len(places)} of {tensor.numel()}, at " + " x ".join(_ranges(column.unique().tolist()) for column in places.T)


def _ranges(numbers: list[int]) -> str:
    """Rising numbers as "0-63, 70"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return "(" + ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in found) + ")"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_for_the_sanitizer_run(case: Case) -> None:
    run(case)


if __name__ == "__main__":
    repeats, wanted = int((sys.argv[1:2] or ["1"])[0]), (sys.argv[2:3] or [""])[0]
    for each in (one for one in CASES if wanted in str(one)):
        for _ in range(repeats):
            with memory_of_nan():
                run(each)
        print("ran", each, flush=True)  # noqa: T201
