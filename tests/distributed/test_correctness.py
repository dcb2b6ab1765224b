"""Results and all gradients of all ranks against the oracle on one process: every layout, every feature, 1 to 4 processes."""

from __future__ import annotations

import random
from functools import lru_cache

import pytest
import torch

from weft_attn.plan.layouts import LAYOUTS
from weft_attn.testing.cases import Case
from weft_attn.testing.parallel import LENGTHS, ParallelCase, RankResults, assert_ranks_match_oracle, run_cases
from weft_attn.testing.ranks import run_ranks

GQA = Case(heads=6, kv_heads=3)
EVERYTHING = Case(heads=8, kv_heads=4, head_dim=24, head_dim_v=40, softcap=2.0, softmax_scale=0.3, sinks=True)


def random_case(seed: int) -> ParallelCase:
    """Lengths, mask, heads and groups that nobody thought of."""
    draw = random.Random(seed)
    return ParallelCase(
        draw.choice(sorted(LAYOUTS)),
        lengths=tuple(draw.choice((0, 1, 2, draw.randrange(40))) for _ in range(draw.randrange(1, 6))),
        attention=Case(heads=4, kv_heads=draw.choice((1, 2, 4)), head_dim_v=24, sinks=draw.random() < 0.5, seed=seed),
        causal=draw.random() < 0.7,
        window=draw.choice((None, (draw.randrange(12), None), (draw.randrange(12), draw.randrange(12)))),
        heads_per_group=draw.choice((None, 1, 2)),
        keep_gathered=draw.random() < 0.3,
    )


CASES = [
    *(random_case(seed) for seed in range(15)),
    *(
        case
        for layout in sorted(LAYOUTS)
        for case in (
            ParallelCase(layout, attention=GQA),
            ParallelCase(layout, attention=EVERYTHING, window=(9, None)),
            ParallelCase(layout, attention=EVERYTHING, heads_per_group=1),
            ParallelCase(layout, attention=EVERYTHING, heads_per_group=1, keep_gathered=True),
            # Uneven groups, a small one first, last, both, or none; others in the forward than in the backward.
            ParallelCase(layout, attention=EVERYTHING, group_sizes=((1, 3), (1, 2, 1))),
            ParallelCase(layout, attention=EVERYTHING, group_sizes=((1, 1, 2), (3, 1)), window=(9, None)),
            ParallelCase(layout, attention=EVERYTHING, group_sizes=((1, 2, 1), (1, 2, 1)), keep_gathered=True),
            ParallelCase(layout, attention=EVERYTHING, group_sizes=((1, 3), (1, 3)), keep_gathered=True),
            ParallelCase(layout, attention=EVERYTHING, group_sizes=((1, 3), (1, 2, 1)), merged=True),
            ParallelCase(layout, attention=EVERYTHING, group_sizes=((1, 3), (1, 1, 2)), merged=True, keep_gathered=True),
            ParallelCase(layout, attention=EVERYTHING, group_sizes=((1, 2, 1), (0, 3, 1)), merged=True, window=(9, None)),
            ParallelCase(layout, attention=EVERYTHING, group_sizes=((4,), (2, 2))),
            ParallelCase(layout, attention=EVERYTHING, group_sizes=((1, 3), (1, 2, 1)), merged=True, symmetric_memory=True),
            ParallelCase(layout, attention=EVERYTHING, heads_per_group=1, symmetric_memory=True),
            ParallelCase(layout, attention=GQA, causal=False, window=(5, 7)),
            ParallelCase(layout, attention=GQA, causal=False, heads_per_group=2, keep_gathered=True),
            # One KV head, fewer than ranks.
            ParallelCase(layout, attention=Case(heads=4, kv_heads=1, sinks=True)),
            ParallelCase(layout, attention=Case(heads=4, kv_heads=4, dtype=torch.bfloat16, lse_gradient=False)),
            ParallelCase(layout, attention=Case(heads=4, kv_heads=2, dtype=torch.float16, head_dim_v=8), window=(0, 3)),
            # Documents too short for some ranks, which have no row at all.
            ParallelCase(layout, lengths=(1,), attention=Case(sinks=True)),
            ParallelCase(layout, lengths=(0, 3, 0)),
            ParallelCase(layout, lengths=(1, 1, 1, 2)),
            ParallelCase(layout, lengths=(0, 0)),
            ParallelCase(layout, lengths=()),
            ParallelCase(layout, lengths=(64,), window=(0, 0)),
        )
    ),
]


@lru_cache
def computed(world_size: int) -> list[list[RankResults]]:
    """Of each case all ranks' results; all cases in one spawn."""
    return list(zip(*run_ranks(run_cases, world_size, CASES), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_ranks_together_match_the_oracle(world_size: int) -> None:
    for case, ranks in zip(CASES, computed(world_size), strict=True):
        try:
            assert_ranks_match_oracle(case, ranks)
        except AssertionError as error:
            raise AssertionError(f"{case} on {world_size} ranks: {error}") from error


def test_the_cases_have_ranks_without_rows() -> None:
    assert LENGTHS.count(0)
    rows = [[len(rank.positions) for rank in ranks] for ranks in computed(4)]
    assert any(min(counts) == 0 < max(counts) for counts in rows)
