"""Who attends to whom: `Slice`, `Plan`, and THE visibility rule.

A slice lets row i of its query rows see column j of its key rows iff

    lo <= j - i <= hi            (None: no bound on that side)

so a row of a slice sees ONE interval of its keys. `visible_interval` below is the only host code that says which; its device
twin is `kernels/triton/visibility.py`, and a test compares the two cell by cell.

Everything here is host integers: numpy, no device, no synchronisation.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from weft_attn.errors import InvalidPlan, require
from weft_attn.plan import build

IntArray = NDArray[np.int64]

# Columns of a slice table.
Q_START, Q_LEN, K_START, K_LEN, LO, HI = range(6)

# Tables cross to the device as int32.
MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of the packed queries that may see rows of the packed keys, under one band.

    Args:
        q_start, q_len: first query row and number of query rows.
        k_start, k_len: first key row and number of key rows.
        lo, hi: row i sees column j iff lo <= j - i <= hi, both counted inside the slice. None: no bound on that side.
    """

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    lo: int | None = None
    hi: int | None = None


def visible_interval(
    row: IntArray | int, k_len: IntArray | int, lo: IntArray | int, hi: IntArray | int
) -> tuple[IntArray, IntArray]:
    """THE visibility rule: row `row` of a slice sees columns [first, stop) of its `k_len` keys.

    Args are integers or arrays that broadcast; `row` is counted inside the slice. The interval is empty when stop <= first.
    """
    first = np.maximum(0, np.add(row, lo))
    stop = np.minimum(k_len, np.add(row, hi) + 1)
    return first, stop


def canonical(table: IntArray) -> IntArray:
    """The same cells in the smallest form: finite bands, no row or key at either end without a visible cell, no empty slice.

    What a slice leaves out here is never read: a NaN in a key that no row sees reaches nothing.

    Args:
        table: (n, 6) int64, columns Q_START .. HI; bounds may be `build.UNBOUNDED` of either sign.
    """
    table = table[count_pairs(table) > 0]
    q_len, k_len, lo, hi = table[:, Q_LEN], table[:, K_LEN], table[:, LO], table[:, HI]
    # Keys before lo are seen by no row, and those from q_len + hi on; rows alike.
    first_key, first_row = np.maximum(lo, 0), np.maximum(-hi, 0)
    out = table.copy()
    out[:, K_START] += first_key
    out[:, Q_START] += first_row
    out[:, K_LEN] = np.minimum(k_len, q_len + hi) - first_key
    out[:, Q_LEN] = np.minimum(q_len, k_len - lo) - first_row
    out[:, LO] = np.maximum(lo - first_key + first_row, 1 - out[:, Q_LEN])
    out[:, HI] = np.minimum(hi - first_key + first_row, out[:, K_LEN] - 1)
    return out


def count_pairs(table: IntArray) -> IntArray:
    """Visible (row, column) pairs of each slice of a table, in closed form, (n,) int64."""
    q_len, k_len = table[:, Q_LEN], table[:, K_LEN]

    def clipped_sum(stop: IntArray) -> IntArray:
        """Sum of clip(t, 0, k_len) over all integers t < stop."""
        ramp = np.clip(stop, 0, k_len)
        return ramp * (ramp - 1) // 2 + k_len * np.maximum(stop - k_len, 0)

    def columns_before(offset: IntArray) -> IntArray:
        """Sum over the rows i of clip(i + offset, 0, k_len)."""
        return clipped_sum(q_len + offset) - clipped_sum(offset)

    lo, hi = table[:, LO], table[:, HI]
    pairs = columns_before(hi + 1) - columns_before(lo)
    return np.where((hi >= lo) & (q_len > 0) & (k_len > 0), pairs, 0)


def transpose(table: IntArray) -> IntArray:
    """The same cells with keys as rows and queries as columns: the backward's view of a plan."""
    return np.stack(
        [table[:, K_START], table[:, K_LEN], table[:, Q_START], table[:, Q_LEN], -table[:, HI], -table[:, LO]], axis=1
    )


def elementary_segments(table: IntArray, total_rows: int) -> IntArray:
    """Sorted row boundaries, from 0 to total_rows, between which the set of slices does not change."""
    starts, lengths = table[:, Q_START], table[:, Q_LEN]
    bounds = np.sort(np.concatenate([starts, starts + lengths, np.array([0, total_rows])]), kind="stable")
    return bounds[np.concatenate([[True], bounds[1:] != bounds[:-1]])]


def _find_overlap(table: IntArray, total_q: int) -> tuple[int, int] | None:
    """Indices of two slices that share a query row and a key, or None."""
    if len(table) < 2:
        return None
    bounds = elementary_segments(table, total_q)
    first = np.searchsorted(bounds, table[:, Q_START])
    stop = np.searchsorted(bounds, table[:, Q_START] + table[:, Q_LEN])
    owner = np.repeat(np.arange(len(table)), stop - first)
    segment = np.arange(len(owner)) + np.repeat(first - np.concatenate([[0], np.cumsum(stop - first)[:-1]]), stop - first)
    k_start = table[owner, K_START]
    order = np.lexsort((k_start, segment))
    owner, segment, k_start = owner[order], segment[order], k_start[order]
    k_stop = k_start + table[owner, K_LEN]
    clash = np.flatnonzero((segment[1:] == segment[:-1]) & (k_start[1:] < k_stop[:-1]))
    return None if len(clash) == 0 else (int(owner[clash[0]]), int(owner[clash[0] + 1]))


def _as_index(value: Any, name: str) -> int:
    if isinstance(value, bool | np.bool_):
        raise InvalidPlan(f"{name} is an integer: expected an int, given {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidPlan(f"{name} is an integer: expected an int, given {value!r}") from None


def _restore(table: NDArray[np.int32], total_q: int, total_k: int) -> Plan:
    """A pickled plan."""
    return Plan._from_table(table.astype(np.int64), total_q, total_k)


# By the address of its table: how an operator, which is passed the table, finds the plan and its cached device tables again.
live_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


class Plan:
    """A set of slices over `total_q` packed query rows and `total_k` packed key rows.

    Slices that share a query row have disjoint key ranges; a row that sees no key gives out = 0 and lse = -inf. Built on the
    host, once per batch, and reused by every layer; the tables that kernels read are cached inside, per device. A plan is
    immutable: do not write into its arrays.

    Args:
        slices: the `Slice`s, in any order.
        total_q: rows of the packed query tensor.
        total_k: rows of the packed key and value tensors.

    Attributes:
        table: (n, 6) int32 CPU tensor of the slices that have a visible pair, the form that crosses the op boundary.

    Raises:
        InvalidPlan: a field is no integer, a slice leaves the tensors, or two slices share a query row and a key.

    Example:
        >>> import weft_attn as weft
        >>> plan = weft.Plan([weft.Slice(0, 4, 0, 6, hi=2)], total_q=4, total_k=6)
        >>> plan.pairs
        18
    """

    def __init__(self, slices: Iterable[Slice], total_q: int, total_k: int) -> None:
        rows: list[tuple[int, ...]] = []
        for index, item in enumerate(build.iterable(slices, "slices", "any number of weft_attn.Slice")):
            require(
                isinstance(item, Slice),
                f"slice {index} is a Slice",
                expected="weft_attn.Slice",
                given=type(item).__name__,
                error=InvalidPlan,
            )
            lo = -build.UNBOUNDED if item.lo is None else _as_index(item.lo, f"slice {index}: lo")
            hi = build.UNBOUNDED if item.hi is None else _as_index(item.hi, f"slice {index}: hi")
            spans = [_as_index(getattr(item, f), f"slice {index}: {f}") for f in ("q_start", "q_len", "k_start", "k_len")]
            rows.append((*spans, _saturate(lo), _saturate(hi)))
        total_q, total_k = _as_index(total_q, "total_q"), _as_index(total_k, "total_k")
        for name, total in (("total_q", total_q), ("total_k", total_k)):
            require(
                0 <= total <= MAX_TOKENS,
                f"{name} counts rows",
                expected=f"0 <= {name} <= {MAX_TOKENS}",
                given=total,
                error=InvalidPlan,
            )
        for index, row in enumerate(rows):
            for side, start, length, total in (("q", row[0], row[1], total_q), ("k", row[2], row[3], total_k)):
                require(
                    start >= 0 and length >= 0 and start + length <= total,
                    f"slice {index} lies inside the {side} rows",
                    expected=f"0 <= {side}_start, 0 <= {side}_len, {side}_start + {side}_len <= {total}",
                    given=f"{side}_start={start}, {side}_len={length}",
                    error=InvalidPlan,
                )
        self._set(np.array(rows, dtype=np.int64).reshape(-1, 6), total_q, total_k)
        self.check()

    @classmethod
    def _from_table(cls, table: IntArray, total_q: int, total_k: int) -> Plan:
        """A plan from rows that a builder made: their disjointness is the builder's promise (its tests call `check`)."""
        plan = cls.__new__(cls)
        plan._set(table, total_q, total_k)
        return plan

    def _set(self, table: IntArray, total_q: int, total_k: int) -> None:
        require(
            max(total_q, total_k) <= MAX_TOKENS,
            "a plan's tensors hold at most 2**31 - 1 rows",
            expected=f"<= {MAX_TOKENS}",
            given=max(total_q, total_k),
            error=InvalidPlan,
        )
        self.total_q = int(total_q)
        self.total_k = int(total_k)
        rows = canonical(table)
        # A plan that is made in inference mode may be trained with afterwards.
        with torch.inference_mode(False):
            self.table: torch.Tensor = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int32))
        # Filled by plan/stream.py: work tiles by (kernel tile sizes, device).
        self._streams: dict[Any, Any] = {}
        # Filled by ops/recipes.py: what a pass over this plan launches, by how its tensors lie in memory.
        self._recipes: dict[Any, Any] = {}
        # Filled by ops/warm.py: layouts of tensors that have been checked against this plan.
        self._warm: dict[Any, Any] = {}
        live_plans[self.table.data_ptr()] = self

    def __copy__(self) -> Plan:
        """The same plan: it is immutable, and what is kept with it serves every holder."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self

    def __reduce__(self) -> Any:
        # What a plan says; what is kept with it belongs to this process.
        return _restore, (self.table.numpy(), self.total_q, self.total_k)

    # ---- builders -----------------------------------------------------------------------------------------------------

    @classmethod
    @build.host_work
    def dense(
        cls,
        batch: int,
        seqlen_q: int,
        seqlen_k: int,
        *,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
    ) -> Plan:
        """`batch` sequences of equal length, packed one after the other.

        Args:
            batch, seqlen_q, seqlen_k: numbers of sequences, of rows and of keys in each.
            causal: the last row is aligned with the last key (the FlashAttention convention).
            window: (left, right) keys around the aligned diagonal; None on a side: no bound.

        Raises:
            InvalidPlan: a negative size, or a window that is no pair of None or non-negative integers.
        """
        return cls._from_table(*build.dense(batch, seqlen_q, seqlen_k, causal, window))

    @classmethod
    @build.host_work
    def from_cu_seqlens(
        cls,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        *,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
    ) -> Plan:
        """Packed documents: rows of document d see keys of document d.

        Args:
            cu_seqlens_q, cu_seqlens_k: (documents + 1,) integers from 0, not decreasing; a list, a numpy array or a tensor.
                A tensor on a device is copied to the host, which waits for it: pass host integers.
            causal, window: as in `dense`, per document.

        Raises:
            InvalidPlan: not from 0, decreasing, not integers, or different numbers of documents.
        """
        return cls._from_table(*build.packed(cu_seqlens_q, cu_seqlens_k, causal, window))

    @classmethod
    @build.host_work
    def from_groups(
        cls,
        groups: Sequence[tuple[Any, Any]],
        cu_seqlens_k: Any,
        causal: bool = True,
        *,
        window: tuple[int | None, int | None] | None = None,
    ) -> Plan:
        """Many query groups over one stream of keys.

        Args:
            groups: (cu_seqlens_q, kv_lens) of each group. Group g's rows of document d see the first kv_lens[d] keys of
                document d; the packed queries are the groups' rows in order, one group after the other.
            cu_seqlens_k: (documents + 1,) of the keys.
            causal: the last row of a group's document is aligned with key kv_lens[d] - 1.
            window: as in `dense`, relative to the same diagonal.

        Raises:
            InvalidPlan: as `from_cu_seqlens`, or a kv_lens entry that is negative or exceeds its document.
        """
        return cls._from_table(*build.from_groups(groups, cu_seqlens_k, causal, window))

    @classmethod
    @build.host_work
    def zigzag(
        cls,
        cu_seqlens: Any,
        rank: int,
        world_size: int,
        kv_order: str = "rank",
        rank_stride: int | None = None,
        *,
        causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
    ) -> Plan:
        """One rank's rows under zigzag context parallelism, over the gathered keys of all ranks.

        Document of L tokens: chunk j of 2W is rows [j*L // 2W, (j+1)*L // 2W); rank r owns chunks r and 2W-1-r of every
        document, packed document by document (early chunk, late chunk). Documents may have any length, 0 included.

        Args:
            cu_seqlens: (documents + 1,) of the whole batch.
            rank, world_size: 0 <= rank < world_size.
            kv_order: "rank": keys as an all-gather leaves them, rank 0's rows, rank 1's rows, ...; "sequence": in the
                documents' own order.
            rank_stride: with kv_order "rank": rank r's rows begin at r * rank_stride (a buffer whose ranks are padded to
                equal size; the padding is never read). None: they follow each other without gaps.
            causal, window: as in `dense`, in positions of the whole document.

        Raises:
            InvalidPlan: bad cu_seqlens, rank or world size out of range, unknown kv_order, a rank_stride smaller than the
                largest rank or given with kv_order "sequence".
        """
        return cls._from_table(*build.zigzag(cu_seqlens, rank, world_size, kv_order, rank_stride, causal, window))

    @classmethod
    @build.host_work
    def sharded(
        cls,
        layout: str,
        cu_seqlens: Any,
        rank: int,
        world_size: int,
        rank_stride: int | None = None,
        *,
        causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
    ) -> Plan:
        """One rank's rows under a context-parallel layout, over the keys of all ranks as an all-gather leaves them.

        Args:
            layout: "zigzag" (as `zigzag`); "contiguous": rank r owns rows [r*L // W, (r+1)*L // W) of every document of L
                tokens; "striped": rows r, r + W, r + 2W, ... of every document.
            cu_seqlens, rank, world_size, rank_stride, causal, window: as in `zigzag`.

        Raises:
            InvalidInput: an unknown layout.
            InvalidPlan: as `zigzag`.
        """
        return cls._from_table(*build.sharded(layout, cu_seqlens, rank, world_size, rank_stride, causal, window))

    @classmethod
    @build.host_work
    def shared_prefix(cls, prompt_len: int, response_lens: Sequence[int]) -> Plan:
        """One prompt and n responses, packed [prompt, response 0, response 1, ...]: each response sees the prompt and itself.

        Args:
            prompt_len: tokens of the prompt.
            response_lens: tokens of each response.

        Raises:
            InvalidPlan: a negative or non-integer length.
        """
        return cls._from_table(*build.shared_prefix(prompt_len, response_lens))

    @classmethod
    @build.host_work
    def concat(cls, plans: Sequence[Plan]) -> Plan:
        """Plans side by side: the rows and keys of each follow those of the one before, and see nothing of the others."""
        for index, plan in enumerate(plans):
            require(
                isinstance(plan, Plan),
                f"entry {index} is a Plan",
                expected="weft_attn.Plan",
                given=type(plan).__name__,
                error=InvalidPlan,
            )
        tables, q, k = [np.zeros((0, 6), np.int64)], 0, 0
        for plan in plans:
            tables.append(plan.rows + np.array([q, 0, k, 0, 0, 0]))
            q, k = q + plan.total_q, k + plan.total_k
        return cls._from_table(np.concatenate(tables), q, k)

    # ---- what a plan says ---------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> IntArray:
        """(n, 6) int64: the canonical slices (finite bands, no slice without a visible pair)."""
        return self.table.numpy().astype(np.int64)

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The canonical slices: same cells as those given, bands finite, slices that see nothing left out."""
        return tuple(Slice(*(int(x) for x in row)) for row in self.rows)

    @cached_property
    def pairs(self) -> int:
        """Number of visible (row, key) pairs: the work of the plan for one query head."""
        return int(count_pairs(self.rows).sum())

    @property
    def keys_per_query(self) -> float:
        """Visible keys of a query row, in the mean."""
        return self.pairs / max(1, self.total_q)

    def check(self) -> None:
        """Raise `InvalidPlan` unless every slice lies inside the tensors and slices that share a row have disjoint keys."""
        rows = self.rows
        for start, length, total, side in (
            (rows[:, Q_START], rows[:, Q_LEN], self.total_q, "q"),
            (rows[:, K_START], rows[:, K_LEN], self.total_k, "k"),
        ):
            bad = np.flatnonzero((start < 0) | (length < 0) | (start + length > total))
            if len(bad):
                raise InvalidPlan(f"slices lie inside the {side} rows: expected [0, {total}), given {self.slices[bad[0]]}")
        clash = _find_overlap(rows, self.total_q)
        if clash is not None:
            one, other = (self.slices[i] for i in clash)
            raise InvalidPlan(
                f"slices that share a query row have disjoint keys: expected no common key, given {one} and {other}"
            )

    def to_mask(self) -> torch.Tensor:
        """The plan as (total_q, total_k) bool on the CPU: True where the row sees the key. For tests and small plans."""
        mask = np.zeros((self.total_q, self.total_k), dtype=bool)
        for q_start, q_len, k_start, k_len, lo, hi in self.rows.tolist():
            first, stop = visible_interval(np.arange(q_len), k_len, lo, hi)
            columns = np.arange(k_len)
            mask[q_start : q_start + q_len, k_start : k_start + k_len] |= (columns >= first[:, None]) & (
                columns < stop[:, None]
            )
        return torch.from_numpy(mask)

    def draw(self, path: str | Path, *, title: str | None = None) -> Path:
        """Write a picture of the plan (format by the suffix of `path`) and return its path. Needs matplotlib (`[draw]`).

        Raises:
            Unsupported: (a ValueError) matplotlib is not installed.
            InvalidInput: (a ValueError) a suffix that is no format of pictures, or a place that takes no file.
        """
        from weft_attn.plan.draw import draw_plans

        return draw_plans([(title or repr(self), self)], path)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return (self.total_q, self.total_k) == (other.total_q, other.total_k) and torch.equal(self.table, other.table)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.total_q, self.total_k, self.table.numpy().tobytes()))

    def __repr__(self) -> str:
        return f"Plan({len(self.table)} slices, total_q={self.total_q}, total_k={self.total_k}, pairs={self.pairs})"


def _saturate(bound: int) -> int:
    """Keep an arbitrary Python integer inside int64: farther than any tensor is as good as unbounded."""
    return max(-build.UNBOUNDED, min(build.UNBOUNDED, bound))
