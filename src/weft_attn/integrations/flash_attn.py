"""The functions of flash-attn 2.8 on Weft's kernels: same names, positions, defaults and returns.

    from weft_attn.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Shared arguments: q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), or packed (T, H, D); fp16, bf16, fp32, and what else
`weft_attn.attention` takes. `softmax_scale` None: D ** -0.5. `causal` aligns the last row with the last key; `window_size` is (left,
right) keys around that diagonal, -1: no bound. `deterministic` is honoured.

`return_attn_probs` returns (out, softmax_lse, None): the third, flash-attn's dropout mask, does not exist here. A row that sees no
key has out 0 and lse -inf (flash-attn: +inf). Not supported, and refused: dropout, ALiBi, rotary embeddings, a number of splits.
"""

from __future__ import annotations

from typing import Any

import torch

from weft_attn import checks
from weft_attn.api import AttentionOutput, Window, attention, plan_attention
from weft_attn.errors import InvalidInput, Unsupported, require
from weft_attn.integrations.documents import documents_plan, paged_documents_plan
from weft_attn.integrations.kv_cache import CachePlace
from weft_attn.plan import build

FlashOutput = torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]
SizedWindow = tuple[int, int]
NO_WINDOW: SizedWindow = (-1, -1)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: SizedWindow = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> FlashOutput:
    """Attention over a batch of sequences of equal length; differentiable.

    Args:
        q, k, v: (B, S, H, D), see the module's text, like every argument not named here.
        dropout_p: 0. alibi_slopes: None.

    Returns:
        out (B, Sq, Hq, Dv); with return_attn_probs (out, lse (B, Hq, Sq) float32, None).

    Raises:
        Unsupported: dropout or ALiBi. InvalidInput, InvalidPlan: as `weft_attn.attention`.

    Example:
        >>> import torch
        >>> from weft_attn.integrations.flash_attn import flash_attn_func
        >>> x = torch.randn(2, 5, 4, 16)
        >>> flash_attn_func(x, x, x, causal=True, window_size=(2, -1)).shape
        torch.Size([2, 5, 4, 16])
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    checks.flag(return_attn_probs, "return_attn_probs")
    return _as_flash(
        attention(
            q,
            k,
            v,
            causal=causal,
            window=_window(window_size),
            softmax_scale=softmax_scale,
            softcap=softcap,
            deterministic=deterministic,
            return_lse=return_attn_probs,
        )
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: SizedWindow = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> FlashOutput:
    """Attention over packed documents, or over pages of keys; differentiable.

    Args:
        q: (Tq, Hq, D); k, v: (Tk, Hkv, D), or with a block_table (pages, page size, Hkv, D).
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) integers. A device tensor is copied to the host, which waits for it; the plan
            is kept with it until it is changed, so that the layers of a model share it.
        max_seqlen_q, max_seqlen_k: at least the longest document; a smaller one raises.
        block_table: (documents, n) pages of each document, read in place; copied to the host like cu_seqlens.

    Returns:
        out (Tq, Hq, Dv); with return_attn_probs (out, lse (Hq, Tq) float32, None).

    Raises:
        Unsupported: dropout or ALiBi. InvalidInput, InvalidPlan: as `weft_attn.varlen_attention`, or a max_seqlen that is too small.

    Example:
        >>> import torch
        >>> from weft_attn.integrations.flash_attn import flash_attn_varlen_func
        >>> x, cu_seqlens = torch.randn(7, 2, 16), torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> flash_attn_varlen_func(x, x, x, cu_seqlens, cu_seqlens, 4, 4, causal=True).shape
        torch.Size([7, 2, 16])
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    checks.flag(return_attn_probs, "return_attn_probs")
    window = _window(window_size)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if block_table is None:
        plan = documents_plan(*lengths, causal, window)
    else:
        for x, name in ((k, "k"), (v, "v")):
            checks.is_tensor(x, name, 4, "(pages, page size, heads, D)")
        require(k.shape[:2] == v.shape[:2], "the pages of k and v agree", expected=k.shape[:2], given=v.shape[:2])
        plan = paged_documents_plan(*lengths, block_table, k.shape[0], k.shape[1], causal, window)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    return _as_flash(
        plan_attention(
            q,
            k,
            v,
            plan,
            softmax_scale=softmax_scale,
            softcap=softcap,
            deterministic=deterministic,
            return_lse=return_attn_probs,
        )
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: SizedWindow = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> FlashOutput:
    """`flash_attn_func` of qkv (B, S, 3, H, D), nothing copied."""
    q, k, v = _parts(qkv, "qkv", 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: SizedWindow = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> FlashOutput:
    """`flash_attn_func` of q (B, Sq, Hq, D) and kv (B, Sk, 2, Hkv, D), nothing copied."""
    k, v = _parts(kv, "kv", 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


@build.host_work
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: SizedWindow = NO_WINDOW,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new rows over a cache, which k and v are written into first, in place. No gradients.

    Args:
        q: (B, Sq, Hq, D).
        k_cache, v_cache: (caches, Sk, Hkv, D); with a block_table (pages, page size, Hkv, D). Read in place.
        k, v: (B, Snew, Hkv, D) to write behind the keys that a cache holds, or None.
        cache_seqlens: keys that each cache holds before k is written, an int or (B,); None without k: all Sk. Needed with k.
            A device tensor, like the three below, is copied to the host, which waits for it.
            A cache that cannot be viewed as one stream of keys (some of its tokens only) is copied to be read.
        cache_batch_idx: (B,) the cache of each sequence; None: its own. Not with a block_table.
        cache_leftpad: (B,) keys at the start of a cache that are padding; None: none.
        block_table: (B, n) the pages of each sequence.
        rotary_cos, rotary_sin, alibi_slopes: None. rotary_interleaved: True. num_splits: 0, the library chooses.

    Returns:
        out (B, Sq, Hq, Dv); with return_softmax_lse (out, lse (B, Hq, Sq) float32).

    Raises:
        Unsupported: rotary, ALiBi, a number of splits, or tensors that ask for a gradient.
        InvalidInput, InvalidPlan: shapes, lengths beyond the cache, two sequences writing to one place.

    Example:
        >>> import torch
        >>> from weft_attn.integrations.flash_attn import flash_attn_with_kvcache
        >>> q, new, cache = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16), torch.zeros(2, 8, 2, 16)
        >>> flash_attn_with_kvcache(q, cache, cache.clone(), new, new, cache_seqlens=torch.tensor([0, 5])).shape
        torch.Size([2, 1, 4, 16])
    """
    _refuse(rotary_cos=rotary_cos, rotary_sin=rotary_sin, alibi_slopes=alibi_slopes, num_splits=num_splits)
    _refuse(rotary_interleaved=not checks.flag(rotary_interleaved, "rotary_interleaved"))
    checks.flag(return_softmax_lse, "return_softmax_lse")
    for x, name in ((q, "q"), (k_cache, "k_cache"), (v_cache, "v_cache")):
        checks.is_tensor(x, name, 4, "(batch, tokens, heads, D)")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_cache, v_cache, k, v)):
        raise Unsupported(
            "attention over a cache has no backward: expected torch.no_grad() or no tensor that requires grad, given one that does"
        )
    flat = (q.flatten(0, 1), k_cache.flatten(0, 1), v_cache.flatten(0, 1))
    checks.qkv(*flat, packed=True)
    require(k_cache.shape[:2] == v_cache.shape[:2], "the caches agree", expected=k_cache.shape[:2], given=v_cache.shape[:2])
    new = _new_keys(k, v, q.shape[0], k_cache, v_cache)
    place = CachePlace.of(q.shape[0], k_cache, new, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    plan = place.plan(q.shape[1], checks.flag(causal, "causal"), _window(window_size))
    checks.number(softcap, "softcap")
    checks.scale(softmax_scale, q.shape[3])
    if k is not None and v is not None:
        place.write(k_cache, k)
        place.write(v_cache, v)
        # Flattened again: a cache that is no view of one stream was copied before it was written to.
        flat = (flat[0], k_cache.flatten(0, 1), v_cache.flatten(0, 1))
    out, lse = plan_attention(*flat, plan, softmax_scale=softmax_scale, softcap=softcap, return_lse=True)
    out = out.view(*q.shape[:3], v_cache.shape[3])
    return (out, lse.view(q.shape[2], *q.shape[:2]).transpose(0, 1)) if return_softmax_lse else out


def _new_keys(k: torch.Tensor | None, v: torch.Tensor | None, batch: int, k_cache: torch.Tensor, v_cache: torch.Tensor) -> int:
    """Number of keys to write for each sequence."""
    if k is None and v is None:
        return 0
    if k is None or v is None:
        raise InvalidInput("k and v are written together: expected both or neither, given one of them")
    for x, cache, name in ((k, k_cache, "k"), (v, v_cache, "v")):
        checks.is_tensor(x, name, 4, "(batch, tokens, heads, D)")
        expected = (batch, k.shape[1], *cache.shape[2:])
        require(tuple(x.shape) == expected, f"{name} fits its cache", expected=expected, given=tuple(x.shape))
        alike = (cache.dtype, cache.device)
        require((x.dtype, x.device) == alike, f"{name} is like its cache", expected=alike, given=(x.dtype, x.device))
    return k.shape[1]


def _window(window_size: Any) -> Window:
    """flash-attn's (left, right), -1 for no bound, as a window of ours."""
    require(
        isinstance(window_size, tuple | list) and len(window_size) == 2,
        "window_size is (left, right)",
        expected="a pair of integers >= -1",
        given=repr(window_size),
    )
    left, right = (build.host_integer(side, "window_size", -1) for side in window_size)
    return (None if left < 0 else left, None if right < 0 else right)


def _refuse(**arguments: Any) -> None:
    """Refuse what is not supported wherever it asks for something."""
    for name, value in arguments.items():
        if value is not None and (isinstance(value, torch.Tensor) or value):
            raise Unsupported(f"{name} is not supported: expected flash-attn's default, given another value")


def _parts(packed: torch.Tensor, name: str, count: int) -> tuple[torch.Tensor, ...]:
    checks.is_tensor(packed, name, 5, f"(batch, tokens, {count}, heads, D)")
    require(packed.shape[2] == count, f"{name} holds {count} tensors", expected=count, given=packed.shape[2])
    return packed.unbind(2)


def _as_flash(result: AttentionOutput) -> FlashOutput:
    return result if isinstance(result, torch.Tensor) else (*result, None)
