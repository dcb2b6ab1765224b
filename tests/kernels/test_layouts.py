"""Kernels read tensors where they lie: any strides, any alignment, and leave them as they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

import weft_attn as weft
from weft_attn.launch import BackwardDkdvConfig, BackwardDqConfig, ForwardConfig, override
from weft_attn.ops import attention_into, begin_backward
from weft_attn.testing.cases import Case, Inputs, make_inputs
from weft_attn.testing.compare import Attention, Results, assert_matches_oracle, evaluate

TILES = [
    kind(block_q=32, block_k=32, num_warps=4, num_stages=1) for kind in (ForwardConfig, BackwardDkdvConfig, BackwardDqConfig)
]
CASE = Case(plan="packed", size=12, heads=4, kv_heads=2, head_dim=24, head_dim_v=40, sinks=True)


def ours(plan: weft.Plan) -> Attention:
    return lambda q, k, v, sinks: weft.plan_attention(q, k, v, plan, sinks=sinks, return_lse=True)  # type: ignore[return-value]


def behind(x: torch.Tensor, *shape: int, at: tuple[slice, ...], order: tuple[int, ...] = (0, 1, 2)) -> torch.Tensor:
    """x's values in a view of a larger tensor of NaN: reading past the view shows."""
    base = torch.full(shape, float("nan"), dtype=x.dtype)
    view = base[at].permute(order)
    view.copy_(x)
    assert not view.is_contiguous()
    return view


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """(H, T, D) memory behind a (T, H, D) view."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def fused(x: Inputs) -> Inputs:
    """q, k and v are slices of one tensor with room before, between and after."""
    tokens = x.q.shape[0]
    base = torch.full((tokens, 9, 48), float("nan"), dtype=x.q.dtype)
    q, k, v = base[:, 0:4, :24], base[:, 4:6, 8:32], base[:, 7:9, 8:]
    for view, values in ((q, x.q), (k, x.k), (v, x.v)):
        view.copy_(values)
    return replace(x, q=q, k=k, v=v)


def each_its_own(x: Inputs) -> Inputs:
    """Different strides for every tensor: heads first, padded rows, a last dimension that is not contiguous."""
    tokens = x.q.shape[0]
    dlse = None if x.dlse is None else x.dlse.T.contiguous().T
    return Inputs(
        heads_first(x.q),
        behind(x.k, tokens, 2, 31, at=(slice(None), slice(None), slice(3, 27))),
        behind(x.v, tokens + 4, 2, 80, at=(slice(2, tokens + 2), slice(None), slice(0, 80, 2))),
        x.sinks,
        behind(x.dout, 40, tokens, 4, at=(slice(None),) * 3, order=(1, 2, 0)),
        dlse,
    )


def unaligned(x: Inputs) -> Inputs:
    """Bases that are aligned to an element and no more."""

    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full((1,), float("nan"), dtype=t.dtype), t.flatten()])[1:].view(t.shape)

    return replace(x, q=moved(x.q), k=moved(x.k), v=moved(x.v), dout=moved(x.dout))


@lru_cache
def lying_plain(dtype: torch.dtype) -> Results:
    """What contiguous tensors give."""
    case = replace(CASE, dtype=dtype)
    plan = case.make_plan()
    with override(*TILES):
        return evaluate(ours(plan), make_inputs(case, plan))


@pytest.mark.parametrize(
    ("lie", "dtype"),
    [(fused, torch.float32), (each_its_own, torch.float16), (unaligned, torch.float32), (unaligned, torch.float16)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_values_count_and_not_where_they_lie(lie: object, dtype: torch.dtype) -> None:
    case = replace(CASE, dtype=dtype)
    plan = case.make_plan()
    inputs = lie(make_inputs(case, plan))  # type: ignore[operator]
    before = [t.clone() for t in (inputs.q, inputs.k, inputs.v, inputs.dout)]
    with override(*TILES):
        found = evaluate(ours(plan), inputs)
    for (name, a), (_, b) in zip(found.items(), lying_plain(dtype).items(), strict=True):
        assert torch.equal(a, b), name
    for one, other in zip((inputs.q, inputs.k, inputs.v, inputs.dout), before, strict=True):
        assert torch.equal(one, other), "inputs are left as they were"


@pytest.mark.parametrize("shape", ["everywhere", "over tokens", "over heads"])
def test_an_expanded_gradient_is_read_right(shape: str) -> None:
    """out.sum().backward() hands over a gradient whose strides are zero."""
    plan = CASE.make_plan()
    x = make_inputs(CASE, plan)
    tokens = x.dout.shape
    sizes = {"everywhere": (1, 1, 1), "over tokens": (1, 4, 40), "over heads": (tokens[0], 1, 40)}[shape]
    dout = torch.randn(sizes).expand(tokens)
    inputs = replace(x, dout=dout, dlse=torch.ones(1, 1).expand(4, tokens[0]))
    with override(*TILES):
        assert_matches_oracle(evaluate(ours(plan), inputs), CASE, plan, inputs)


def test_a_dense_batch_of_transposed_views_is_read_in_place() -> None:
    q, k, v = (torch.randn(2, h, n, 16).transpose(1, 2) for h, n in ((4, 21), (2, 33), (2, 33)))
    with override(*TILES):
        out, lse = weft.attention(q, k, v, causal=True, window=(9, None), return_lse=True)
        plain = weft.attention(*(x.contiguous() for x in (q, k, v)), causal=True, window=(9, None), return_lse=True)
    assert out.shape == (2, 21, 4, 16)
    assert lse.shape == (2, 4, 21)
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[1])


def test_dense_packed_and_planned_calls_agree_to_the_bit() -> None:
    q, k, v = (torch.randn(3, n, h, 16, requires_grad=True) for n, h in ((17, 4), (9, 2), (9, 2)))
    sinks = torch.randn(4, requires_grad=True)
    cu_q, cu_k = [0, 17, 34, 51], [0, 9, 18, 27]
    plan = weft.Plan.from_cu_seqlens(cu_q, cu_k, causal=True, window=(9, None))
    with override(*TILES):
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        outs = [
            weft.attention(q, k, v, causal=True, window=(9, None), sinks=sinks),
            weft.varlen_attention(*flat, cu_q, cu_k, causal=True, window=(9, None), sinks=sinks),
            weft.plan_attention(*flat, plan, sinks=sinks),
        ]
        grads = [torch.autograd.grad(o.square().sum(), (q, k, v, sinks)) for o in outs]  # type: ignore[union-attr]
    for other in outs[1:]:
        assert torch.equal(outs[0].flatten(0, 1), other)  # type: ignore[union-attr, arg-type]
    for found in grads[1:]:
        for one, other in zip(grads[0], found, strict=True):
            assert torch.equal(one, other)


def test_a_plan_is_prepared_once_for_each_choice_of_config() -> None:
    plan = CASE.make_plan()
    x = make_inputs(CASE, plan)
    with override(*TILES):
        evaluate(ours(plan), x)
        prepared = len(plan._recipes)
        evaluate(ours(plan), x)
        assert len(plan._recipes) == prepared
    with override(ForwardConfig(block_q=16, block_k=16, num_warps=4, num_stages=1)):
        evaluate(ours(plan), x)
    assert len(plan._recipes) > prepared


@pytest.mark.parametrize("name", ["packed", "zigzag_padded", "causal_more_rows", "concat"])
def test_nothing_is_written_outside_of_the_results(name: str, guarded_memory: None) -> None:
    case = Case(plan=name, size=12, head_dim=24, head_dim_v=40)
    plan = case.make_plan()
    inputs = make_inputs(case, plan)
    with override(*TILES):
        evaluate(ours(plan), inputs)


def test_nothing_is_written_outside_of_the_parts(guarded_memory: None, machine: Callable[..., object]) -> None:
    machine(multiprocessors=132)
    case = Case(plan="decode_16", head_dim=24, head_dim_v=40)
    plan = case.make_plan()
    inputs = make_inputs(case, plan)
    with override(ForwardConfig(block_q=16, block_k=16, num_warps=4, num_stages=1)):
        evaluate(ours(plan), inputs, gradients=False)


@pytest.mark.parametrize("odd", ["q", "k", "v", "dout"])
def test_one_tensor_of_odd_strides_stands_beside_multiples_of_eight(odd: str) -> None:
    """What is said of the strides of all is true of each."""
    plan = CASE.make_plan()
    x = make_inputs(CASE, plan)
    one = getattr(x, odd)
    wide = behind(one, *one.shape[:2], one.shape[2] + 1, at=(slice(None), slice(None), slice(0, one.shape[2])))
    with override(*TILES):
        found = evaluate(ours(plan), replace(x, **{odd: wide}))
    for (name, a), (_, b) in zip(found.items(), lying_plain(CASE.dtype).items(), strict=True):
        assert torch.equal(a, b), name


def test_results_go_to_tensors_of_any_strides() -> None:
    plan = CASE.make_plan()
    x = make_inputs(CASE, plan)
    scalars = (plan, CASE.head_dim**-0.5, 0.0, True)
    written: list[dict[str, torch.Tensor]] = []
    for wide in ("", "out", "dq", "dk", "dv"):
        shapes = dict(out=x.dout.shape, dq=x.q.shape, dk=x.k.shape, dv=x.v.shape)
        made = {
            name: torch.full((*shape[:2], shape[2] + (name == wide)), float("nan"))[..., : shape[2]]
            for name, shape in shapes.items()
        }
        lse = torch.empty(x.q.shape[1], x.q.shape[0])
        with override(*TILES):
            attention_into(x.q, x.k, x.v, x.sinks, *scalars, made["out"], lse)
            begin_backward(
                x.dout, None, x.q, x.k, x.v, x.sinks, made["out"], lse, *scalars, made["dq"], made["dk"], made["dv"]
            ).complete()
        written.append(made)
    for other in written[1:]:
        for name in other:
            assert torch.equal(written[0][name], other[name]), name


def test_a_backward_begins_before_its_keys_are_there() -> None:
    """As over several ranks: until `multiply`, k, v, dk and dv may hold anything, and dk and dv are not written."""
    plan = CASE.make_plan()
    x = make_inputs(CASE, plan)
    scalars = (plan, CASE.head_dim**-0.5, 0.0, True)
    out, lse = torch.empty_like(x.dout), torch.empty(x.q.shape[1], x.q.shape[0])
    with override(*TILES):
        attention_into(x.q, x.k, x.v, x.sinks, *scalars, out, lse)
        once, later = ([torch.full_like(y, float("nan")) for y in (x.q, x.k, x.v)] for _ in range(2))
        dsinks = begin_backward(x.dout, None, x.q, x.k, x.v, x.sinks, out, lse, *scalars, *once).complete()
        k, v = torch.full_like(x.k, float("nan")), torch.full_like(x.v, float("nan"))
        backward = begin_backward(x.dout, None, x.q, k, v, x.sinks, out, lse, *scalars, *later)
        assert all(gradient.isnan().all() for gradient in later[1:])
        k.copy_(x.k)
        v.copy_(x.v)
        backward.multiply()
        # They may leave now.
        dk, dv = (gradient.clone() for gradient in later[1:])
        for gradient in later[1:]:
            gradient.fill_(float("nan"))
        found = backward.finish()
    for one, other in zip(once, (later[0], dk, dv), strict=True):
        assert torch.equal(one, other)
    assert dsinks is not None
    assert found is not None
    assert torch.equal(dsinks, found)
