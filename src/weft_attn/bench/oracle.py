"""The exact answer for a sample of a case's rows and keys, at the size that is timed.

For sampled rows: out, lse and dq, from all keys that they see. For sampled keys: dk and dv, from all rows that see them. In
float64 on the device of the tensors, under the mask that the plan's own visibility rule gives. Beside it the same arithmetic in
the input dtype, from which `testing.compare` says how much error a kernel is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from weft_attn.bench.cases import Case, Tensors
from weft_attn.plan.slices import K_LEN, K_START, Q_LEN, Q_START, Plan, transpose, visible_interval
from weft_attn.reference import reference_attention
from weft_attn.testing.compare import Budget, budget, truncates

IntArray = NDArray[np.int64]

SAMPLES = 128


@dataclass(frozen=True)
class Expected:
    """A sampled tensor in float64, as the input dtype's own arithmetic gives it, and what `budget` is told beside them."""

    exact: torch.Tensor
    baseline: torch.Tensor
    allowance: dict[str, Any]

    def compare(self, given: torch.Tensor) -> Budget:
        return budget(given, self.exact, self.baseline, **self.allowance)


def wrong_tensors(budgets: Mapping[str, Budget]) -> str:
    """Which tensors are off and by how much, in words; empty when all are right."""
    return "; ".join(f"{name} {_off(found)}" for name, found in budgets.items() if not found.passed)


def _off(found: Budget) -> str:
    return found.reason or (
        f"off by {found.error:.2e} (bound {found.bound:.2e}), "
        f"its worst element by {found.row_error:.2e} (bound {found.row_bound:.2e})"
    )


@dataclass(frozen=True)
class Oracle:
    """What a case's sampled rows and keys must come out as.

    Attributes:
        rows, keys: (samples,) indices into the plan's rows and keys.
        row_tensors: "out" and "dq" (rows, Hq, D), "lse" (Hq, rows, 1).
        key_tensors: "dk" and "dv" (keys, Hkv, D); empty where no backward is checked.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    row_tensors: dict[str, Expected]
    key_tensors: dict[str, Expected]

    def check_forward(self, out: torch.Tensor, lse: torch.Tensor | None) -> dict[str, Budget]:
        """Args: out (total_q, Hq, D); lse (Hq, total_q), natural log, or None where a peer does not give it."""
        found = {"out": self.row_tensors["out"].compare(out[self.rows])}
        if lse is not None:
            found["lse"] = self.row_tensors["lse"].compare(lse[:, self.rows, None])
        return found

    def check_gradients(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, Budget]:
        """Args: "dq" (total_q, Hq, D), "dk", "dv" (total_k, Hkv, D), or some of them, in the plan's order of rows and keys."""
        return {
            name: self.row_tensors[name].compare(given[self.rows])
            if name in self.row_tensors
            else self.key_tensors[name].compare(given[self.keys])
            for name, given in gradients.items()
        }


def build_oracle(
    case: Case,
    tensors: Tensors,
    samples: int = SAMPLES,
    seed: int = 0,
    *,
    among: IntArray | None = None,
) -> Oracle:
    """Sample a case and compute what its passes must give.

    Args:
        among: rows, and keys of the same numbers, to sample from, sorted; None: all of them.
    """
    plan, dtype = case.plan, case.model.dtype
    if among is None:
        rows, keys = sample(plan.total_q, samples, seed), sample(plan.total_k, samples, seed + 1)
    else:
        rows, keys = (among[sample(len(among), samples, seed + i)] for i in (0, 1))
    row_index, key_index = (torch.from_numpy(x).to(tensors.device) for x in (rows, keys))

    row_mask = torch.from_numpy(visible(plan.rows, rows, plan.total_k)).to(tensors.device)
    exact, plain, single = (_row_tensors(tensors, row_index, row_mask, x) for x in (torch.float64, dtype, torch.float32))
    # lse is float32 whatever the inputs are, and is held to float32's own error.
    plain["lse"] = single["lse"]
    allowances = _allowances(case, tensors.device)
    row_tensors = {name: Expected(exact[name], plain[name], allowances[name]) for name in exact}

    key_tensors: dict[str, Expected] = {}
    if "backward" in case.passes:
        key_mask = torch.from_numpy(visible(transpose(plan.rows), keys, plan.total_q)).to(tensors.device)
        lse, delta = _row_statistics(plan, tensors)
        exact, plain = (_key_tensors(tensors, key_index, key_mask, lse, delta, x) for x in (torch.float64, dtype))
        key_tensors = {name: Expected(exact[name], plain[name], allowances[name]) for name in exact}
    return Oracle(row_index, key_index, row_tensors, key_tensors)


def _allowances(case: Case, device: torch.device) -> dict[str, dict[str, Any]]:
    """Keyword arguments of `budget` by tensor."""
    dtype = case.model.dtype
    rounded = {"dtype": dtype, "truncated": truncates(dtype, device)}
    return {**dict.fromkeys(("out", "dq", "dk", "dv"), rounded), "lse": {"dtype": torch.float32, "smallest": 1.0}}


def sample(total: int, samples: int, seed: int) -> IntArray:
    """Sorted distinct indices below `total`: the first, the last, and random ones between; all of them where they are few."""
    if total <= samples:
        return np.arange(total, dtype=np.int64)
    drawn = np.random.default_rng(seed).choice(total, samples - 2, replace=False)
    return np.unique(np.concatenate([drawn, [0, total - 1]])).astype(np.int64)


def visible(table: IntArray, rows: IntArray, total: int) -> NDArray[np.bool_]:
    """(rows, total) bool: what these rows of a slice table see. For keys, pass the transposed table."""
    mask = np.zeros((len(rows), total), dtype=bool)
    for piece in table:
        inside = np.flatnonzero((rows >= piece[Q_START]) & (rows < piece[Q_START] + piece[Q_LEN]))
        first, stop = visible_interval(rows[inside] - piece[Q_START], piece[K_LEN], piece[4], piece[5])
        columns = np.arange(piece[K_LEN])
        cells = (columns >= first[:, None]) & (columns < stop[:, None])
        mask[inside, piece[K_START] : piece[K_START] + piece[K_LEN]] |= cells
    return mask


def _stats_dtype(compute: torch.dtype) -> torch.dtype:
    return torch.float64 if compute == torch.float64 else torch.float32


def _row_tensors(tensors: Tensors, rows: torch.Tensor, mask: torch.Tensor, compute: torch.dtype) -> dict[str, torch.Tensor]:
    # One KV head and its group of query heads at a time: q, dout (R * G, D), k, v (K, D), mask (R, K).
    kv_heads = tensors.k.shape[1]
    group = tensors.q.shape[1] // kv_heads
    scale = tensors.q.shape[2] ** -0.5
    stats = _stats_dtype(compute)
    blocked = ~mask.repeat_interleave(group, dim=0)
    parts: dict[str, list[torch.Tensor]] = {"out": [], "dq": [], "lse": []}
    for head in range(kv_heads):
        heads = slice(head * group, (head + 1) * group)
        q, dout = (x[rows, heads].to(compute).flatten(0, 1) for x in (tensors.q, tensors.dout))
        k, v = (x[:, head].to(compute) for x in (tensors.k, tensors.v))
        scores = ((q @ k.T) * scale).masked_fill_(blocked, float("-inf")).to(stats)
        lse = scores.logsumexp(dim=1, keepdim=True)
        probs = torch.exp(scores - lse).masked_fill_(blocked, 0.0)
        out = probs.to(compute) @ v
        delta = (out.to(stats) * dout.to(stats)).sum(dim=1, keepdim=True)
        dscores = probs * ((dout @ v.T).to(stats) - delta)
        parts["out"].append(out.unflatten(0, (-1, group)))
        parts["dq"].append(((dscores.to(compute) @ k) * scale).unflatten(0, (-1, group)))
        parts["lse"].append(lse.view(-1, group).T)
    return {
        "out": torch.cat(parts["out"], dim=1),
        "dq": torch.cat(parts["dq"], dim=1),
        "lse": torch.cat(parts["lse"], dim=0)[..., None],
    }


def _row_statistics(plan: Plan, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """lse and delta of every row, (Hq, total_q) float64: what a key's gradient needs of the rows that see it."""
    with torch.no_grad():
        out, lse = reference_attention(tensors.q.double(), tensors.k.double(), tensors.v.double(), plan)
    return lse, (out * tensors.dout).sum(dim=2).T


def _key_tensors(
    tensors: Tensors,
    keys: torch.Tensor,
    mask: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    compute: torch.dtype,
) -> dict[str, torch.Tensor]:
    # One KV head and its group at a time: q, dout (T * G, D), k, v (J, D), mask (J, T), lse, delta (Hq, T).
    kv_heads = tensors.k.shape[1]
    group = tensors.q.shape[1] // kv_heads
    scale = tensors.q.shape[2] ** -0.5
    stats = _stats_dtype(compute)
    blocked = ~mask.T.repeat_interleave(group, dim=0)
    dks, dvs = [], []
    for head in range(kv_heads):
        heads = slice(head * group, (head + 1) * group)
        q, dout = (x[:, heads].to(compute).flatten(0, 1) for x in (tensors.q, tensors.dout))
        k, v = (x[keys, head].to(compute) for x in (tensors.k, tensors.v))
        row_lse, row_delta = (x[heads].T.reshape(-1, 1).to(stats) for x in (lse, delta))
        probs = torch.exp(((q @ k.T) * scale).to(stats) - row_lse).masked_fill_(blocked, 0.0)
        dscores = probs * ((dout @ v.T).to(stats) - row_delta)
        dvs.append(probs.to(compute).T @ dout)
        dks.append((dscores.to(compute).T @ q) * scale)
    return {"dk": torch.stack(dks, dim=1), "dv": torch.stack(dvs, dim=1)}
