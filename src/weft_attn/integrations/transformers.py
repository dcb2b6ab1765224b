"""`attn_implementation="weft"` for models of transformers, through its public attention and mask interfaces.

    import weft_attn.integrations.transformers as weft_transformers
    weft_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="weft")

A model asks for a mask once per forward and kind of layer. It gets a `PlanMask`, which holds the `Plan` of the whole batch, and
hands it to every layer. The mask is the authority on who attends to whom, as in transformers' eager attention; what a layer says
beside it must agree. A mask that a user made, a tensor, is taken as it is. Rows that see no key, which are rows of padding, give 0.

Inside `ContextParallel.batch` the hidden states are a rank's local rows, (1, T_local); see `context_parallel.py`.

Host reads per forward, for each kind of layer: one copy of the padding mask, where there is one; one of the packed positions, where
there are some, else whether position ids jump, where layers get them and nothing is cached; the filled length of a static cache.
`torch.compile` breaks its graph at both functions.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from weft_attn.api import plan_attention
from weft_attn.distributed.context_parallel import ActiveBatch, current_batch
from weft_attn.errors import InvalidInput, Unsupported, require
from weft_attn.integrations import context_parallel, masks
from weft_attn.integrations.documents import documents_plan
from weft_attn.integrations.kept import kept
from weft_attn.integrations.mask_functions import Asked, cells_to_plan, check_cells, to_mask
from weft_attn.integrations.plan_mask import Mask, PlanMask, Window
from weft_attn.plan import Plan

NAME = "weft"
OLDEST = (5, 23)
TESTED = "5.23 and 5.24"
NO_WHOLE_GRAPH = (
    "attn_implementation='weft' works outside of compiled graphs: "
    "expected torch.compile without fullgraph=True, given one graph of a model"
)

# Keyword arguments that reach an attention and change nothing of it: what they say is in the mask, in the rotated queries and
# keys, or belongs to other parts of the model.
HARMLESS = frozenset(
    (
        "cache_position",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "return_dict",
        "shift_labels",
    )
)


def register() -> None:
    """Make "weft" an `attn_implementation` of transformers. May be called again.

    Raises:
        Unsupported: (a ValueError) transformers is not installed, or older than what is tested.

    Example:
        >>> from weft_attn.integrations.transformers import register
        >>> register()
        >>> from transformers import AttentionInterface
        >>> "weft" in AttentionInterface()
        True
    """
    expected = f"transformers {TESTED} (tested) or newer: pip install 'weft-attn[transformers]'"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise Unsupported(f"attn_implementation='weft' needs transformers: expected {expected}, given none") from None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise Unsupported(f"attn_implementation='weft' needs a tested transformers: expected {expected}, given {version}")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


# ---- the mask -------------------------------------------------------------------------------------------------------------


@torch.compiler.disable(reason=NO_WHOLE_GRAPH)  # type: ignore[untyped-decorator]
def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    # What other masks are made with: a size that the function already holds, skips that are not needed, a dtype.
    local_size: int | None = None,  # noqa: ARG001
    allow_is_causal_skip: bool = True,  # noqa: ARG001
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype | None = None,  # noqa: ARG001
    config: Any = None,  # noqa: ARG001
    **unknown: Any,
) -> PlanMask:
    """The mask of one kind of layer, as `AttentionMaskInterface` asks for it.

    Args:
        batch_size, q_length, kv_length: sizes of the attention.
        q_offset, kv_offset: positions of the first row and of the first key.
        mask_function: who sees whom, by (batch, head, row, key) indices; None: causal.
        attention_mask: (batch, tokens seen) bool, False where a token is padding.
        use_vmap: the function takes single indices only.
        allow_is_bidirectional_skip: a mask that hides nothing may be left out: layers see all their keys, also those that a cache
            holds beside the kv_length asked for.

    Returns:
        (batch, 1, q_length, kv_length), a `PlanMask`.

    Raises:
        Unsupported: a mask without band structure that is too large to be read cell by cell; an argument not known here; inside a
            context-parallel batch whatever that cannot serve.
    """
    batch = current_batch()
    with _together(batch):
        _refuse(unknown, "the mask")
    if mask_function is None:
        mask_function = importlib.import_module("transformers.masking_utils").causal_mask_function
    offsets = int(q_offset), int(kv_offset)
    asked = Asked(
        batch_size,
        q_length,
        kv_length,
        *offsets,
        function=mask_function,
        padding=attention_mask,
        needs_vmap=use_vmap,
        may_be_left_out=allow_is_bidirectional_skip,
        device=device,
    )
    mask = to_mask(asked) if batch is None else context_parallel.mask_of_batch(batch, asked)
    return PlanMask.of(mask, (batch_size, 1, q_length, kv_length), device)


# ---- the attention --------------------------------------------------------------------------------------------------------


@torch.compiler.disable(reason=NO_WHOLE_GRAPH)  # type: ignore[untyped-decorator]
def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    deterministic: bool | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as `AttentionInterface` asks for it.

    Args:
        module: the layer; `training` and `is_causal` are read.
        query: (B, Hq, S, D), key: (B, Hkv, K, D), value: (B, Hkv, K, Dv). Under autocast they are cast to its dtype.
        attention_mask: a `PlanMask`; a (B or 1, 1, S, K) tensor, bool or of 0 and the lowest value of its dtype, read cell by cell
            once; or None: causal where the layer is, over as many keys as rows or by one row.
        dropout: 0 in training.
        scaling: softmax scale; None: D ** -0.5.
        sliding_window: must be in a `PlanMask`, of as many keys; a tensor is taken to have it; without a mask it is applied.
        softcap, s_aux: bound of the scores, and (Hq,) sink logits.
        is_causal: read where there is no mask.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed documents of a batch of one, as for flash attention.
        position_ids: queries and keys are rotated already; looked at where a mask has not seen them (see `positions.py`).
        use_cache: False inside a context-parallel batch, but in training, where the cache is empty and is dropped.
        output_attentions: weights are never formed, True is refused.

    Returns:
        (B, S, Hq, Dv) and None in place of weights.

    Raises:
        Unsupported: dropout in training, attention weights, a position bias, and every argument not named here or in `HARMLESS`.
        InvalidInput: shapes, dtypes, or arguments that contradict the mask.
    """
    plan_mask = attention_mask if isinstance(attention_mask, PlanMask) else None
    batch = active = current_batch()
    q, k, v = (x.transpose(1, 2) for x in _autocast(query, key, value))
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "softcap": 0.0 if softcap is None else softcap,
        "sinks": s_aux,
        "deterministic": bool(deterministic),
    }
    sizes = (q.shape[0], q.shape[1], k.shape[1])
    flash = PackedKwargs(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # A checkpoint's recomputation may run after the block, in which the mask still knows its batch.
    with _together(plan_mask.mask.batch if active is None and plan_mask is not None else active):
        _refuse({name: x for name, x in others.items() if name not in HARMLESS}, "the attention")
        if output_attentions:
            raise Unsupported("attention weights are never formed: expected output_attentions=False, given True")
        if dropout and getattr(module, "training", True):
            raise Unsupported(f"attention has no dropout: expected attention_dropout=0 in training, given {dropout}")
        if plan_mask is not None:
            batch = _checked_batch(plan_mask, sizes, sliding_window, active)
            if plan_mask.mask.positions is not None and not flash.given:
                plan_mask.mask.positions.look(position_ids, sizes[0])
        if batch is not None:
            _refuse_in_batch(batch, module, use_cache)
            window = _window_in_batch(attention_mask, causal, sliding_window, flash)
    if batch is not None:
        return context_parallel.attend(batch, q, k, v, window, options), None
    plan = _plan(attention_mask, sizes, causal, sliding_window, flash)
    flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = plan_attention(flat_q, flat_k, flat_v, plan, **options)
    assert isinstance(out, torch.Tensor)
    return out.view(*q.shape[:3], v.shape[3]), None


@dataclass(frozen=True)
class PackedKwargs:
    """What a model passes for flash attention beside the mask, or four times None."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None

    @property
    def given(self) -> bool:
        return any(x is not None for x in (self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k))


Sizes = tuple[int, int, int]  # sequences, rows and keys of each


def _together(batch: ActiveBatch | None) -> AbstractContextManager[None]:
    """Where a refusal is all ranks' of a context-parallel batch, in debug mode: none may be left waiting in its attention."""
    return nullcontext() if batch is None else batch.refusing_together()


def _refuse(unknown: dict[str, Any], owner: str) -> None:
    for name, value in unknown.items():
        if value is not None:
            raise Unsupported(f"{owner} of attn_implementation='weft' knows every argument: expected no {name!r}, given one")


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What autocast does to the operands of a product: norms and rotations may have left queries and keys in float32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def _checked_batch(mask: PlanMask, sizes: Sizes, sliding_window: int | None, active: ActiveBatch | None) -> ActiveBatch | None:
    """The context-parallel batch that a mask was made in, after what the layer says beside it has been compared with it."""
    given = tuple(mask.shape)
    fits = (sizes[0], 1, sizes[1], given[3] if mask.mask.is_left_out else sizes[2])
    require(given == fits, "queries and keys fit the mask", expected=given, given=sizes)
    window = mask.mask.window
    if sliding_window is not None and window is not None and not _shows_window(window, sliding_window, sizes[2]):
        given_window = "one without" if window[0] is None else f"one of {window[0] + 1}"
        raise InvalidInput(
            f"a layer's window is in its mask: expected a mask with a window of {sliding_window}, given {given_window}"
        )
    if active is not None and mask.mask.batch is not active:
        raise InvalidInput(
            "a mask is used in the batch that it was made in: expected one of this context-parallel batch, given another's"
        )
    return mask.mask.batch


def _shows_window(window: Window, sliding_window: int, keys: int) -> bool:
    """Whether a mask's (left, right) window is a layer's, as far as so many keys tell. Windows to both sides are counted in more than one way."""
    left, right = window
    if left is None:
        return keys <= sliding_window
    return right != 0 or left + 1 == sliding_window or keys <= min(left + 1, sliding_window)


def _refuse_in_batch(batch: ActiveBatch, module: Any, use_cache: bool | None) -> None:
    """Refuse what a model does that a context-parallel batch has no place for."""
    config = getattr(module, "config", None)
    context_parallel.refuse_layers_that_mix_rows(config)
    context_parallel.refuse_positions_that_begin_elsewhere(config)
    if batch.parallel.world_size > 1:
        context_parallel.refuse_rope_that_ranks_disagree_on(config, batch.longest_document)
    # In training nobody reads the cache that a model fills unless told not to.
    if not getattr(module, "training", False) and (use_cache or _fills_a_cache(module)):
        raise Unsupported(
            "a KV cache has no place in a context-parallel batch, whose keys here are this rank's alone: expected use_cache=False and no cache, "
            "given one"
        )


def _fills_a_cache(module: Any) -> bool:
    """Whether the layer that attends was given a cache, which transformers shows to the layer alone.

    Some models (Gemma-2 and 3) keep use_cache to themselves, any layer fills a cache that it is given, and an empty one changes nothing
    that an attention or a mask is told. So the layer's own call is asked, by type: the name changes between releases.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_locals.get("self") is not module:
        frame = frame.f_back
    cache = importlib.import_module("transformers").Cache
    return frame is not None and any(isinstance(x, cache) for x in frame.f_locals.values())


def _window_in_batch(mask: torch.Tensor | None, causal: bool, sliding_window: int | None, flash: PackedKwargs) -> Window:
    if flash.given:
        raise Unsupported("a context-parallel batch knows its documents: expected no cu_seq_lens or max_length, given some")
    if isinstance(mask, PlanMask):
        assert mask.mask.window is not None
        return mask.mask.window
    if mask is not None:
        raise Unsupported("a context-parallel batch has no mask of its own: expected attention_mask=None, given a tensor")
    return _window_without_mask(causal, sliding_window)


def _window_without_mask(causal: bool, sliding_window: int | None) -> Window:
    if sliding_window is None:
        return None, 0 if causal else None
    if not causal:
        raise Unsupported("a layer with a window that is not causal has a mask: expected one, given None")
    return sliding_window - 1, 0


def _plan(mask: torch.Tensor | None, sizes: Sizes, causal: bool, sliding_window: int | None, flash: PackedKwargs) -> Plan:
    batch, rows, keys = sizes
    if isinstance(mask, PlanMask):
        if flash.given:
            return _packed_plan(flash, sizes, mask.mask)
        shown = mask.mask.positions
        plan = mask.mask.plan if shown is None or shown.packed is None else shown.packed
        assert plan is not None
        # An encoder with a cache asks for the keys of its new tokens alone, where transformers makes no mask.
        return masks.band(*sizes, 0, (None, None)) if mask.mask.is_left_out and keys != mask.shape[3] else plan
    if mask is not None:
        if flash.given:
            raise Unsupported("documents are in the mask or in cu_seq_lens: expected one of them, given both")
        return _dense_plan(mask, sizes)
    window = _window_without_mask(causal, None if sliding_window is None or keys <= sliding_window else sliding_window)
    if flash.given:
        return _packed_plan(flash, sizes, Mask(None, window, is_plain=True))
    if causal and rows not in (1, keys):
        raise Unsupported(
            f"causal attention of some rows over more keys has a mask: expected one, given None for {rows} x {keys}"
        )
    return masks.band(batch, rows, keys, keys - rows, window)


def _packed_plan(flash: PackedKwargs, sizes: Sizes, mask: Mask) -> Plan:
    """Documents by cu_seq_lens, as for flash attention; where the mask knows documents or padding, they are the same."""
    cu_q, cu_k, window = flash.cu_seqlens_q, flash.cu_seqlens_k, mask.window
    if cu_q is None or cu_k is None or sizes[0] != 1 or window is None:
        raise Unsupported(
            "packed documents are one sequence: expected batch size 1, cu_seq_lens_q with cu_seq_lens_k, and a causal, full or "
            f"window mask, given batch size {sizes[0]}"
        )
    if mask.is_chunked:
        raise Unsupported("chunked layers take their documents from position_ids: expected no cu_seq_lens, given some")
    plan = documents_plan(cu_q, cu_k, flash.max_seqlen_q, flash.max_seqlen_k, False, window)
    if not mask.is_plain and plan != mask.plan:
        raise InvalidInput("cu_seq_lens and the mask are about the same documents: expected the mask's, given others")
    return plan


def _dense_plan(mask: torch.Tensor, sizes: Sizes) -> Plan:
    """The plan of a mask that a caller has made, cell by cell."""
    batch, rows, keys = sizes
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or tuple(mask.shape[1:]) != (1, rows, keys):
        raise Unsupported(
            f"a mask of one's own is the same for all heads: expected ({batch} or 1, 1, {rows}, {keys}), given {tuple(mask.shape)}"
        )
    check_cells(*sizes)

    def make() -> Plan:
        return cells_to_plan(_visible(mask).expand(batch, -1, -1, -1))

    return kept((mask,), (batch,), make)


def _visible(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise Unsupported(
            f"a mask of one's own is boolean or added to scores: expected bool or a float dtype, given {mask.dtype}"
        )
    # The lowest bfloat16, cast to float32, hides as well as the lowest float32 does.
    hidden = mask <= max(torch.finfo(mask.dtype).min, torch.finfo(torch.bfloat16).min)
    if not ((mask == 0) | hidden).all():
        raise Unsupported("a mask of one's own hides or shows: expected 0 or the lowest value of its dtype, given another bias")
    return ~hidden
