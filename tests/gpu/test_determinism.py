"""Equal inputs give equal bits: results and gradients, a thousand times."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import weft_attn as weft
from weft_attn.testing.cases import Case, make_inputs
from weft_attn.testing.compare import evaluate

DEVICE = torch.device("cuda")
MAIN = Case(size=301, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16)


@pytest.mark.parametrize(("name", "gradients"), [("packed", True), ("decode_16", False)])
def test_a_thousand_runs_are_equal_to_the_bit(name: str, gradients: bool) -> None:
    case = replace(MAIN, plan=name, sinks=True)
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)

    def run() -> list[torch.Tensor]:
        found = evaluate(
            lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, sinks=sinks, deterministic=True, return_lse=True),  # type: ignore[arg-type, return-value]
            x,
            gradients=gradients,
        )
        return [t for _, t in found.items()]

    first = run()
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        for one, other in zip(run(), first, strict=True):
            differing += (one != other).sum()
    assert int(differing) == 0


def test_another_load_on_the_gpu_changes_no_bit() -> None:
    """Programs are scheduled in another order when the machine is shared."""
    case = replace(MAIN, plan="zigzag_rank_1_of_3")
    plan = case.make_plan()
    x = make_inputs(case, plan, DEVICE)
    attention = lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, deterministic=True, return_lse=True)  # noqa: E731
    alone = evaluate(attention, x)
    noise = torch.randn(4096, 4096, device=DEVICE)
    side = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(side):
            noise @ noise
        for (name, a), (_, b) in zip(evaluate(attention, x).items(), alone.items(), strict=True):
            assert torch.equal(a, b), name
    torch.cuda.synchronize()


def test_a_new_plan_with_the_same_cells_changes_no_bit() -> None:
    case = replace(MAIN, plan="packed")
    x = make_inputs(case, case.make_plan(), DEVICE)
    outs = [weft.plan_attention(x.q, x.k, x.v, case.make_plan()) for _ in range(3)]
    assert all(torch.equal(out, outs[0]) for out in outs[1:])  # type: ignore[arg-type]
