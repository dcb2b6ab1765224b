"""Builders: from what a caller knows (lengths, ranks, groups) to the slice table of a `Plan`.

Each returns (table, total_q, total_k); `table` is (n, 6) int64 with the columns of `Slice`: q_start, q_len, k_start, k_len, lo,
hi. Bounds may be +-UNBOUNDED; `Plan` clamps them and drops slices that see nothing. Whole batches are built with array
arithmetic: no loop over documents.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from weft_attn.errors import InvalidPlan, WeftError, require
from weft_attn.plan.layouts import Layout, layout_named

IntArray = NDArray[np.int64]
Built = tuple[IntArray, int, int]
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Farther than any two tokens of one tensor.
UNBOUNDED = 2**40

KV_ORDERS = ("rank", "sequence")


# ---- compiled callers -----------------------------------------------------------------------------------------------------


def host_work(work: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`work` that no compiler looks into: a traced graph ends before it.

    torch.compile would turn the array arithmetic that builds a plan into graphs of its own, one behind the other.
    """

    @functools.wraps(work)
    def outside_of_graphs(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            from weft_attn.plan.outside import run_outside

            result: _Result = run_outside(work, *args, **kwargs)
            return result
        return work(*args, **kwargs)

    return outside_of_graphs


# ---- what callers pass ----------------------------------------------------------------------------------------------------


def host_integers(values: Any, name: str) -> IntArray:
    """One-dimensional int64 host array of what a caller passed; refuses floats, booleans and other shapes."""
    if isinstance(values, torch.Tensor):
        try:
            array = values.detach().cpu().numpy()
        except (TypeError, NotImplementedError):
            raise InvalidPlan(
                f"{name} holds integers: expected an integer tensor, given {values.dtype} on {values.device}"
            ) from None
    else:
        try:
            array = np.asarray(values)
        except ValueError:
            raise InvalidPlan(f"{name} is one-dimensional: expected integers, given a ragged sequence") from None
    if array.ndim == 1 and array.size == 0:
        return np.zeros(0, np.int64)
    require(
        array.dtype.kind in "iu",
        f"{name} holds integers",
        expected="an integer dtype",
        given=str(array.dtype),
        error=InvalidPlan,
    )
    require(array.ndim == 1, f"{name} is one-dimensional", expected="shape (n,)", given=array.shape, error=InvalidPlan)
    return array.astype(np.int64)


def host_cu_seqlens(values: Any, name: str = "cu_seqlens") -> IntArray:
    """Checked cumulative lengths, (documents + 1,) int64: from 0, not decreasing."""
    array = host_integers(values, name)
    require(len(array) >= 1, f"{name} starts with 0", expected="(documents + 1,) integers", given="no entry", error=InvalidPlan)
    require(array[0] == 0, f"{name} starts with 0", expected=0, given=int(array[0]), error=InvalidPlan)
    falls = np.flatnonzero(np.diff(array) < 0)
    if len(falls):
        at = int(falls[0])
        raise InvalidPlan(f"{name} does not decrease: expected entry {at + 1} >= {int(array[at])}, given {int(array[at + 1])}")
    return array


def host_integer(value: Any, name: str, low: int, high: int | None = None, *, error: type[WeftError] = InvalidPlan) -> int:
    """A checked Python integer in [low, high]."""
    bound = f">= {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool | np.bool_):
        raise error(f"{name} is an integer: expected an int {bound}, given {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise error(f"{name} is an integer: expected an int {bound}, given {value!r}") from None
    require(
        number >= low and (high is None or number <= high),
        f"{name} is in range",
        expected=bound,
        given=number,
        error=error,
    )
    return number


def iterable(values: Any, name: str, expected: str) -> Iterable[Any]:
    """What can be gone through, as it is."""
    require(
        isinstance(values, Iterable),
        f"{name} are a sequence",
        expected=expected,
        given=type(values).__name__,
        error=InvalidPlan,
    )
    return values


def checked_window(window: Any) -> tuple[int | None, int | None]:
    """(left, right), each None or a non-negative integer."""
    if window is None:
        return None, None
    require(
        isinstance(window, tuple | list) and len(window) == 2,
        "window is (left, right)",
        expected="None or a pair, each None or an integer >= 0",
        given=repr(window),
        error=InvalidPlan,
    )
    left, right = (None if side is None else host_integer(side, "window", 0) for side in window)
    return left, right


# ---- bands ----------------------------------------------------------------------------------------------------------------


def band(diagonal: IntArray, causal: Any, window: Any, step: int = 1) -> tuple[IntArray, IntArray]:
    """(lo, hi) for rows whose own key is `diagonal` tokens past column i: the only place where causal and window become a band.

    With a step, neighbours in a slice are `step` tokens apart, rows and keys alike: column j sits at token j * step.
    """
    require(
        isinstance(causal, bool | np.bool_), "causal is a bool", expected="True or False", given=repr(causal), error=InvalidPlan
    )
    left, right = checked_window(window)
    if causal:
        right = 0
    unbounded = np.full_like(diagonal, UNBOUNDED)
    # -(-x // step) rounds up: the first key inside the window; the last one rounds down.
    lo = -unbounded if left is None else -(-(diagonal - min(left, UNBOUNDED)) // step)
    hi = unbounded if right is None else (diagonal + min(right, UNBOUNDED)) // step
    return lo, hi


def _table(q_start: Any, q_len: Any, k_start: Any, k_len: Any, lo: Any, hi: Any) -> IntArray:
    return np.stack([np.asarray(x, dtype=np.int64) for x in (q_start, q_len, k_start, k_len, lo, hi)], axis=-1).reshape(-1, 6)


# ---- builders -------------------------------------------------------------------------------------------------------------


def dense(batch: Any, seqlen_q: Any, seqlen_k: Any, causal: Any, window: Any) -> Built:
    batch = host_integer(batch, "batch", 0)
    seqlen_q = host_integer(seqlen_q, "seqlen_q", 0)
    seqlen_k = host_integer(seqlen_k, "seqlen_k", 0)
    steps = np.arange(batch + 1, dtype=np.int64)
    return packed(steps * seqlen_q, steps * seqlen_k, causal, window)


def packed(cu_seqlens_q: Any, cu_seqlens_k: Any, causal: Any, window: Any) -> Built:
    cu_q = host_cu_seqlens(cu_seqlens_q, "cu_seqlens_q")
    cu_k = host_cu_seqlens(cu_seqlens_k, "cu_seqlens_k")
    require(
        len(cu_q) == len(cu_k),
        "cu_seqlens_q and cu_seqlens_k hold the same documents",
        expected=f"{len(cu_q)} entries in both",
        given=f"{len(cu_q)} and {len(cu_k)}",
        error=InvalidPlan,
    )
    q_len, k_len = np.diff(cu_q), np.diff(cu_k)
    lo, hi = band(k_len - q_len, causal, window)
    return _table(cu_q[:-1], q_len, cu_k[:-1], k_len, lo, hi), int(cu_q[-1]), int(cu_k[-1])


def from_groups(groups: Any, cu_seqlens_k: Any, causal: Any, window: Any) -> Built:
    cu_k = host_cu_seqlens(cu_seqlens_k, "cu_seqlens_k")
    documents = len(cu_k) - 1
    tables, total_q = [np.zeros((0, 6), np.int64)], 0
    for index, group in enumerate(iterable(groups, "groups", "(cu_seqlens_q, kv_lens) of each")):
        require(
            isinstance(group, tuple | list) and len(group) == 2,
            f"group {index} is a pair",
            expected="(cu_seqlens_q, kv_lens)",
            given=type(group).__name__,
            error=InvalidPlan,
        )
        cu_q = host_cu_seqlens(group[0], f"group {index}: cu_seqlens_q")
        kv_lens = host_integers(group[1], f"group {index}: kv_lens")
        require(
            len(cu_q) == documents + 1 and len(kv_lens) == documents,
            f"group {index} has every document of cu_seqlens_k",
            expected=f"{documents + 1} cu_seqlens_q entries and {documents} kv_lens",
            given=f"{len(cu_q)} and {len(kv_lens)}",
            error=InvalidPlan,
        )
        bad = np.flatnonzero((kv_lens < 0) | (kv_lens > np.diff(cu_k)))
        if len(bad):
            at = int(bad[0])
            raise InvalidPlan(
                f"group {index}: kv_lens[{at}] counts keys of document {at}: "
                f"expected 0 <= kv_len <= {int(np.diff(cu_k)[at])}, given {int(kv_lens[at])}"
            )
        q_len = np.diff(cu_q)
        lo, hi = band(kv_lens - q_len, causal, window)
        tables.append(_table(total_q + cu_q[:-1], q_len, cu_k[:-1], kv_lens, lo, hi))
        total_q += int(cu_q[-1])
    return np.concatenate(tables), total_q, int(cu_k[-1])


def zigzag(cu_seqlens: Any, rank: Any, world_size: Any, kv_order: Any, rank_stride: Any, causal: Any, window: Any) -> Built:
    require(kv_order in KV_ORDERS, "kv_order is known", expected=f"one of {KV_ORDERS}", given=repr(kv_order), error=InvalidPlan)
    if kv_order == "rank":
        return sharded("zigzag", cu_seqlens, rank, world_size, rank_stride, causal, window)
    require(
        rank_stride is None,
        "rank_stride belongs to kv_order='rank'",
        expected="None with kv_order='sequence'",
        given=rank_stride,
        error=InvalidPlan,
    )
    layout, rank = _layout("zigzag", cu_seqlens, rank, world_size)
    return _in_sequence(layout, rank, causal, window)


def sharded(layout: Any, cu_seqlens: Any, rank: Any, world_size: Any, rank_stride: Any, causal: Any, window: Any) -> Built:
    found, rank = _layout(layout, cu_seqlens, rank, world_size)
    if rank_stride is None:
        rank_starts = np.cumsum(found.rank_tokens) - found.rank_tokens
        total_k = int(found.cu_seqlens[-1])
    else:
        largest = int(found.rank_tokens.max())
        rank_stride = host_integer(rank_stride, "rank_stride (rows from one rank's first to the next's)", largest)
        rank_starts = np.arange(found.world_size, dtype=np.int64) * rank_stride
        total_k = found.world_size * rank_stride
    return _in_ranks(found, rank, rank_starts, total_k, causal, window)


def _layout(name: Any, cu_seqlens: Any, rank: Any, world_size: Any) -> tuple[Layout, int]:
    kind = layout_named(name)
    cu = host_cu_seqlens(cu_seqlens)
    world_size = host_integer(world_size, "world_size", 1)
    return kind.of(cu, world_size), host_integer(rank, "rank", 0, world_size - 1)


def _in_sequence(layout: Layout, rank: int, causal: Any, window: Any) -> Built:
    """Keys in the documents' own order, chunks of neighbouring rows: one slice per document and owned chunk."""
    cu = layout.cu_seqlens
    tables = []
    for chunk in layout.owned_chunks(rank):
        lo, hi = band(layout.starts[:, chunk], causal, window)
        k_len = layout.starts[:, chunk] + layout.sizes[:, chunk] if causal else np.diff(cu)
        tables.append(_table(layout.local_starts[:, chunk], layout.sizes[:, chunk], cu[:-1], k_len, lo, hi))
    return np.concatenate(tables), int(layout.rank_tokens[rank]), int(cu[-1])


def _in_ranks(layout: Layout, rank: int, rank_starts: IntArray, total_k: int, causal: Any, window: Any) -> Built:
    """Keys as gathered: one slice per document, owned chunk and visible key chunk; neighbours joined where one band fits."""
    buffer_order = layout.chunks_of_ranks(layout.world_size).ravel()
    query_chunks, key_chunks = [], []
    for chunk in layout.owned_chunks(rank):
        # Chunks of neighbouring rows lie one after the other in the document: later ones hold no visible key.
        visible = buffer_order[buffer_order <= chunk] if causal and layout.step == 1 else buffer_order
        query_chunks.append(np.full_like(visible, chunk))
        key_chunks.append(visible)
    c, j = np.concatenate(query_chunks), np.concatenate(key_chunks)
    sizes = layout.sizes
    k_start = layout.local_starts[:, j] + rank_starts[layout.owner(j)]
    lo, hi = band(layout.starts[:, c] - layout.starts[:, j], causal, window, layout.step)
    table = _table(layout.local_starts[:, c], sizes[:, c], k_start, sizes[:, j], lo, hi)
    table = table[(table[:, 1] > 0) & (table[:, 3] > 0)]
    return join_neighbours(table), int(layout.rank_tokens[rank]), total_k


def join_neighbours(table: IntArray) -> IntArray:
    """Join consecutive slices of the same rows whose keys touch and whose union is one band.

    That holds when the first is open to the right (every row sees up to its last key) and the second to the left: then the
    union is bounded on the left by the first and on the right by the second. A bound may leave a row without keys of its slice,
    but not reach past it, into the other one. Fewer slices, fewer ragged tiles.
    """
    if len(table) < 2:
        return table
    q_start, q_len, k_start, k_len, lo, hi = table.T
    same_rows = (q_start[1:] == q_start[:-1]) & (q_len[1:] == q_len[:-1])
    touching = k_start[1:] == k_start[:-1] + k_len[:-1]
    open_right = hi[:-1] >= k_len[:-1] - 1
    open_left = lo[1:] <= 1 - q_len[1:]
    bounds_keep_inside = (lo[:-1] + q_len[:-1] - 1 <= k_len[:-1]) & (hi[1:] >= -1)
    head = np.concatenate([[True], ~(same_rows & touching & open_right & open_left & bounds_keep_inside)])
    first = np.flatnonzero(head)
    last = np.concatenate([first[1:], [len(table)]]) - 1
    joined = table[first].copy()
    joined[:, 3] = k_start[last] + k_len[last] - k_start[first]
    joined[:, 5] = hi[last] + (k_start[last] - k_start[first])
    return joined


def shared_prefix(prompt_len: Any, response_lens: Any) -> Built:
    prompt = host_integer(prompt_len, "prompt_len", 0)
    lengths = host_integers(response_lens, "response_lens")
    bad = np.flatnonzero(lengths < 0)
    if len(bad):
        raise InvalidPlan(f"response_lens[{bad[0]}] counts tokens: expected >= 0, given {int(lengths[bad[0]])}")
    total = prompt + int(lengths.sum())
    starts = prompt + np.cumsum(lengths) - lengths
    own = _table(starts, lengths, starts, lengths, np.full_like(lengths, -UNBOUNDED), np.zeros_like(lengths))
    prompt_rows = _table([0], [prompt], [0], [prompt], [-UNBOUNDED], [0])
    responses_see_prompt = _table([prompt], [total - prompt], [0], [prompt], [-UNBOUNDED], [UNBOUNDED])
    return np.concatenate([prompt_rows, responses_see_prompt, own]), total, total


def concat_lengths(lengths: Sequence[int]) -> IntArray:
    """(documents + 1,) cumulative lengths of a list of lengths."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)
