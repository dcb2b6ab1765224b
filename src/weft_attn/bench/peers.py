"""Weft and what it is measured against: each peer says what it cannot do, and prepares the rest as its users would call it.

Layouts and masks are prepared outside the timing. An attention without plans does zigzag work the way its users do today: keys
and values reordered to sequence order (outside the timing; the record says so), one launch per group of rows, the gradients of
the launches added up (inside it).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch._functorch.config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import weft_attn as weft
from weft_attn.bench.cases import Case, DenseBatch, PackedDocuments, Prefix, PrefixGroups, Tensors
from weft_attn.errors import InvalidInput

# Rows' outputs in order, in as many parts as there were launches, in the peer's own layout.
Parts = tuple[torch.Tensor, ...]
# dq in parts, dk and dv, in the peer's own layout; dk and dv may stop at the last key that a row sees.
Gradients = tuple[Parts, torch.Tensor, torch.Tensor]
Change = Callable[[torch.Tensor], torch.Tensor]

REORDERED = "two launches; K and V reordered to sequence order outside the timing, gradients added up inside"


@dataclass(frozen=True)
class Layout:
    """A peer's own layout, reached by views outside the timing.

    Attributes:
        native: packed (tokens, heads, dim) -> the peer's.
        packed: the peer's -> packed.
    """

    native: Change
    packed: Change


PACKED = Layout(lambda x: x, lambda x: x)


def tokens_first(batch: int) -> Layout:
    """(B, S, H, D)."""
    return Layout(lambda x: x.unflatten(0, (batch, -1)), lambda x: x.flatten(0, 1))


def heads_first(batch: int) -> Layout:
    """(B, H, S, D)."""
    return Layout(lambda x: x.unflatten(0, (batch, -1)).transpose(1, 2), lambda x: x.transpose(1, 2).flatten(0, 1))


@dataclass(frozen=True)
class Prepared:
    """A peer ready to be timed on a case.

    Attributes:
        forward: call number -> output parts; without autograd's bookkeeping.
        backward: call number -> gradients, from a forward that has run; None where the case has no backward.
        layout: of what they return.
        lse: (Hq, total_q) natural log of the same forward, where the peer gives it.
        key_rows: the plan's key row of each of the peer's keys; None: the same order.
        note: what the timed work includes, beyond one launch.
    """

    forward: Callable[[int], Parts]
    backward: Callable[[int], Gradients] | None
    layout: Layout = PACKED
    lse: Callable[[], torch.Tensor] | None = None
    key_rows: torch.Tensor | None = None
    note: str = ""

    def packed_forward(self) -> torch.Tensor:
        """One forward: out (total_q, Hq, D)."""
        return torch.cat([self.layout.packed(part) for part in self.forward(0)])

    def packed_backward(self, total_k: int) -> Gradients:
        """One backward: dq (total_q, Hq, D), dk and dv (total_k, Hkv, D) in the plan's order of keys."""
        assert self.backward is not None
        dq, dk, dv = self.backward(0)
        packed = torch.cat([self.layout.packed(part) for part in dq])
        dk, dv = (self._in_plan_order(self.layout.packed(x), total_k) for x in (dk, dv))
        return (packed,), dk, dv

    def _in_plan_order(self, x: torch.Tensor, total_k: int) -> torch.Tensor:
        if self.key_rows is None:
            return x
        # Keys that no row sees may have been left out: their gradient is zero.
        ordered = x.new_zeros(total_k, *x.shape[1:])
        ordered[self.key_rows[: len(x)]] = x
        return ordered


class Peer(Protocol):
    """An implementation of attention."""

    name: str

    def supports(self, case: Case, device: torch.device, /) -> str | None:
        """Why this peer cannot run the case on the device, or None when it can."""

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        """Everything but the timed work."""


# ---- what peers share -----------------------------------------------------------------------------------------------------


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA device"


def _needs_16_bits(case: Case) -> str | None:
    return None if case.model.dtype_bits == 16 else "takes 16-bit inputs only"


def _leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same memory as inputs that want gradients."""
    return [x.detach().requires_grad_() for x in tensors]


def _without_grad(call: Callable[[int], Parts]) -> Callable[[int], Parts]:
    def run(turn: int) -> Parts:
        with torch.no_grad():
            return call(turn)

    return run


# q, k, v -> out, all in the peer's own layout.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _one_launch(case: Case, tensors: Tensors, attend: Attend, layout: Layout, **rest: Any) -> Prepared:
    """A peer that does the whole case in one call."""
    q, dout = layout.native(tensors.q), layout.native(tensors.dout)
    kv = [(layout.native(k), layout.native(v)) for k, v in tensors.kv]

    def forward(turn: int) -> Parts:
        return (attend(q, *kv[turn % len(kv)]),)

    if "backward" not in case.passes:
        return Prepared(_without_grad(forward), None, layout, **rest)
    leaves = _leaves(q, *kv[0])
    out = attend(*leaves)

    def backward(_turn: int) -> Gradients:
        dq, dk, dv = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        return (dq,), dk, dv

    return Prepared(_without_grad(forward), backward, layout, **rest)


def _launch_per_prefix(case: Case, tensors: Tensors, groups: PrefixGroups, attend: Attend) -> Prepared:
    """A peer that runs one launch for each group of rows, on a prefix of the reordered keys.

    `attend` takes (1, S, H, D), is causal, and aligns the last row with the last key.
    """
    layout = tokens_first(1)
    key_rows = torch.from_numpy(groups.key_rows).to(tensors.device)
    q, dout, k, v = (layout.native(x) for x in (tensors.q, tensors.dout, tensors.k[key_rows], tensors.v[key_rows]))

    def inputs(part: Prefix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return q[:, part.q_start : part.q_stop], k[:, : part.k_stop], v[:, : part.k_stop]

    def forward(_turn: int) -> Parts:
        return tuple(attend(*inputs(part)) for part in groups.prefixes)

    if "backward" not in case.passes:
        return Prepared(_without_grad(forward), None, layout, key_rows=key_rows, note=REORDERED)
    leaves = [_leaves(*inputs(part)) for part in groups.prefixes]
    outs = [attend(*group) for group in leaves]
    douts = [dout[:, part.q_start : part.q_stop] for part in groups.prefixes]

    def backward(_turn: int) -> Gradients:
        found = [
            torch.autograd.grad(out, group, grad, retain_graph=True)
            for out, group, grad in zip(outs, leaves, douts, strict=True)
        ]
        # The last prefix is the longest: the others are added into its gradients.
        _, dk, dv = found[-1]
        for _, dk_part, dv_part in found[:-1]:
            dk[:, : dk_part.shape[1]] += dk_part
            dv[:, : dv_part.shape[1]] += dv_part
        return tuple(dq for dq, _, _ in found), dk, dv

    return Prepared(_without_grad(forward), backward, layout, key_rows=key_rows, note=REORDERED)


def _cumulative(cu_seqlens: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(cu_seqlens, dtype=torch.int32, device=device)


# ---- Weft -----------------------------------------------------------------------------------------------------------------


class Weft:
    """This library: the case's plan, one launch."""

    name = "weft"

    def supports(self, _case: Case, _device: torch.device, /) -> str | None:
        return None

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = weft.plan_attention(q, k, v, case.plan, deterministic=case.deterministic)
            assert isinstance(out, torch.Tensor)
            return out

        def lse() -> torch.Tensor:
            with torch.no_grad():
                return weft.plan_attention(tensors.q, tensors.k, tensors.v, case.plan, return_lse=True)[1]

        return _one_launch(case, tensors, attend, PACKED, lse=lse)


# ---- PyTorch's scaled_dot_product_attention -------------------------------------------------------------------------------


def _sdpa(case: Case, tensors: Tensors, batch: DenseBatch, backend: SDPBackend) -> Prepared:
    """scaled_dot_product_attention on one backend."""
    grouped = case.model.heads != case.model.kv_heads

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)

    return _one_launch(case, tensors, attend, heads_first(batch.batch))


class CudnnSdpa:
    """cuDNN behind scaled_dot_product_attention: dense batches."""

    name = "cudnn"

    def supports(self, case: Case, device: torch.device, /) -> str | None:
        if isinstance(case.layout, PrefixGroups):
            return "SDPA aligns a causal mask with the first key: a prefix seen by its last rows has no form in it"
        if isinstance(case.layout, PackedDocuments):
            return "SDPA on cuDNN takes sequences of equal length"
        if case.deterministic and "backward" in case.passes:
            return "SDPA on cuDNN has no deterministic backward"
        return _needs_cuda(device) or _needs_16_bits(case)

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        assert isinstance(case.layout, DenseBatch)
        return _sdpa(case, tensors, case.layout, SDPBackend.CUDNN_ATTENTION)


class FlashSdpa:
    """FlashAttention-2 as PyTorch ships it: SDPA for dense batches, its variable-length operator for the rest."""

    name = "flash"

    def supports(self, case: Case, device: torch.device, /) -> str | None:
        return _needs_cuda(device) or _needs_16_bits(case)

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        with _deterministic_algorithms(case.deterministic):
            prepared = self._prepare(case, tensors)
        if not case.deterministic or prepared.backward is None:
            return prepared
        backward = prepared.backward

        def deterministic(turn: int) -> Gradients:
            with _deterministic_algorithms(True):
                return backward(turn)

        return replace(prepared, backward=deterministic)

    def _prepare(self, case: Case, tensors: Tensors) -> Prepared:
        layout = case.layout
        if isinstance(layout, DenseBatch):
            return _sdpa(case, tensors, layout, SDPBackend.FLASH_ATTENTION)
        if isinstance(layout, PackedDocuments):
            packed = _cumulative(layout.cu_seqlens, tensors.device)
            longest = layout.longest
            return _one_launch(
                case, tensors, lambda q, k, v: flash_varlen(q, k, v, packed, packed, longest, longest, case.causal), PACKED
            )
        lengths = {n for part in layout.prefixes for n in (part.q_stop - part.q_start, part.k_stop)}
        single = {n: _cumulative((0, n), tensors.device) for n in lengths}

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            rows, keys = q.shape[1], k.shape[1]
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            out: torch.Tensor = flash_varlen(q, k, v, single[rows], single[keys], rows, keys, True).unflatten(0, (1, -1))
            return out

        return _launch_per_prefix(case, tensors, layout, attend)


def flash_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
) -> torch.Tensor:
    """PyTorch's variable-length FlashAttention-2 operator, differentiable, (T, H, D)."""
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, 0.0, causal, False
    )[0]
    return out


@contextlib.contextmanager
def _deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """PyTorch's own switch, without its filling of fresh memory, which would be timed."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted or before[0])
    memory.fill_uninitialized_memory = before[1] and not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


# ---- FlexAttention --------------------------------------------------------------------------------------------------------

# (batch, head, row, key) index tensors -> bool tensor.
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Flex:
    """FlexAttention, compiled, with a block mask built outside the timing: every case is one launch."""

    name = "flex"

    def supports(self, _case: Case, device: torch.device, /) -> str | None:
        return _needs_cuda(device)

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        batch = case.layout.batch if isinstance(case.layout, DenseBatch) else 1
        mask_mod = flex_mask(case, tensors.device)
        block_mask = None
        if mask_mod is not None:
            lengths = case.plan.total_q // batch, case.plan.total_k // batch
            block_mask = create_block_mask(mask_mod, None, None, *lengths, device=tensors.device)
        # A case of other shapes must not use up the compiler's limit of variants, after which it runs uncompiled.
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        grouped = case.model.heads != case.model.kv_heads

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped)
            return out

        # A backward that runs many times on one forward may not reuse the forward's buffers.
        with functorch_config.patch(donated_buffer=False):
            prepared = _one_launch(case, tensors, attend, heads_first(batch))
            if prepared.backward is not None:
                prepared.backward(0)
        return prepared


def flex_mask(case: Case, device: torch.device) -> MaskMod | None:
    """The case's mask in FlexAttention's form, from positions that are laid out beforehand; None: every row sees every key."""
    layout = case.layout
    if isinstance(layout, PrefixGroups):
        q_position, k_position = (torch.from_numpy(x).to(device) for x in (layout.q_position, layout.k_position))
        return lambda _b, _h, row, key: q_position[row] >= k_position[key]
    if isinstance(layout, PackedDocuments):
        lengths = torch.tensor(layout.cu_seqlens).diff()
        document = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
        return lambda _b, _h, row, key: (document[row] == document[key]) & (row >= key)
    if not case.causal:
        return None
    diagonal = layout.seqlen_k - layout.seqlen_q
    return lambda _b, _h, row, key: row + diagonal >= key


# ---- FlashAttention-4 -----------------------------------------------------------------------------------------------------


class Flash4:
    """FlashAttention-4 (CuTe), where it is installed."""

    name = "flash4"
    module = "flash_attn.cute.interface"

    def supports(self, case: Case, device: torch.device, /) -> str | None:
        lacking = _needs_cuda(device) or _needs_16_bits(case)
        if lacking:
            return lacking
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"not installed: {error}"
        return None

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        interface = importlib.import_module(self.module)
        layout = case.layout
        options: dict[str, Any] = {"causal": case.causal, "deterministic": case.deterministic}
        if isinstance(layout, PackedDocuments):
            cu_seqlens, longest = _cumulative(layout.cu_seqlens, tensors.device), layout.longest
            options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
            return _one_launch(
                case, tensors, lambda q, k, v: _output(interface.flash_attn_varlen_func(q, k, v, **options)), PACKED
            )

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return _output(interface.flash_attn_func(q, k, v, **options))

        if isinstance(layout, PrefixGroups):
            return _launch_per_prefix(case, tensors, layout, attend)
        return _one_launch(case, tensors, attend, tokens_first(layout.batch))


def _output(result: Any) -> torch.Tensor:
    """The output of a function that may return (out, lse)."""
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out


# ---- all of them ----------------------------------------------------------------------------------------------------------

WEFT: Peer = Weft()
PEERS: tuple[Peer, ...] = (WEFT, CudnnSdpa(), FlashSdpa(), Flex(), Flash4())


def chosen_peers(wanted: Sequence[str] | None = None, unwanted: Sequence[str] = ()) -> list[Peer]:
    """Weft first, then the wanted peers (None: all) but the unwanted ones.

    Raises:
        InvalidInput: a name that is no peer's.
    """
    known = {peer.name: peer for peer in PEERS}
    for name in (*(wanted or ()), *unwanted):
        if name not in known:
            raise InvalidInput(f"the peer is known: expected one of {sorted(known)}, given {name!r}")
    names = [name for name in known if (wanted is None or name in wanted) and name not in unwanted]
    return [WEFT, *(known[name] for name in names if name != WEFT.name)]
