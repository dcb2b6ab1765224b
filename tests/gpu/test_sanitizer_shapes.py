"""A few small shapes that go through every kernel, with nothing else on the GPU.

A test, and a script to run under a memory checker:

    compute-sanitizer --tool memcheck python tests/gpu/test_sanitizer_shapes.py
    compute-sanitizer --tool synccheck python tests/gpu/test_sanitizer_shapes.py
    compute-sanitizer --tool racecheck python tests/gpu/test_sanitizer_shapes.py
    compute-sanitizer --tool synccheck python tests/gpu/test_sanitizer_shapes.py 20 head_dim=256    (20 times those of this name)
"""

from __future__ import annotations

import math
import sys

import pytest
import torch

import weft_attn as weft
from weft_attn.launch import HopperForwardConfig, override
from weft_attn.launch.device import device_of
from weft_attn.launch.select import FORWARD_KERNELS, Problem, select_first, select_fused
from weft_attn.testing.cases import Case, make_inputs
from weft_attn.testing.compare import evaluate

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
    """Once as selection says, and once with Hopper's forward and fused backward where they serve: selection leaves them few rows."""
    problem, device = Problem(case.head_dim, case.dim_v, case.dtype.itemsize * 8), device_of(torch.device("cuda"))
    choice, fused = select_first(FORWARD_KERNELS, problem, device), select_fused(problem, device, math.inf)
    launch(case)
    if isinstance(choice.config, HopperForwardConfig) and fused:
        with override(choice.config, fused.config):
            launch(case)


def launch(case: Case) -> None:
    plan = case.make_plan()
    inputs = make_inputs(case, plan, "cuda")
    found = evaluate(
        lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, sinks=sinks, return_lse=True, **case.options),  # type: ignore[arg-type, return-value]
        inputs,
    )
    torch.cuda.synchronize()
    broken = {name: where_nan(tensor) for name, tensor in found.items() if tensor.isnan().any()}
    assert not broken, f"NaN of {case}: {broken}"


def where_nan(tensor: torch.Tensor) -> str:
    """How many, and the rows, heads and columns between which they lie: what tells one lost tile from all of them."""
    places = tensor.isnan().nonzero()
    return f"{len(places)} of {tensor.numel()}, from {places.amin(0).tolist()} to {places.amax(0).tolist()}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_for_the_sanitizer_run(case: Case) -> None:
    run(case)


if __name__ == "__main__":
    repeats, wanted = int((sys.argv[1:2] or ["1"])[0]), (sys.argv[2:3] or [""])[0]
    for each in (one for one in CASES if wanted in str(one)):
        for _ in range(repeats):
            run(each)
        print("ran", each, flush=True)  # noqa: T201
