"""The public functions on CPU tensors: results and gradients against the oracle, whatever is asked for and however it lies."""

from __future__ import annotations

import itertools

import pytest
import torch

import weft_attn as weft
from weft_attn.reference import reference_attention
from weft_attn.testing.cases import PLANS, Case, Inputs, make_inputs
from weft_attn.testing.compare import Attention, assert_matches_oracle, evaluate, oracle_of


def ours(case: Case, plan: weft.Plan) -> Attention:
    return lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, sinks=sinks, return_lse=True, **case.options)  # type: ignore[return-value]


CASES = [
    *(Case(plan=name) for name in PLANS),
    Case(plan="packed", dtype=torch.bfloat16, heads=8, kv_heads=2),
    Case(plan="packed", dtype=torch.float16, heads=8, kv_heads=1),
    Case(plan="zigzag_padded", sinks=True, softcap=2.0, head_dim=24, head_dim_v=40),
    Case(plan="causal_more_rows", sinks=True, dtype=torch.bfloat16),
    Case(plan="prefix_lm", softmax_scale=0.0),
    Case(plan="window_both", softmax_scale=1.3, lse_gradient=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_match_the_oracle(case: Case) -> None:
    plan = case.make_plan()
    inputs = make_inputs(case, plan)
    assert_matches_oracle(evaluate(ours(case, plan), inputs), case, plan, inputs)


def test_a_dense_call_is_the_plan_of_its_batch() -> None:
    case = Case(heads=4, kv_heads=2, head_dim_v=24)
    plan = weft.Plan.dense(3, 7, 9, causal=True, window=(4, None))
    x = make_inputs(case, plan)

    def dense(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (t.view(3, -1, t.shape[1], t.shape[2]) for t in (q, k, v))
        out, lse = weft.attention(q, k, v, causal=True, window=(4, None), sinks=sinks, return_lse=True)
        assert out.shape == (3, 7, 4, 24)
        assert lse.shape == (3, 4, 7)
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    assert_matches_oracle(evaluate(dense, x), case, plan, x)


def test_packed_documents_are_the_plan_of_their_lengths() -> None:
    case = Case(heads=4, kv_heads=2, head_dim_v=24, sinks=True)
    cu_q, cu_k = [0, 4, 4, 15], [0, 6, 9, 16]
    plan = weft.Plan.from_cu_seqlens(cu_q, cu_k, causal=True)
    x = make_inputs(case, plan)
    for kind in (list, torch.tensor):

        def varlen(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, kind: type = kind
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return weft.varlen_attention(q, k, v, kind(cu_q), kind(cu_k), causal=True, sinks=sinks, return_lse=True)  # type: ignore[return-value]

        assert_matches_oracle(evaluate(varlen, x), case, plan, x)


def test_without_return_lse_the_output_is_the_same() -> None:
    x = torch.randn(2, 5, 4, 16)
    out, _ = weft.attention(x, x, x, return_lse=True)
    assert torch.equal(weft.attention(x, x, x), out)  # type: ignore[arg-type]
    plan = weft.Plan.dense(1, 5, 5)
    assert torch.equal(
        weft.plan_attention(x[0], x[0], x[0], plan), weft.plan_attention(x[0], x[0], x[0], plan, return_lse=True)[0]
    )


def test_deterministic_changes_nothing() -> None:
    x = torch.randn(2, 5, 4, 16)
    assert torch.equal(weft.attention(x, x, x, deterministic=True), weft.attention(x, x, x))  # type: ignore[arg-type]


SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(("q", "k", "v", "sinks"), n)]


@pytest.mark.parametrize("used", ["out", "lse", "both"])
@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_gradients_are_right_whichever_inputs_ask_for_them(subset: tuple[str, ...], used: str) -> None:
    case = Case(plan="packed_unequal", size=16, sinks=True, heads=4, kv_heads=2)
    plan = case.make_plan()
    x = make_inputs(case, plan)
    assert x.dlse is not None
    grads = []
    for dtype in (torch.float32, torch.float64):
        named = {n: getattr(x, n).detach().to(dtype) for n in ("q", "k", "v", "sinks")}
        leaves = [named[n].requires_grad_() for n in subset]
        if dtype == torch.float32:
            out, lse = weft.plan_attention(named["q"], named["k"], named["v"], plan, sinks=named["sinks"], return_lse=True)
        else:
            out, lse = reference_attention(named["q"], named["k"], named["v"], plan, sinks=named["sinks"])
        loss = torch.zeros((), dtype=dtype)
        if used in ("out", "both"):
            loss = loss + (out * x.dout).sum()
        if used in ("lse", "both"):
            loss = loss + (lse * x.dlse).sum()
        if loss.requires_grad:
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        else:
            assert (subset, used) == (("v",), "lse"), "lse does not depend on v, and on nothing else"
            grads.append((torch.zeros_like(named["v"]),))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_sinks_get_their_gradient_in_their_own_dtype() -> None:
    plan = weft.Plan.dense(1, 5, 5)
    x = torch.randn(5, 4, 16, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        sinks = torch.zeros(4, dtype=dtype, requires_grad=True)
        weft.plan_attention(x, x, x, plan, sinks=sinks).sum().backward()  # type: ignore[union-attr]
        assert sinks.grad is not None
        assert sinks.grad.dtype == dtype
        assert sinks.grad.abs().max() > 0


def strided(case: Case, plan: weft.Plan) -> Inputs:
    """The same values behind other strides: q a transposed view, k and v slices of a fused tensor, one with a strided last dim."""
    x = make_inputs(case, plan)
    fused = torch.randn(plan.total_k, 3 * case.kv_heads + 1, 2 * case.head_dim + 5, dtype=case.dtype)
    k = fused[:, 1 : 1 + case.kv_heads, 3 : 3 + case.head_dim]
    v = fused[:, 1 + case.kv_heads : 1 + 2 * case.kv_heads, 1 : 1 + 2 * case.dim_v : 2]
    k.copy_(x.k)
    v.copy_(x.v)
    q = x.q.transpose(0, 1).contiguous().transpose(0, 1)
    dout = x.dout.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not any(t.is_contiguous() for t in (q, k, v, dout))
    assert v.stride(-1) == 2
    return Inputs(q, k, v, x.sinks, dout, None if x.dlse is None else x.dlse.T.contiguous().T)


def test_strides_do_not_matter_and_inputs_are_left_alone() -> None:
    case = Case(plan="packed", heads=4, kv_heads=2, sinks=True)
    plan = case.make_plan()
    x = strided(case, plan)
    before = [t.clone() for t in (x.q, x.k, x.v)]
    assert_matches_oracle(evaluate(ours(case, plan), x), case, plan, x)
    for one, other in zip((x.q, x.k, x.v), before, strict=True):
        assert torch.equal(one, other)


def test_a_batch_first_heads_second_tensor_is_accepted_as_a_view() -> None:
    q, k, v = (torch.randn(2, h, 7, 16).transpose(1, 2) for h in (4, 2, 2))
    expected = weft.attention(*(x.contiguous() for x in (q, k, v)), causal=True)
    assert torch.equal(weft.attention(q, k, v, causal=True), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(("rows", "keys"), [(0, 0), (0, 5), (5, 0), (1, 1), (63, 129)])
def test_any_lengths_have_the_right_shapes(batch: int, rows: int, keys: int) -> None:
    q = torch.randn(batch, rows, 4, 16, requires_grad=True)
    k, v = (torch.randn(batch, keys, 2, d, requires_grad=True) for d in (16, 8))
    out, lse = weft.attention(q, k, v, causal=True, return_lse=True)
    assert out.shape == (batch, rows, 4, 8)
    assert lse.shape == (batch, 4, rows)
    assert lse.dtype == torch.float32
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    if keys == 0:
        assert (out == 0).all()
        assert (lse == float("-inf")).all()
        assert (grads[0] == 0).all()


def test_the_oracle_in_float64_is_not_what_runs() -> None:
    """The comparison above is between two different computations."""
    case = Case(plan="packed")
    plan = case.make_plan()
    x = make_inputs(case, plan)
    found = evaluate(ours(case, plan), x)
    assert not torch.equal(found.out.double(), oracle_of(case, plan, x).out)
