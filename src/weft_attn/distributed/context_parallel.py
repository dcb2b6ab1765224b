"""`ContextParallel`: one batch of packed documents over the ranks of a group, and attention over all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, overload

import numpy as np
import torch

from weft_attn import checks
from weft_attn.api import AttentionOutput, Window, plan_attention
from weft_attn.distributed.agreement import require_agreement
from weft_attn.distributed.collectives import Ranks
from weft_attn.distributed.gathered import Call, gathered_attention
from weft_attn.distributed.groups import Groups, head_groups, head_times
from weft_attn.distributed.memory import Memory, plan_memory
from weft_attn.distributed.shard import ShardedBatch, next_tokens, shard_rows, sharded_batch, unshard_rows
from weft_attn.distributed.symmetric import windows_of
from weft_attn.errors import InvalidInput, WeftError, require
from weft_attn.ops.plain import refuse_tangents
from weft_attn.plan import build
from weft_attn.plan.layouts import layout_named
from weft_attn.plan.slices import Plan

_Checked = TypeVar("_Checked")
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _outside_of_graphs(method: _Method) -> _Method:
    """`method` that no compiler looks into: index maps are built on the host, and collectives wait for one another."""
    reason = (
        "ContextParallel works outside of compiled graphs: expected torch.compile without fullgraph=True, or a call before the "
        f"graph, given a call of {method.__name__} in one"
    )
    return torch.compiler.disable(method, reason=reason)


class ContextParallel:
    """Attention over documents whose rows are spread over the ranks of a group.

    Keys and values are gathered from all ranks, a group of KV heads at a time, while attention runs on the group before; their
    gradients are summed over ranks in the same way. Any number of KV heads serves any number of ranks. A world of one rank makes
    no collective call. Every rank makes the same calls in the same order, with the same cu_seqlens, and runs the backward if any
    rank does, a rank without rows too. A collective waits as long as the process group's timeout allows, then raises.

    Args:
        group: a `torch.distributed` process group or one dimension of a device mesh (`mesh["cp"]`). None: the default group,
            or one rank where there is none, as long as there is none.
        layout: which rows a rank owns of each document of L tokens, W ranks. "zigzag": chunks r and 2W-1-r of 2W equal ones,
            which balances causal work; "contiguous": rows [r*L // W, (r+1)*L // W); "striped": rows r, r + W, r + 2W, ...
        max_gather_bytes: the most that gathered keys and values and their gradients take at a time (see `memory`), and so how
            many heads are gathered together at most. None: 4 GiB.
        keep_gathered: keep gathered keys and values from forward to backward (`Memory.kept` bytes a call, beyond the cap)
            instead of gathering them again.
        grad_reduce_dtype: dtype in which the ranks' gradients of keys and values are summed; they leave the kernels in it.
        debug: before the first collective of a call, compare the calls of all ranks; costs a small collective and a wait. Where
            they differ, or one rank refuses its arguments, all raise and name the ranks; what is no refusal, such as memory that runs
            out on one rank, still leaves the others waiting. Without it, a rank that raises leaves the others waiting until the group's
            timeout, or, where its error is caught, its next call meets theirs: no result of a group that a rank has raised in is to be
            used. Equal on all ranks.
        symmetric_memory: gather into memory that is registered with the group's NCCL communicator, so that the copy engines of GPUs
            that NVLink connects gather, and no multiprocessors, where the group was made with `ProcessGroupNCCL.Options` whose
            `config.cta_policy` is `NCCL_CTA_POLICY_ZERO`. PyTorch calls that interface alpha, and takes it from NCCL for the whole
            process then. The memory is NCCL's, not of PyTorch's allocator, and held as long as the group: what the largest call gathers, up
            to four times that where batches grow, so at most four times max_gather_bytes. Not with keep_gathered, nor in a CUDA graph.
            Equal on all ranks.

    Attributes:
        rank, world_size: of this process in the group.

    Raises:
        InvalidInput: (a ValueError) a group that this process is not part of, a mesh of several dimensions, an unknown layout,
            or a bad option.
        Unsupported: (a ValueError) symmetric_memory of a group whose GPUs do not use NCCL, or where PyTorch cannot take it from NCCL.

    Example:
        >>> import torch, weft_attn as weft
        >>> cp = weft.ContextParallel()
        >>> cu_seqlens = [0, 5, 12]
        >>> x = cp.shard(cu_seqlens, torch.randn(12, 2, 16))
        >>> out = cp.attention(x, x, x, cu_seqlens)
        >>> cp.unshard(cu_seqlens, out).shape
        torch.Size([12, 2, 16])

    Source: all-gather context parallelism as in Llama 3 (2024), balanced as in zigzag ring attention (zhuzilin, 2024).
    """

    def __init__(
        self,
        group: Any = None,
        layout: str = "zigzag",
        *,
        max_gather_bytes: int | None = None,
        keep_gathered: bool = False,
        grad_reduce_dtype: torch.dtype = torch.float32,
        debug: bool = False,
        symmetric_memory: bool = False,
    ) -> None:
        layout_named(layout)
        if max_gather_bytes is not None:
            max_gather_bytes = build.host_integer(max_gather_bytes, "max_gather_bytes", 1, error=InvalidInput)
        require(
            grad_reduce_dtype in checks.DTYPES,
            "grad_reduce_dtype is fp16, bf16 or fp32",
            expected=checks.DTYPES,
            given=grad_reduce_dtype,
        )
        self.layout = layout
        self.max_gather_bytes = max_gather_bytes
        self.keep_gathered = checks.flag(keep_gathered, "keep_gathered")
        self.grad_reduce_dtype = grad_reduce_dtype
        self.debug = checks.flag(debug, "debug")
        self.symmetric_memory = checks.flag(symmetric_memory, "symmetric_memory")
        require(
            not (self.symmetric_memory and self.keep_gathered),
            "keys that a call keeps lie in memory of their own",
            expected="symmetric_memory or keep_gathered",
            given="both",
        )
        self._ranks = Ranks.of(group)
        self._windows = windows_of(self._ranks) if self.symmetric_memory and self.world_size > 1 else None

    @property
    def rank(self) -> int:
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        return self._ranks.world_size

    def __repr__(self) -> str:
        return f"ContextParallel(rank {self.rank} of {self.world_size}, layout={self.layout!r})"

    # ---- rows ---------------------------------------------------------------------------------------------------------

    @overload
    def shard(self, cu_seqlens: Any, x: torch.Tensor) -> torch.Tensor: ...

    @overload
    def shard(self, cu_seqlens: Any, x: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...

    @_outside_of_graphs
    def shard(self, cu_seqlens: Any, x: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
        """The rows of a whole batch's tensor that this rank owns, in its packed order: document by document.

        Args:
            cu_seqlens: (documents + 1,) integers of the whole batch, on the host.
            x: (T, ...) on any device, or a dict of such tensors.

        Returns:
            (T_local, ...), or a dict of them; a copy, differentiable: other ranks' rows get zero gradients here. No collective.

        Raises:
            InvalidInput, InvalidPlan: (both ValueError) bad cu_seqlens, or x does not have their rows.
        """
        batch = self._batch(cu_seqlens)
        if isinstance(x, Mapping):
            return {name: shard_rows(batch, _of_rows(value, name, batch.total)) for name, value in x.items()}
        return shard_rows(batch, _of_rows(x, "x", batch.total))

    @_outside_of_graphs
    def unshard(self, cu_seqlens: Any, local: torch.Tensor) -> torch.Tensor:
        """The inverse of `shard` over the group: all ranks' rows, in the batch's own order, on every rank; collective.

        Args:
            cu_seqlens: as in `shard`.
            local: (T_local, ...), same dtype and trailing dimensions on every rank.

        Returns:
            (T, ...), a copy. Differentiable: the backward, collective too, adds up the gradients that all ranks have of this rank's
            rows, as for a loss that is the sum of the ranks' losses; in grad_reduce_dtype, or local's own if that is wider.

        Raises:
            InvalidInput, InvalidPlan: (both ValueError) bad cu_seqlens, or local does not have this rank's rows.
        """

        def checked() -> ShardedBatch:
            batch = self._batch(cu_seqlens)
            _of_rows(local, "local", batch.local)
            return batch

        batch = self._agreed(
            checked,
            lambda batch: {
                "call": "unshard",
                "cu_seqlens": batch.layout.cu_seqlens.tobytes(),
                "layout": self.layout,
                "heads and dims": tuple(local.shape[1:]),
                "dtype": local.dtype,
                "gradients": (torch.is_grad_enabled() and local.requires_grad, self.grad_reduce_dtype),
            },
        )
        return local.clone() if self.world_size == 1 else unshard_rows(batch, local, self._ranks, self.grad_reduce_dtype)

    @_outside_of_graphs
    def position_ids(self, cu_seqlens: Any, *, device: torch.device | str | int | None = None) -> torch.Tensor:
        """(T_local,) int64: the place of each of this rank's rows inside its document.

        Args:
            cu_seqlens: as in `shard`.
            device: where the result lies; None: the CPU.
        """
        return self._batch(cu_seqlens).on(torch.device("cpu" if device is None else device), "positions").clone()

    @_outside_of_graphs
    def shift_labels(self, cu_seqlens: Any, ids: torch.Tensor) -> torch.Tensor:
        """Next-token labels of this rank's rows, shifted in the whole batch, before it is cut.

        Args:
            cu_seqlens: as in `shard`.
            ids: (T,) signed integers, the whole batch's tokens.

        Returns:
            (T_local,) in ids' dtype: the token that follows in the document; -100 for the last token of a document.

        Raises:
            InvalidInput, InvalidPlan: (both ValueError) bad cu_seqlens, or ids of another shape or dtype.
        """
        batch = self._batch(cu_seqlens)
        _of_rows(ids, "ids", batch.total)
        require(ids.ndim == 1, "ids has one dimension", expected="(T,)", given=tuple(ids.shape))
        signed = (torch.int64, torch.int32, torch.int16)
        require(ids.dtype in signed, "ids are signed integers, which hold -100", expected=signed, given=ids.dtype)
        return shard_rows(batch, next_tokens(batch, ids))

    # ---- attention ----------------------------------------------------------------------------------------------------

    @_outside_of_graphs
    def plan(self, cu_seqlens: Any, *, causal: bool = True, window: Window | None = None) -> Plan:
        """Who this rank's rows attend to: keys of all ranks in rank order, rank r's from r times the largest rank's rows.

        Args:
            cu_seqlens: as in `shard`.
            causal, window: in positions of the whole document; window (left, right), None on a side: no bound.

        Returns:
            A plan, kept for the batch, so that every layer uses the same one.

        Raises:
            InvalidInput, InvalidPlan: (both ValueError) bad cu_seqlens, causal or window.
        """
        return self._batch(cu_seqlens).plan(checks.flag(causal, "causal"), build.checked_window(window))

    @_outside_of_graphs
    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: Any,
        *,
        causal: bool = True,
        window: Window | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        deterministic: bool = False,
        return_lse: bool = False,
    ) -> AttentionOutput:
        """Exact attention of this rank's rows over the documents of all ranks; collective, forward and backward.

        Args:
            q: (T_local, Hq, D), k: (T_local, Hkv, D), v: (T_local, Hkv, Dv), this rank's rows as `shard` orders them; dtypes
                and head dims as `weft.attention`. T_local may be 0.
            cu_seqlens: (documents + 1,) integers of the whole batch, on the host.
            causal, window: per document, in positions of the whole document.
            softmax_scale, softcap: as in `weft.attention`.
            sinks: (Hq,) logits, the same on every rank. Their gradient here is this rank's rows' part, like that of any
                parameter that ranks hold copies of: sum it over the group.
            deterministic, return_lse: as in `weft.attention`.

        Returns:
            out (T_local, Hq, Dv) in q's dtype; with return_lse also lse (Hq, T_local) float32, natural log. Differentiable
            once: gradients of k and v are those of all ranks' rows, summed in grad_reduce_dtype.

        Raises:
            InvalidInput, InvalidPlan: (both ValueError) as `weft.varlen_attention`; tensors that do not have this rank's rows;
                a max_gather_bytes that one head exceeds; with debug, ranks that differ. All before the first collective.
            Unsupported: (a ValueError) no kernel config fits the device; with symmetric_memory also, before the first collective, tensors
                on no GPU or a CUDA graph being captured.
            RuntimeError: on all ranks, one has no room for symmetric memory.

        Determinism and memory: as `weft.attention`, where the group's collectives repeat their bits (gloo's do; NCCL's for the same
        ranks and topology). Saves q, k, v, out and lse; `memory` says what is gathered. Under torch.compile it runs outside the graph.
        """

        # First: debug mode's collective would break the capture.
        if self._windows is not None:
            self._windows.require_no_capture()
        active = current_batch()
        if active is not None:
            active.attended += 1

        def needed() -> tuple[bool, ...]:
            return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (q, k, v, sinks))

        def checked() -> tuple[ShardedBatch, Call]:
            checks.qkv(q, k, v, packed=True)
            checks.sink_logits(sinks, q)
            refuse_tangents(q, k, v, sinks)
            checks.flag(return_lse, "return_lse")
            if self._windows is not None:
                self._windows.require_gpu(q.device)
            batch = self._batch(cu_seqlens)
            checks.totals(q, k, batch.local, batch.local, "this rank's part of cu_seqlens")
            trains = any(needed())
            keeps = self.keep_gathered and trains
            memory = self._memory(batch, k.shape[1], k.shape[2], v.shape[2], k.dtype, keeps, trains=trains)
            mask = checks.flag(causal, "causal"), build.checked_window(window)
            call = Call(
                plan=batch.plan(*mask),
                ranks=self._ranks,
                rank_stride=batch.rank_stride,
                groups=self._groups(batch, mask, q, k, v, memory, keeps),
                largest=memory.largest,
                in_turn=memory.in_turn,
                softmax_scale=checks.scale(softmax_scale, q.shape[2]),
                softcap=checks.number(softcap, "softcap"),
                deterministic=checks.flag(deterministic, "deterministic"),
                keep_gathered=keeps,
                grad_reduce_dtype=self.grad_reduce_dtype,
                windows=self._windows,
            )
            return batch, call

        def facts(found: tuple[ShardedBatch, Call]) -> dict[str, object]:
            batch, call = found
            return {
                "call": "attention",
                "cu_seqlens": batch.layout.cu_seqlens.tobytes(),
                "layout": self.layout,
                "heads and dims": (q.shape[1:], k.shape[1:], v.shape[1:]),
                "dtype": q.dtype,
                "kind of device": q.device.type,
                "mask": (bool(causal), build.checked_window(window)),
                "scalars": (call.softmax_scale, call.softcap, call.deterministic, sinks is not None),
                "gradients": (needed(), call.keep_gathered, call.grad_reduce_dtype),
                "groups of heads": (call.groups, call.largest, call.in_turn),
                "symmetric memory": call.windows is not None,
            }

        _, call = self._agreed(checked, facts)
        if self.world_size == 1:
            return plan_attention(
                q,
                k,
                v,
                call.plan,
                softmax_scale=softmax_scale,
                softcap=softcap,
                sinks=sinks,
                deterministic=deterministic,
                return_lse=return_lse,
            )
        # Outside the operator, so that autograd casts the gradient back to the caller's dtype.
        out, lse = gathered_attention(q, k, v, None if sinks is None else sinks.to(torch.float32), call)
        return (out, lse) if return_lse else out

    @_outside_of_graphs
    def memory(
        self,
        cu_seqlens: Any,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        dtype: torch.dtype,
    ) -> Memory:
        """What `attention` takes on this rank beyond its own tensors, and how many KV heads it gathers together at most.

        Args:
            cu_seqlens: as in `shard`.
            heads, kv_heads, head_dim, head_dim_v: of the attention; head_dim_v None: as head_dim.
            dtype: of q, k and v.

        Returns:
            `Memory`, in bytes, with the formula.

        Raises:
            InvalidInput, InvalidPlan: (both ValueError) bad sizes, or one head exceeds max_gather_bytes.
        """
        heads = build.host_integer(heads, "heads", 1)
        kv_heads = build.host_integer(kv_heads, "kv_heads", 1)
        require(
            heads % kv_heads == 0,
            "query heads are a multiple of KV heads",
            expected="heads % kv_heads == 0",
            given=(heads, kv_heads),
        )
        require(dtype in checks.DTYPES, "dtype is fp16, bf16 or fp32", expected=checks.DTYPES, given=dtype)
        dims = {"head_dim": head_dim, "head_dim_v": head_dim if head_dim_v is None else head_dim_v}
        head_dim, head_dim_v = (checks.head_dim(build.host_integer(dim, name, 0), name) for name, dim in dims.items())
        return self._memory(self._batch(cu_seqlens), kv_heads, head_dim, head_dim_v, dtype, self.keep_gathered)

    # ---- a batch that models attend under -----------------------------------------------------------------------------

    @_outside_of_graphs
    def batch(self, cu_seqlens: Any) -> AbstractContextManager[ActiveBatch]:
        """Inside, models whose attention is Weft's attend under this batch; `current_batch()` says which.

        The block holds for the whole process, not for a thread. Run the backward inside too where activations are recomputed in
        it (checkpointing). What needs no model (`shard`, `attention`, the replay of a CUDA graph) needs no block.

        A model under any other attention would see this rank's rows alone, without a word: a block that ends without an error and
        in which nothing attended raises, on one rank as on many. Attention over ranks counts, of a model, of `attention` or in a
        recomputation; what runs in a block within this one counts there. Of several models in a block, one is enough: give
        "weft" to each (vision towers, whose rows are no tokens of the batch, keep their own attention).

        Raises:
            InvalidInput, InvalidPlan: (both ValueError) bad cu_seqlens; at the end of the block, where nothing attended in it, with
                debug on all ranks.
        """
        # A copy: what the caller does to a tensor of his inside the block changes no batch.
        return _attended_under(ActiveBatch(self, self._batch(cu_seqlens).layout.cu_seqlens))

    # ---- helpers ------------------------------------------------------------------------------------------------------

    def _batch(self, cu_seqlens: Any) -> ShardedBatch:
        on_host = not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.device.type == "cpu"
        require(
            on_host, "cu_seqlens lies on the host", expected="a list, a numpy array or a CPU tensor", given="a device tensor"
        )
        self._ranks.require_current()
        return sharded_batch(self.layout, build.host_cu_seqlens(cu_seqlens).tobytes(), self.rank, self.world_size)

    def _memory(
        self,
        batch: ShardedBatch,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int,
        dtype: torch.dtype,
        keeps: bool,
        trains: bool = True,
    ) -> Memory:
        """Of a call that has a backward, unless it does not train."""
        return plan_memory(
            world_size=self.world_size,
            rank_stride=batch.rank_stride,
            kv_heads=kv_heads,
            head_dims=head_dim + head_dim_v,
            element_bytes=dtype.itemsize,
            gradient_bytes=self.grad_reduce_dtype.itemsize if trains else 0,
            limit=self.max_gather_bytes,
            keep_gathered=keeps,
        )

    def _groups(
        self,
        batch: ShardedBatch,
        mask: tuple[bool, Window],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        memory: Memory,
        keeps: bool,
    ) -> Groups:
        times = head_times(
            world_size=self.world_size,
            rank_stride=batch.rank_stride,
            pairs=batch.pairs(*mask) if self.world_size > 1 else 0,
            heads_each=q.shape[1] // k.shape[1],
            head_dims=k.shape[2] + v.shape[2],
            element_bytes=k.element_size(),
            gradient_bytes=self.grad_reduce_dtype.itemsize,
        )
        return head_groups(k.shape[1], memory.largest, memory.in_turn, keeps, *times)

    def _refuse_together(self, refusal: WeftError) -> NoReturn:
        """In debug mode all ranks raise where one refuses a call before it was compared; the others do when they compare theirs.

        Raises:
            WeftError: `refusal`.
        """
        if self.debug and self.world_size > 1:
            require_agreement(self._ranks, {}, refusal)
        raise refusal

    def _agreed(self, checked: Callable[[], _Checked], facts: Callable[[_Checked], dict[str, object]]) -> _Checked:
        """What `checked` returns; in debug mode after all ranks' calls were compared."""
        if not self.debug or self.world_size == 1:
            return checked()
        try:
            found = checked()
        except WeftError as refusal:
            self._refuse_together(refusal)
        require_agreement(self._ranks, facts(found), None)
        return found


@dataclass(eq=False)
class ActiveBatch:
    """The batch that models attend under.

    Attributes:
        parallel: over which ranks.
        cu_seqlens: (documents + 1,) int64 of the whole batch.
        attended: calls of attention over ranks while it was the innermost.
    """

    parallel: ContextParallel
    cu_seqlens: Any
    attended: int = 0

    @property
    def fewest_rows(self) -> int:
        """Rows of the rank that has fewest; the same on every rank."""
        return int(self.parallel._batch(self.cu_seqlens).layout.rank_tokens.min())

    @contextmanager
    def refusing_together(self) -> Iterator[None]:
        """What is refused inside, before `attention` is called, is refused on all ranks in debug mode."""
        try:
            yield
        except WeftError as refusal:
            self.parallel._refuse_together(refusal)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document of the whole batch."""
        return int(np.diff(self.parallel._batch(self.cu_seqlens).layout.cu_seqlens).max(initial=0))

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> AttentionOutput:
        """`ContextParallel.attention` under this batch; options are its keyword arguments."""
        return self.parallel.attention(q, k, v, self.cu_seqlens, **options)


# Of the process, not of a thread or a context: autograd recomputes checkpointed activations in threads of its own.
_active: list[ActiveBatch] = []


@contextmanager
def _attended_under(active: ActiveBatch) -> Iterator[ActiveBatch]:
    before = active.attended
    _active.append(active)
    try:
        yield active
    finally:
        _active.remove(active)
    # Not where the block ends by an error, which says more.
    with active.refusing_together():
        require(
            active.attended > before,
            "models inside a context-parallel batch attend through Weft",
            expected="attn_implementation='weft' (model.set_attn_implementation('weft')) of a model that takes it",
            given="a block in which nothing attended over the ranks: under any other attention, or its own where it takes none "
            "(Bloom, Falcon, MPT, ...), a model sees this rank's rows alone",
        )


def current_batch() -> ActiveBatch | None:
    """The batch of the innermost `ContextParallel.batch` block, or None outside of any."""
    return _active[-1] if _active else None


def _of_rows(x: Any, name: str, rows: int) -> torch.Tensor:
    require(isinstance(x, torch.Tensor), f"{name} is a tensor", expected="torch.Tensor", given=type(x).__name__)
    require(
        x.ndim >= 1 and x.shape[0] == rows,
        f"{name} has the rows of cu_seqlens",
        expected=f"({rows}, ...)",
        given=tuple(x.shape),
    )
    return x
