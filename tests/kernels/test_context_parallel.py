"""Two ranks whose attention runs the kernels, on gathered buffers whose padding holds NaN."""

from __future__ import annotations

import torch

from weft_attn.ops import kernels_interpreted
from weft_attn.testing.cases import Case
from weft_attn.testing.interpreter import quick_interpreter
from weft_attn.testing.parallel import ParallelCase, RankResults, assert_ranks_match_oracle, run_case
from weft_attn.testing.ranks import run_ranks

# An odd number of tokens: one rank has more rows than the other.
LENGTHS = (7, 0, 1, 9)
CASES = [
    ParallelCase(lengths=LENGTHS, attention=Case(heads=4, kv_heads=2, head_dim_v=24, sinks=True), heads_per_group=1),
    ParallelCase(
        "striped", lengths=LENGTHS, attention=Case(heads=4, kv_heads=2, softcap=2.0, dtype=torch.float16), window=(4, None)
    ),
    ParallelCase("contiguous", lengths=LENGTHS, attention=Case(heads=2, kv_heads=1), keep_gathered=True),
    # Rank 0 has no row: it computes gradients of keys that only others see.
    ParallelCase("contiguous", lengths=(1,)),
]


def run_kernels(rank: int, world_size: int) -> list[RankResults]:
    assert kernels_interpreted()
    with quick_interpreter():
        return [run_case(case) for case in CASES]


def test_kernels_read_gathered_buffers_and_never_their_padding() -> None:
    for case, ranks in zip(CASES, zip(*run_ranks(run_kernels, 2), strict=True), strict=True):
        assert len({len(rank.positions) for rank in ranks}) == 2, "one rank's part is padded"
        assert_ranks_match_oracle(case, ranks)
