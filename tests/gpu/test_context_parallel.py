"""Context parallelism over NCCL, one rank a GPU: results against the oracle, and the same bits again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import weft_attn as weft
from weft_attn.testing.cases import Case
from weft_attn.testing.parallel import ParallelCase, RankResults, assert_ranks_match_oracle, run_case
from weft_attn.testing.ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

LENGTHS = (301, 0, 1, 1023, 64)
MODEL = Case(heads=8, kv_heads=4, head_dim=128, dtype=torch.bfloat16)
CASES = [
    *(ParallelCase(layout, LENGTHS, MODEL) for layout in ("zigzag", "contiguous", "striped")),
    ParallelCase("zigzag", LENGTHS, Case(heads=8, kv_heads=4, head_dim=64, sinks=True, softcap=5.0), heads_per_group=1),
    ParallelCase("zigzag", LENGTHS, MODEL, window=(100, None), heads_per_group=1, keep_gathered=True),
    ParallelCase("zigzag", LENGTHS, MODEL, group_sizes=((1, 3), (1, 2, 1))),
    ParallelCase("contiguous", LENGTHS, MODEL, group_sizes=((1, 2, 1), (1, 2, 1)), keep_gathered=True),
    ParallelCase("zigzag", LENGTHS, MODEL, group_sizes=((1, 3), (1, 2, 1)), merged=True),
    ParallelCase("striped", LENGTHS, Case(heads=8, kv_heads=1, head_dim=128, head_dim_v=64, dtype=torch.float16)),
    ParallelCase("contiguous", (1,), MODEL),
    ParallelCase("zigzag", (3001,), MODEL, deterministic=False),
]


# Whose keys are gathered into symmetric memory: at once, in turn, and merged.
SYMMETRIC = [replace(case, symmetric_memory=True) for case in (CASES[0], CASES[3], CASES[7])]


def run_on_gpu(rank: int, world_size: int, cases: list[ParallelCase], has_copy_engines: bool) -> list[RankResults]:
    torch.backends.cuda.matmul.allow_tf32 = False
    device, group = torch.device("cuda", rank), None
    if has_copy_engines:
        options = dist.ProcessGroupNCCL.Options()
        options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO
        group = dist.new_group(list(range(world_size)), pg_options=options, device_id=device)
    return [run_case(case, device, group).to("cpu") for case in cases for _ in range(2)]


@pytest.mark.parametrize(
    ("cases", "has_copy_engines"),
    [(CASES, False), (SYMMETRIC, False), (SYMMETRIC, True)],
    ids=["ordinary memory", "symmetric memory", "copy engines"],
)
def test_ranks_on_gpus_match_the_oracle_and_repeat_their_bits(cases: list[ParallelCase], has_copy_engines: bool) -> None:
    found = list(zip(*run_ranks(run_on_gpu, 2, cases, has_copy_engines, backend="nccl", timeout=280), strict=True))
    for index, case in enumerate(cases):
        assert_ranks_match_oracle(case, found[2 * index])
        for first, second in zip(found[2 * index], found[2 * index + 1], strict=True):
            for (name, one), (_, other) in zip(first.results.items(), second.results.items(), strict=True):
                assert torch.equal(one, other) or not case.deterministic, f"{case}: {name}"


def without_multiprocessors(rank: int, world_size: int) -> list[str]:
    """What ran on this GPU besides attention's own kernels, in a forward whose gathers are to be the copy engines'."""
    from torch.profiler import ProfilerActivity, profile

    device = torch.device("cuda", rank)
    options = dist.ProcessGroupNCCL.Options()
    options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO
    group = dist.new_group(list(range(world_size)), pg_options=options, device_id=device)
    parallel = weft.ContextParallel(group, symmetric_memory=True)
    x = torch.randn(2048, 4, 128, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        for _ in range(2):
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                parallel.attention(x, x, x, [0, 4096])
                torch.cuda.synchronize()
    return [event.name for event in seen.events()]


def test_copy_engines_gather_where_the_group_asks_for_them() -> None:
    for names in run_ranks(without_multiprocessors, 2, backend="nccl", timeout=120):
        assert any("PtoP" in name for name in names), names
        assert not any("ncclDevKernel" in name or "spin" in name for name in names), names


def larger_and_larger(rank: int, world_size: int) -> tuple[list[bool], int]:
    """Whether windows that grow from call to call give the bits of ordinary memory, and how many there are in the end."""
    device = torch.device("cuda", rank)
    ordinary, symmetric = weft.ContextParallel(), weft.ContextParallel(symmetric_memory=True)
    equal = []
    for tokens in (512, 4096, 2048, 8192):
        leaf = torch.randn(tokens, 4, 128, dtype=torch.bfloat16, device=device).requires_grad_()
        found = []
        for parallel in (ordinary, symmetric):
            out = attention(parallel, leaf)
            found.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
        equal.append(all(torch.equal(*pair) for pair in zip(*found, strict=True)))
    assert symmetric._windows is not None
    return equal, len(symmetric._windows._windows[device])


def taken_by_two_streams(rank: int, world_size: int) -> list[bool]:
    """Whether two calls, one behind the other and on two streams, give the bits of ordinary memory: they take the same window."""
    device = torch.device("cuda", rank)
    ordinary, symmetric = weft.ContextParallel(), weft.ContextParallel(symmetric_memory=True)
    xs = [torch.randn(16384, 4, 128, dtype=torch.bfloat16, device=device) for _ in range(2)]
    with torch.no_grad():
        expected = [attention(ordinary, x) for x in xs]
        # A window that is large enough from here on: making one waits for everything.
        attention(symmetric, xs[0])
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            first = attention(symmetric, xs[0])
        second = attention(symmetric, xs[1])
        torch.cuda.synchronize(device)
    return [torch.equal(*pair) for pair in zip(expected, (first, second), strict=True)]


def attention(parallel: weft.ContextParallel, x: torch.Tensor) -> torch.Tensor:
    out = parallel.attention(x, x, x, [0, parallel.world_size * len(x)], deterministic=True)
    assert isinstance(out, torch.Tensor)
    return out


def test_windows_grow() -> None:
    # The third call fits the second one's, the fourth needs one more.
    assert run_ranks(larger_and_larger, 2, backend="nccl", timeout=120) == [([True] * 4, 3)] * 2


def test_streams_take_a_window_one_after_the_other() -> None:
    assert run_ranks(taken_by_two_streams, 2, backend="nccl", timeout=120) == [[True, True]] * 2
