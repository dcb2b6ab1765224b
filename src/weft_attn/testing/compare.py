"""THE tolerance policy: how far a result may be from the exact one.

A tensor is compared with two others: the oracle, the same computation in float64, and the baseline, the same computation by
PyTorch in the input dtype. With e(x) = |x - oracle| / |oracle|,

    e(actual) <= 2 * e(baseline) + band(dtype),     band(dtype) = u(dtype) + 16 * 2**-24

once with the Frobenius norm over the tensor, and once as the largest element of |x - oracle|, each over the size of its own
row, so that one wrong row of a large tensor is caught. u is the unit roundoff of the dtype that results are rounded to: half an
ulp of 1. The 16 units of float32 are for its arithmetic: sums in another order, and a hardware exp2 that errs by 2 ulp. Where scores
are large they are 4 times the largest |lse|. A backward takes an lse from its scores that comes from a forward's, whose products add in
another order: their errors, those of the scale and of lse are units of their own size each, and a weight errs by as much of itself. Both
baselines take one product for both, where most of that cancels.

e(baseline) is the larger error of two PyTorch programs: autograd through the reference, every operation in the input dtype; and
`blockwise`, the formulas of FlashAttention (float32 sums, operands of products rounded, delta = rowsum(dO * out) from the
rounded out). The first rounds scores, which no kernel does; the second has the cancellation of dP - delta, which autograd has not.

Triton's interpreter truncates float32 to bfloat16 where GPUs round to nearest. There, and only there, u(bfloat16) is a whole
ulp, `blockwise` truncates too, and the baseline counts 4 times instead of 2: truncation errs in one direction, so that errors add
up where rounding's cancel.

lse is float32 whatever the inputs are, and is held to a float32 baseline. Its error is an absolute one (it is that of a
logarithm), so a row's size is at least 1. Rows that see nothing have lse -inf: at exactly the same places. NaN never passes.
dQ and dK are sums of dS = P (dP - delta), which cancels, to zero for a row that sees one key: the 16 units of float32 count there
for the size of what cancels (`Results.terms`), where that is larger than the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from weft_attn.plan import Plan
from weft_attn.plan.slices import HI, K_LEN, K_START, LO, Q_LEN, Q_START
from weft_attn.reference import reference_attention
from weft_attn.testing.cases import Case, Inputs

BASELINE_FACTOR = 2.0
ARITHMETIC_UNITS = 16
EXPONENT_UNITS = 4
FLOAT32_UNIT = 2.0**-24


def truncates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether casts to `dtype` truncate there: bfloat16 in Triton's interpreter. A test holds this to what the interpreter does."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    from weft_attn.ops import kernels_interpreted

    return kernels_interpreted()


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def rounding_band(dtype: torch.dtype, *, truncated: bool = False, exponent: float = 0.0) -> float:
    """What rounding and float32 arithmetic may add to twice the baseline's error.

    Args:
        exponent: size of the exponents that weights are computed from.
    """
    units = max(ARITHMETIC_UNITS, EXPONENT_UNITS * exponent)
    return unit_roundoff(dtype) * (2 if truncated else 1) + units * FLOAT32_UNIT


@dataclass(frozen=True)
class Budget:
    """How far a tensor is from the oracle, and how far it may be.

    Attributes:
        error, bound: relative, in the Frobenius norm.
        row_error, row_bound: the largest element of the difference, relative to its row's size.
        worst: index of that element.
        reason: why nothing was measured (shape, NaN, infinities elsewhere), or empty.
    """

    error: float
    bound: float
    row_error: float
    row_bound: float
    worst: tuple[int, ...] = ()
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason and self.error <= self.bound and self.row_error <= self.row_bound


def budget(
    actual: torch.Tensor,
    oracle64: torch.Tensor,
    baseline: torch.Tensor | Sequence[torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    truncated: bool = False,
    smallest: float = 0.0,
    terms: torch.Tensor | None = None,
    exponent: float = 0.0,
) -> Budget:
    """Measure `actual` against the oracle and what the baseline allows.

    Args:
        actual, oracle64, baseline: same shape; the last dimension is a row. Of several baselines the worse counts.
        dtype: what the computation rounds to; None: actual's dtype.
        truncated: casts to dtype truncate (see the module's text).
        smallest: the least size of a row.
        terms: size of the terms whose sum an element is, where they cancel; broadcasts to the tensor.
        exponent: as in `rounding_band`.
    """
    baselines = [baseline] if isinstance(baseline, torch.Tensor) else list(baseline)
    if any(x.shape != oracle64.shape for x in (actual, *baselines)):
        return _failed(f"shapes differ: actual {tuple(actual.shape)}, oracle {tuple(oracle64.shape)}")
    a, o, *bs = (x.detach().to(device=oracle64.device, dtype=torch.float64) for x in (actual, oracle64, *baselines))
    if a.numel() == 0:
        return Budget(0.0, 0.0, 0.0, 0.0)
    if any(x.isnan().any() for x in (o, *bs)):
        return _failed("the oracle or a baseline holds NaN: nothing to compare with")
    if a.isnan().any():
        return _failed(f"{int(a.isnan().sum())} of {a.numel()} elements are NaN, the first at {_first(a.isnan())}")
    wrong = (a.isinf() | o.isinf()) & (a != o)
    if wrong.any():
        return _failed(f"{int(wrong.sum())} infinite elements where the oracle has others, the first at {_first(wrong)}")
    finite = o.isfinite()
    a, o, *bs = (torch.where(finite, x, 0.0) for x in (a, o, *bs))
    # A row smaller than the tensor's typical element is measured against that.
    typical = float(o.square().mean().sqrt())
    rows = o.abs().amax(dim=-1, keepdim=True).clamp(min=max(typical, smallest, _TINY))
    size = max(float(o.norm()), smallest * o.numel() ** 0.5, _TINY)
    beyond = torch.zeros_like(rows)
    if terms is not None:
        beyond = ARITHMETIC_UNITS * FLOAT32_UNIT * (terms.to(o) - rows).clamp(min=0)

    def errors(x: torch.Tensor, ignored: torch.Tensor) -> tuple[float, torch.Tensor]:
        off = ((x - o).abs() - ignored).clamp(min=0)
        return float(off.norm()) / size, off / rows

    error, off = errors(a, beyond)
    base = [errors(b, torch.zeros_like(rows)) for b in bs]
    factor = BASELINE_FACTOR * (2 if truncated else 1)
    band = rounding_band(dtype or actual.dtype, truncated=truncated, exponent=exponent)
    worst = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    return Budget(
        error,
        factor * max(e for e, _ in base) + band,
        float(off.max()),
        factor * max(float(o.max()) for _, o in base) + band,
        worst,
    )


_TINY = 1e-300


def _failed(reason: str) -> Budget:
    return Budget(float("nan"), 0.0, float("nan"), 0.0, reason=reason)


def _first(where: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in where.nonzero()[0])


def assert_close_to_oracle(
    name: str,
    actual: torch.Tensor,
    oracle64: torch.Tensor,
    baseline: torch.Tensor | Sequence[torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    truncated: bool = False,
    smallest: float = 0.0,
    terms: torch.Tensor | None = None,
    exponent: float = 0.0,
) -> Budget:
    """Raise an AssertionError that names the tensor, the errors, the bounds and the worst element; see `budget`."""
    found = budget(
        actual, oracle64, baseline, dtype=dtype, truncated=truncated, smallest=smallest, terms=terms, exponent=exponent
    )
    if not found.passed:
        raise AssertionError(_describe(name, found, actual, oracle64))
    return found


def _describe(name: str, found: Budget, actual: torch.Tensor, oracle64: torch.Tensor) -> str:
    what = f"{name} {tuple(actual.shape)} {actual.dtype}"
    if found.reason:
        return f"{what}: {found.reason}"
    return (
        f"{what}: relative error {found.error:.2e} (bound {found.bound:.2e}), worst element at {found.worst}: "
        f"{float(actual[found.worst]):.6g} against {float(oracle64[found.worst]):.6g}, "
        f"off by {found.row_error:.2e} of its row (bound {found.row_bound:.2e})"
    )


# ---- whole results --------------------------------------------------------------------------------------------------------

# (q, k, v, sinks) -> (out, lse)
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Results:
    """What an attention gives for a case's inputs, gradients included; None where there is no such tensor.

    terms: for dq and dk the size of the terms that cancel in them, (total_q, Hq, 1) and (total_k, Hkv, 1), where computed.
    """

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    dsinks: torch.Tensor | None = None
    terms: dict[str, torch.Tensor] = field(default_factory=dict)

    def items(self) -> list[tuple[str, torch.Tensor]]:
        found = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "terms")
        return [(name, tensor) for name, tensor in found if tensor is not None]


def evaluate(attention: Attention, inputs: Inputs, *, dtype: torch.dtype | None = None, gradients: bool = True) -> Results:
    """Run an attention and differentiate it by autograd.

    Args:
        attention: (q, k, v, sinks) -> (out, lse).
        dtype: inputs are cast to it first; None: left as they are.
        gradients: whether to compute them.
    """
    given = [x if dtype is None else x.to(dtype) for x in (inputs.q, inputs.k, inputs.v)]
    sinks = inputs.sinks if dtype is None or inputs.sinks is None else inputs.sinks.to(dtype)
    leaves = [x.detach().requires_grad_(gradients) for x in (*given, *(() if sinks is None else (sinks,)))]
    out, lse = attention(leaves[0], leaves[1], leaves[2], None if sinks is None else leaves[3])
    if not gradients:
        return Results(out.detach(), lse.detach())
    outputs, incoming = [out], [inputs.dout.to(out.dtype)]
    if inputs.dlse is not None:
        # lse of a row that sees nothing is the constant -inf: a loss cannot depend on it.
        outputs.append(lse)
        incoming.append(torch.where(lse.isinf(), 0.0, inputs.dlse.to(lse.dtype)))
    differentiable = [(o, g) for o, g in zip(outputs, incoming, strict=True) if o.requires_grad]
    grads: list[torch.Tensor | None] = [None] * len(leaves)
    if differentiable:
        tensors, cotangents = zip(*differentiable, strict=True)
        grads = list(torch.autograd.grad(tensors, leaves, cotangents, allow_unused=True))
    dq, dk, dv, *dsinks = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))
    return Results(out.detach(), lse.detach(), dq, dk, dv, dsinks[0] if dsinks else None)


def oracle_of(case: Case, plan: Plan, inputs: Inputs, *, gradients: bool = True) -> Results:
    """The reference in float64."""
    return evaluate(
        lambda q, k, v, sinks: reference_attention(q, k, v, plan, sinks=sinks, **case.options),
        inputs,
        dtype=torch.float64,
        gradients=gradients,
    )


def baselines_of(case: Case, plan: Plan, inputs: Inputs, *, gradients: bool = True) -> list[Results]:
    """What PyTorch makes of it in the input dtype, as autograd and as FlashAttention would; lse in float32."""

    def attention(compute: torch.dtype) -> Attention:
        return lambda q, k, v, sinks: reference_attention(q, k, v, plan, sinks=sinks, compute_dtype=compute, **case.options)

    plain = evaluate(attention(case.dtype), inputs, gradients=gradients)
    lse = evaluate(attention(torch.float32), inputs, gradients=False).lse
    return [replace(plain, lse=lse), blockwise(case, plan, inputs, case.dtype, gradients=gradients)]


def assert_matches_oracle(
    actual: Results,
    case: Case,
    plan: Plan,
    inputs: Inputs,
    *,
    oracle: Results | None = None,
    baselines: list[Results] | None = None,
) -> dict[str, Budget]:
    """Hold every tensor of `actual` to its budget; returns the budgets by tensor."""
    gradients = actual.dq is not None
    oracle = oracle or oracle_of(case, plan, inputs, gradients=gradients)
    baselines = baselines or baselines_of(case, plan, inputs, gradients=gradients)
    terms = {name: size for b in baselines for name, size in b.terms.items()}
    exponent = float(oracle.lse[oracle.lse.isfinite()].abs().max()) if oracle.lse.isfinite().any() else 0.0
    budgets = {}
    for name, tensor in actual.items():
        exact, plain = getattr(oracle, name), [getattr(b, name) for b in baselines]
        if name == "lse":
            # Every element is a row of its own.
            budgets[name] = assert_close_to_oracle(
                name, tensor[..., None], exact[..., None], [x[..., None] for x in plain], dtype=torch.float32, smallest=1.0
            )
        else:
            budgets[name] = assert_close_to_oracle(
                name,
                tensor,
                exact,
                plain,
                dtype=case.dtype,
                truncated=truncates(case.dtype, inputs.q.device),
                terms=terms.get(name),
                exponent=exponent,
            )
    return budgets


# ---- by blocks ------------------------------------------------------------------------------------------------------------


def visible(plan: Plan, first: int, stop: int, device: torch.device) -> torch.Tensor:
    """Rows [first, stop) of `plan.to_mask()`, made on a device."""
    mask = torch.zeros(stop - first, plan.total_k, dtype=torch.bool, device=device)
    for row in plan.rows[(plan.rows[:, Q_START] < stop) & (plan.rows[:, Q_START] + plan.rows[:, Q_LEN] > first)]:
        q_start, q_stop, lo, hi = int(row[Q_START]), int(row[Q_START] + row[Q_LEN]), int(row[LO]), int(row[HI])
        k_start, k_stop = int(row[K_START]), int(row[K_START] + row[K_LEN])
        rows = torch.arange(max(first, q_start), min(stop, q_stop), device=device)[:, None] - q_start
        offset = torch.arange(k_stop - k_start, device=device)[None, :] - rows
        top = max(first, q_start) - first
        mask[top : top + len(rows), k_start:k_stop] |= (offset >= lo) & (offset <= hi)
    return mask


def truncated_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16 towards zero, as float32: what Triton's interpreter stores."""
    return (x.contiguous().view(torch.int32) & -(2**16)).view(torch.float32)


def blockwise(
    case: Case, plan: Plan, inputs: Inputs, compute: torch.dtype, *, gradients: bool = True, rows: int = 256
) -> Results:
    """Attention and its gradients by blocks of query rows, the formulas written out, for any size.

    In float64 an oracle; in the input dtype a baseline: operands of products and results are rounded to it, sums and softmax
    statistics are float32. Gradients of tensors that are rounded once at the end are summed over blocks before.
    """
    stats = torch.float64 if compute == torch.float64 else torch.float32
    is_truncated = truncates(compute, inputs.q.device)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return truncated_to_bfloat16(x) if is_truncated else x.to(compute).to(stats)

    group = case.heads // case.kv_heads
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    q, k, v, dout = (x.to(stats) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    out = torch.zeros(plan.total_q, case.heads, case.dim_v, dtype=stats, device=q.device)
    lse = torch.full((case.heads, plan.total_q), float("-inf"), dtype=stats, device=q.device)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    # Roots of the sums of P**2 over a row's keys and over a key's rows: random errors of P's factors add up so.
    row_weights, key_weights = out.new_zeros(q.shape[:2]), out.new_zeros(k.shape[:2])
    sinks = None if inputs.sinks is None else inputs.sinks.to(stats)
    dsinks = None if sinks is None else torch.zeros_like(sinks)
    for first in range(0, plan.total_q, rows):
        block = slice(first, min(first + rows, plan.total_q))
        mask = visible(plan, block.start, block.stop, q.device)
        seen = mask.any(dim=0).nonzero()[:, 0]
        mask = mask[:, seen]
        for head in range(case.heads):
            kv = head // group
            k_seen, v_seen = k[seen, kv], v[seen, kv]
            scores = q[block, head] @ k_seen.T * scale
            slope = torch.ones_like(scores)
            if case.softcap > 0:
                capped = torch.tanh(scores / case.softcap)
                slope, scores = 1 - capped.square(), capped * case.softcap
            joined = scores = scores.masked_fill(~mask, float("-inf"))
            if sinks is not None:
                joined = torch.cat([scores, sinks[head].expand(len(scores), 1)], dim=1)
            row_lse = torch.logsumexp(joined, dim=1)
            empty = row_lse.isinf()
            probs = torch.exp(scores - row_lse.masked_fill(empty, 0.0)[:, None])
            lse[head, block] = row_lse
            # Rounded relative to the row's largest score and normalised afterwards: a row that sees one key gets that key's value.
            peak = joined.amax(dim=1).masked_fill(empty, 0.0) if joined.shape[1] else torch.zeros_like(row_lse)
            weights = torch.exp(scores - peak[:, None])
            out[block, head] = rounded((rounded(weights) @ v_seen) * torch.exp(peak - row_lse.masked_fill(empty, 0.0))[:, None])
            if not gradients:
                continue
            delta = (dout[block, head] * out[block, head]).sum(dim=1)
            if inputs.dlse is not None:
                delta -= inputs.dlse[head, block].to(stats).masked_fill(empty, 0.0)
            dprobs = dout[block, head] @ v_seen.T
            dscores = rounded(probs * (dprobs - delta[:, None]) * slope)
            dq[block, head] = dscores @ k_seen * scale
            dk[:, kv].index_add_(0, seen, dscores.T @ q[block, head] * scale)
            dv[:, kv].index_add_(0, seen, rounded(probs).T @ dout[block, head])
            row_weights[block, head] = probs.square().sum(dim=1)
            key_weights[:, kv].index_add_(0, seen, probs.square().sum(dim=0))
            if sinks is not None and dsinks is not None:
                dsinks[head] -= (torch.exp(sinks[head] - row_lse) * delta).masked_fill(empty, 0.0).sum()
    if not gradients:
        return Results(out, lse)
    terms = {}
    if q.numel() and k.numel():
        # |dP| of a row: a sum of Dv products of random sign.
        dprobs_size = dout.norm(dim=-1).max() * v.nan_to_num().norm(dim=-1).max() * case.dim_v**-0.5
        terms = {
            "dq": (scale * dprobs_size * k.nan_to_num().abs().max() * row_weights.sqrt())[..., None],
            "dk": (scale * dprobs_size * q.nan_to_num().abs().max() * key_weights.sqrt())[..., None],
        }
    return Results(out, lse, rounded(dq), rounded(dk), rounded(dv), dsinks, terms)
