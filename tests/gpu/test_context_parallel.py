"""Context parallelism over NCCL, one rank a GPU: results against the oracle, and the same bits again."""

from __future__ import annotations

import pytest
import torch

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


def run_on_gpu(rank: int, world_size: int) -> list[RankResults]:
    torch.backends.cuda.matmul.allow_tf32 = False
    return [run_case(case, torch.device("cuda", rank)).to("cpu") for case in CASES for _ in range(2)]


def test_ranks_on_gpus_match_the_oracle_and_repeat_their_bits() -> None:
    found = list(zip(*run_ranks(run_on_gpu, 2, backend="nccl", timeout=280), strict=True))
    for index, case in enumerate(CASES):
        assert_ranks_match_oracle(case, found[2 * index])
        for first, second in zip(found[2 * index], found[2 * index + 1], strict=True):
            for (name, one), (_, other) in zip(first.results.items(), second.results.items(), strict=True):
                assert torch.equal(one, other) or not case.deterministic, f"{case}: {name}"
