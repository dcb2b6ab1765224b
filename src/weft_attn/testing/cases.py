"""Named plans at any size, and cases: a plan, head counts, dims, dtype and features, with their inputs.

A size is a number of tokens: the same names serve Triton's interpreter (a few tens) and a GPU (thousands). Lengths are odd on
purpose: no tile size divides them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from weft_attn.plan import Plan, Slice

INTERPRETED_SIZE = 40


def cumulative(lengths: list[int]) -> list[int]:
    """(documents + 1) cumulative lengths."""
    return [0, *np.cumsum(lengths).tolist()]


def _documents(n: int) -> list[int]:
    """Unequal lengths: an empty document, documents of one and two tokens, one in the middle of a tile."""
    return [n + 5, 0, 1, n - 3, 2, n // 2]


def _causal(n: int) -> Plan:
    return Plan.dense(2, n + 1, n + 1, causal=True)


def _packed(n: int) -> Plan:
    cu = cumulative(_documents(n))
    return Plan.from_cu_seqlens(cu, cu, causal=True)


def _packed_unequal(n: int) -> Plan:
    """More rows than keys, more keys than rows, rows without keys, keys without rows."""
    q = cumulative([n, 3, 0, n // 2, 7, 1])
    k = cumulative([n // 2, n, 5, n // 2 + 1, 0, 3])
    return Plan.from_cu_seqlens(q, k, causal=True)


def _packed_window(n: int) -> Plan:
    cu = cumulative(_documents(n))
    return Plan.from_cu_seqlens(cu, cu, causal=True, window=(n // 4, None))


def _decode_batch(n: int) -> Plan:
    """One row each for requests of unequal context; one has none."""
    return Plan.from_cu_seqlens(cumulative([1] * 6), cumulative([2 * n, 1, 0, n + 3, 17, 3 * n]), causal=True)


def _odd() -> Plan:
    """Documents of 1, 63 and 129 tokens."""
    cu = cumulative([1, 63, 129])
    return Plan.from_cu_seqlens(cu, cu, causal=True)


def _groups(n: int) -> Plan:
    """Three groups over two documents: an early prefix, all keys, and one that sees nothing of the first document."""
    cu_k = cumulative([n, n + 7])
    return Plan.from_groups(
        [(cumulative([n // 2, 5]), [n // 2, n // 4]), (cumulative([3, n]), [n, n + 7]), (cumulative([4, 4]), [0, 9])], cu_k
    )


def _prefix_lm(n: int) -> Plan:
    """The first third sees itself in both directions, the rest is causal."""
    prefix = n // 3
    return Plan([Slice(0, prefix, 0, prefix), Slice(prefix, 2 * n - prefix, 0, 2 * n, hi=prefix)], 2 * n, 2 * n)


def _unseen(n: int) -> Plan:
    """Rows outside every slice, keys that nobody sees, between and around two bands."""
    return Plan([Slice(5, n - 10, 7, n - 9, lo=-4, hi=6), Slice(n, n // 2, 3, n - 5, lo=n // 3)], 2 * n, n + 11)


def _striped(n: int) -> Plan:
    """Striped context parallelism: rows see the keys of an earlier rank up to their own index, of a later rank up to one less."""
    return Plan([Slice(0, n, r * n, n, hi=0 if r <= 1 else -1) for r in range(3)], n, 3 * n)


def _concat(n: int) -> Plan:
    return Plan.concat(
        [_prefix_lm(n // 2), Plan.dense(1, 3, 0), Plan.dense(1, 0, 5), _causal(n // 2), Plan.shared_prefix(9, [4, 6])]
    )


PLANS: dict[str, Callable[[int], Plan]] = {
    "full": lambda n: Plan.dense(2, n + 3, n + 1),
    "causal": _causal,
    "causal_more_rows": lambda n: Plan.dense(2, n + n // 2, n // 2 + 1, causal=True),
    "causal_more_keys": lambda n: Plan.dense(2, n // 2 + 1, 2 * n - 1, causal=True),
    "packed": _packed,
    "packed_unequal": _packed_unequal,
    "window_left": lambda n: Plan.dense(1, 2 * n + 1, 2 * n + 1, causal=True, window=(n // 3, None)),
    "window_both": lambda n: Plan.dense(1, 2 * n - 1, 2 * n + 9, window=(n // 4, n // 5)),
    "packed_window": _packed_window,
    "zigzag_rank_0_of_1": lambda n: Plan.zigzag(cumulative(_documents(n)), 0, 1),
    "zigzag_rank_0_of_2": lambda n: Plan.zigzag(cumulative(_documents(n)), 0, 2),
    "zigzag_rank_1_of_2": lambda n: Plan.zigzag(cumulative(_documents(n)), 1, 2),
    "zigzag_rank_0_of_3": lambda n: Plan.zigzag(cumulative(_documents(n)), 0, 3),
    "zigzag_rank_1_of_3": lambda n: Plan.zigzag(cumulative(_documents(n)), 1, 3),
    "zigzag_rank_2_of_3": lambda n: Plan.zigzag(cumulative(_documents(n)), 2, 3),
    "zigzag_padded": lambda n: Plan.zigzag(cumulative(_documents(n)), 1, 2, rank_stride=2 * n + 13),
    "zigzag_sequence": lambda n: Plan.zigzag(cumulative(_documents(n)), 1, 3, kv_order="sequence"),
    "zigzag_window": lambda n: Plan.zigzag(cumulative(_documents(n)), 1, 2, window=(n // 4, None)),
    "striped": _striped,
    "groups": _groups,
    "shared_prefix": lambda n: Plan.shared_prefix(n + 1, [3, 0, n // 2, 1]),
    "concat": _concat,
    "decode_1": lambda n: Plan.dense(1, 1, 4 * n + 1, causal=True),
    "decode_16": lambda n: Plan.dense(1, 16, 4 * n + 1, causal=True),
    "decode_batch": _decode_batch,
    "strict_causal": lambda n: Plan([Slice(0, n, 0, n, hi=-1)], n, n),
    "prefix_lm": _prefix_lm,
    "unseen": _unseen,
    "odd": lambda _: _odd(),
    "one": lambda _: Plan.dense(1, 1, 1),
    "no_rows": lambda n: Plan.dense(1, 0, n),
    "no_keys": lambda n: Plan.dense(1, n, 0),
    "empty": lambda n: Plan([], n, n + 1),
    "nothing": lambda _: Plan([], 0, 0),
}


@dataclass(frozen=True)
class Case:
    """One attention to compute: everything but the tensors' values.

    Attributes:
        plan: a name of PLANS.
        size: tokens, what the plan is made with.
        head_dim_v: None: as head_dim.
        lse_gradient: the loss reads lse too.
        spread: multiplies q: scores far apart raise what rows are shifted by often.
    """

    plan: str = "causal"
    size: int = INTERPRETED_SIZE
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    softmax_scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    lse_gradient: bool = True
    spread: float = 1.0
    seed: int = 0

    @property
    def dim_v(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `plan_attention` and of `reference_attention` alike."""
        return {"softmax_scale": self.softmax_scale, "softcap": self.softcap}

    def make_plan(self) -> Plan:
        return PLANS[self.plan](self.size)

    def __str__(self) -> str:
        """A short name for a test's id: the plan and what differs from the defaults."""
        plain = Case()
        parts = [self.plan, str(self.dtype).removeprefix("torch.")]
        for name in (
            "size",
            "heads",
            "kv_heads",
            "head_dim",
            "head_dim_v",
            "softmax_scale",
            "softcap",
            "sinks",
            "lse_gradient",
        ):
            if getattr(self, name) != getattr(plain, name):
                parts.append(f"{name}={getattr(self, name)}")
        return "-".join(parts)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, and the gradients that come in from a loss.

    Attributes:
        q, k, v: (total_q, Hq, D), (total_k, Hkv, D), (total_k, Hkv, Dv).
        sinks: (Hq,) float32 or None.
        dout: (total_q, Hq, Dv) like q.
        dlse: (Hq, total_q) float32 or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    dout: torch.Tensor
    dlse: torch.Tensor | None

    def poisoned(self, plan: Plan) -> Inputs:
        """The same, with NaN in every key and value that no row sees."""
        unseen = ~plan.to_mask().any(dim=0).to(self.k.device)
        return replace(self, k=_with_nan(self.k, unseen), v=_with_nan(self.v, unseen))


def _with_nan(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(rows[:, None, None], float("nan"))


def make_inputs(case: Case, plan: Plan, device: torch.device | str = "cpu") -> Inputs:
    """Normal values from the case's seed, the same on every device."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q = (normal(plan.total_q, case.heads, case.head_dim) * case.spread).to(case.dtype)
    k = normal(plan.total_k, case.kv_heads, case.head_dim).to(case.dtype)
    v = normal(plan.total_k, case.kv_heads, case.dim_v).to(case.dtype)
    dout = normal(plan.total_q, case.heads, case.dim_v).to(case.dtype)
    sinks = normal(case.heads) if case.sinks else None
    dlse = normal(case.heads, plan.total_q) if case.lse_gradient else None
    moved = (None if x is None else x.to(device) for x in (q, k, v, sinks, dout, dlse))
    return Inputs(*moved)  # type: ignore[arg-type]
