"""The oracle, and the tolerance policy that leans on it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import weft_attn as weft
from weft_attn import Plan, Slice
from weft_attn import reference as reference_module
from weft_attn.reference import reference_attention, reference_gradients
from weft_attn.testing.cases import PLANS, Case, make_inputs
from weft_attn.testing.compare import (
    Results,
    assert_close_to_oracle,
    assert_matches_oracle,
    baselines_of,
    blockwise,
    budget,
    evaluate,
    oracle_of,
    rounding_band,
    unit_roundoff,
)


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float, softcap: float, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, key by key, in Python floats."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out, lse = torch.zeros(q.shape[0], heads, v.shape[2]), torch.full((heads, q.shape[0]), -math.inf)
    mask = plan.to_mask()
    for i in range(q.shape[0]):
        for h in range(heads):
            keys = mask[i].nonzero()[:, 0].tolist()
            scores = [scale * float(q[i, h].double() @ k[j, h // group].double()) for j in keys]
            if softcap:
                scores = [softcap * math.tanh(s / softcap) for s in scores]
            total = sum(math.exp(s) for s in scores) + (0.0 if sinks is None else math.exp(float(sinks[h])))
            if total > 0:
                lse[h, i] = math.log(total)
            for j, s in zip(keys, scores, strict=True):
                out[i, h] += math.exp(s) / total * v[j, h // group]
    return out, lse


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["packed_unequal", "zigzag_padded", "unseen"])
def test_the_reference_is_the_definition(name: str, sinks: bool, softcap: float) -> None:
    case = Case(plan=name, size=13, heads=4, kv_heads=2, head_dim=8, head_dim_v=16, softcap=softcap, sinks=sinks)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    out, lse = reference_attention(x.q, x.k, x.v, plan, softcap=softcap, sinks=x.sinks)
    expected_out, expected_lse = by_definition(x.q, x.k, x.v, plan, 8**-0.5, softcap, x.sinks)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["full", "causal", "window_both", "packed", "prefix_lm", "shared_prefix"])
def test_the_reference_agrees_with_pytorchs_attention(name: str) -> None:
    case = Case(plan=name, heads=4, kv_heads=4, head_dim=24, head_dim_v=40)
    plan = case.make_plan()
    x = make_inputs(case, plan)

    def sdpa(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        moved = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(*moved, attn_mask=plan.to_mask())[0].transpose(0, 1)
        return out, torch.zeros(q.shape[1], q.shape[0], dtype=q.dtype)

    inputs = replace(x, dlse=None)
    ours, theirs = oracle_of(case, plan, inputs), evaluate(sdpa, inputs, dtype=torch.float64)
    for tensor in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(ours, tensor), getattr(theirs, tensor), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_of_the_reference_are_its_derivatives(softcap: float) -> None:
    plan = Plan([Slice(0, 4, 0, 3, hi=0), Slice(2, 3, 3, 4)], 6, 8)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 4, dtype=torch.float64, generator=generator) for n, h in ((6, 2), (8, 1), (8, 1)))
    sinks = torch.randn(2, dtype=torch.float64, generator=generator)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reference_attention(*tensors[:3], plan, softcap=softcap, sinks=tensors[3])  # type: ignore[misc]

    assert torch.autograd.gradcheck(function, leaves)


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(plan="zigzag_rank_1_of_2", sinks=True)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    whole = oracle_of(case, plan, x)
    monkeypatch.setattr(reference_module, "MAX_BLOCK_SCORES", 100)
    for (name, one), (_, other) in zip(whole.items(), oracle_of(case, plan, x).items(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_that_sees_nothing_gives_zero_and_the_log_of_its_denominator(sinks: bool) -> None:
    # Rows in no slice, and rows in a slice whose band leaves them no key.
    plan = Plan([Slice(2, 5, 0, 3, hi=-2)], 9, 4)
    case = Case(sinks=sinks)
    x = make_inputs(case, plan)
    out, lse = reference_attention(x.q, x.k, x.v, plan, sinks=x.sinks)
    blind = ~plan.to_mask().any(dim=1)
    assert blind.tolist() == [True] * 4 + [False] * 3 + [True] * 2
    assert (out[blind] == 0).all()
    expected = torch.full((2,), -math.inf) if x.sinks is None else x.sinks
    assert (lse[:, blind] == expected[:, None]).all()
    assert lse[:, ~blind].isfinite().all()


def test_a_sink_joins_the_denominator_and_lse() -> None:
    plan = Plan.dense(1, 1, 1)
    q = k = torch.zeros(1, 1, 8)
    out, lse = reference_attention(q, k, torch.ones(1, 1, 8), plan, sinks=torch.tensor([math.log(3.0)]))
    torch.testing.assert_close(out, torch.full((1, 1, 8), 0.25))
    torch.testing.assert_close(lse, torch.tensor([[math.log(4.0)]]))


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    case = Case(plan="causal_more_rows")
    plan = case.make_plan()
    x = make_inputs(case, plan)
    without = reference_attention(x.q, x.k, x.v, plan)
    out, lse = reference_attention(x.q, x.k, x.v, plan, sinks=torch.full((2,), -math.inf))
    assert torch.equal(out, without[0])
    assert torch.equal(lse, without[1])


def test_autocast_does_not_touch_the_arithmetic() -> None:
    """Its products would be bf16's: CPU tensors run the reference, also inside a mixed-precision step."""
    plan = Plan.from_cu_seqlens([0, 5, 12], [0, 5, 12], causal=True)
    x = make_inputs(Case(heads=4, kv_heads=2), plan)
    leaves = [x.q, x.k, x.v]

    def everything() -> list[torch.Tensor]:
        out, lse = reference_attention(*leaves, plan)
        grads = reference_gradients(out, None, *leaves, plan, softmax_scale=0.3, softcap=0.0, sinks=None)
        dense = weft.varlen_attention(*(t.clone().requires_grad_() for t in leaves), [0, 5, 12], [0, 5, 12])
        return [out, lse, *grads[:3], dense]

    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = everything()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not torch.is_autocast_enabled("cpu")


def test_the_reference_computes_in_the_dtype_it_is_asked_for() -> None:
    case = Case(plan="causal", dtype=torch.bfloat16)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    exact = oracle_of(case, plan, x)
    errors = {}
    for compute in (torch.bfloat16, torch.float32, torch.float64):
        out, lse = reference_attention(x.q.double(), x.k.double(), x.v.double(), plan, compute_dtype=compute)
        assert lse.dtype == (torch.float64 if compute == torch.float64 else torch.float32)
        errors[compute] = float((out - exact.out).norm() / exact.out.norm())
    assert errors[torch.bfloat16] > 1e-3
    assert 1e-9 < errors[torch.float32] < 1e-6
    assert errors[torch.float64] < 1e-12


@pytest.mark.parametrize("name", PLANS)
def test_attention_by_blocks_in_float64_is_the_reference(name: str) -> None:
    case = Case(plan=name, size=24, heads=4, kv_heads=2, head_dim=8, head_dim_v=16, softcap=2.0, sinks=True)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    whole, blocks = oracle_of(case, plan, x), blockwise(case, plan, x, torch.float64, rows=7)
    for (tensor, one), (_, other) in zip(whole.items(), blocks.items(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10, msg=lambda m, t=tensor: f"{t}: {m}")


# ---- the tolerance policy -------------------------------------------------------------------------------------------------


def tensors(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An oracle and its rounding to bfloat16, a baseline."""
    oracle = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return oracle, oracle.bfloat16()


def test_rounding_to_nearest_fits_the_band_without_a_baseline() -> None:
    oracle, _rounded = tensors(64, 4, 32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = budget(oracle.to(dtype), oracle, oracle)
        assert found.passed, found
        assert found.bound == rounding_band(dtype)
    truncated = (oracle.float().view(torch.int32) & -(2**16)).view(torch.float32)
    assert not budget(truncated, oracle, oracle, dtype=torch.bfloat16).passed
    assert budget(truncated, oracle, oracle, dtype=torch.bfloat16, truncated=True).passed
    assert unit_roundoff(torch.bfloat16) == 2.0**-8


def test_twice_the_baselines_error_passes_and_three_times_does_not() -> None:
    oracle, _ = tensors(64, 4, 32)
    noise = torch.randn(oracle.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.1
    assert budget(oracle + 2 * noise, oracle, oracle + noise, dtype=torch.bfloat16).passed
    assert not budget(oracle + 3 * noise, oracle, oracle + noise, dtype=torch.bfloat16).passed


def test_the_worse_of_several_baselines_counts() -> None:
    oracle, _ = tensors(8, 8)
    noise = torch.full_like(oracle, 0.1)
    assert budget(oracle + noise, oracle, [oracle, oracle + noise]).passed
    assert not budget(oracle + noise, oracle, [oracle]).passed


def test_one_wrong_row_of_a_large_tensor_fails() -> None:
    oracle, rounded = tensors(4096, 4, 32)
    oracle[1000:] *= 0.01  # as in a causal plan: early rows are large, late rows small
    rounded = oracle.bfloat16()
    wrong = rounded.clone()
    wrong[3000, 2] = 0
    found = budget(wrong, oracle, rounded)
    assert found.error < found.bound, "the norm alone does not see it"
    assert not found.passed
    assert found.worst[:2] == (3000, 2)


def test_nan_never_passes() -> None:
    oracle, rounded = tensors(8, 8)
    wrong = rounded.clone()
    wrong[3, 4] = math.nan
    assert not budget(wrong, oracle, rounded).passed
    assert "(3, 4)" in budget(wrong, oracle, rounded).reason
    assert not budget(rounded, oracle, wrong).passed, "a baseline of NaN allows nothing"
    wrong_oracle = oracle.clone()
    wrong_oracle[3, 4] = math.nan
    assert not budget(wrong, wrong_oracle, rounded).passed


def test_infinities_are_where_the_oracles_are() -> None:
    oracle, rounded = tensors(8, 8)
    oracle[2, 3] = -math.inf
    assert not budget(rounded, oracle, rounded).passed
    rounded[2, 3] = -math.inf
    assert budget(rounded, oracle, rounded).passed
    plus = rounded.clone()
    plus[2, 3] = math.inf
    assert not budget(plus, oracle, rounded).passed
    more = rounded.clone()
    more[0, 0] = -math.inf
    assert not budget(more, oracle, rounded).passed


def test_shapes_must_agree() -> None:
    oracle, rounded = tensors(8, 8)
    assert "shapes" in budget(rounded[:4], oracle, rounded).reason


def test_zero_by_cancellation_is_held_to_the_roundoff_of_its_terms() -> None:
    oracle = torch.full((4, 8), 1e-18, dtype=torch.float64)
    terms = torch.full((4, 1), 2.0)
    assert budget(oracle + 16 * 2.0**-24, oracle, oracle, terms=terms).passed
    assert not budget(oracle + 64 * 2.0**-24, oracle, oracle, terms=terms).passed
    assert not budget(oracle + 1e-7, oracle, oracle).passed


def test_large_exponents_are_allowed_their_own_rounding() -> None:
    oracle = torch.ones(4, 8, dtype=torch.float64)
    off = oracle * (1 + 100 * 2.0**-24)
    assert budget(off, oracle, oracle, dtype=torch.float32, exponent=30.0).passed
    for exponent in (0.0, 4.0, 20.0):
        assert not budget(off, oracle, oracle, dtype=torch.float32, exponent=exponent).passed
    assert rounding_band(torch.float32, exponent=4.0) == rounding_band(torch.float32)


def test_results_are_allowed_the_rounding_of_their_largest_exponent() -> None:
    case = Case(plan="packed", spread=20.0)
    plan = case.make_plan()
    inputs = make_inputs(case, plan)
    exact = oracle_of(case, plan, inputs)
    largest = float(exact.lse[exact.lse.isfinite()].abs().max())
    assert largest > 32

    def off(units: float) -> Results:
        given = {name: getattr(exact, name).float() for name in ("out", "lse", "dq", "dk", "dv")}
        given["dv"] = (exact.dv * (1 + units * 2.0**-24)).float()  # type: ignore[operator]
        return Results(**given)

    exactly = [replace(exact)]
    assert_matches_oracle(off(3 * largest), case, plan, inputs, oracle=exact, baselines=exactly)
    with pytest.raises(AssertionError, match="dv"):
        assert_matches_oracle(off(5 * largest), case, plan, inputs, oracle=exact, baselines=exactly)


def test_terms_do_not_excuse_a_row_that_they_are_not_of() -> None:
    oracle, _ = tensors(64, 4, 32)
    terms = torch.zeros(64, 4, 1)
    terms[3] = 1e6
    for row, passes in ((3, True), (4, False)):
        wrong = oracle.float()
        wrong[row] += 0.5
        assert budget(wrong, oracle, oracle, terms=terms).passed is passes


def test_the_message_names_tensor_error_bound_and_worst_element() -> None:
    oracle, rounded = tensors(8, 8)
    wrong = rounded.clone()
    wrong[5, 6] += 1
    with pytest.raises(
        AssertionError, match=r"dq \(8, 8\) torch.bfloat16: relative error .*bound .* \(5, 6\): .* against .* \(bound "
    ):
        assert_close_to_oracle("dq", wrong, oracle, rounded)


@pytest.mark.parametrize("tensor", ["out", "lse", "dq", "dk", "dv", "dsinks"])
def test_every_tensor_of_a_result_is_compared(tensor: str) -> None:
    case = Case(plan="packed", sinks=True, dtype=torch.bfloat16)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    right = baselines_of(case, plan, x)[0]
    assert_matches_oracle(right, case, plan, x)
    wrong = getattr(right, tensor).clone()
    wrong[-1] += 1
    with pytest.raises(AssertionError, match=f"^{tensor} "):
        assert_matches_oracle(replace(right, **{tensor: wrong}), case, plan, x)
