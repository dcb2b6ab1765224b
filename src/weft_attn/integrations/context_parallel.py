"""Attention of a model inside `ContextParallel.batch`: the batch, not the model's mask, says who attends to whom.

A rank's rows are one sequence of local rows, (1, T_local). What the model may still say is the band: causal or not, a window.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from weft_attn.errors import InvalidInput, Unsupported, require
from weft_attn.integrations.mask_functions import Asked, host_padding, recognise
from weft_attn.integrations.plan_mask import Mask, Window


def current_batch() -> Any | None:
    """The batch that is active here, or None. Where nobody has imported context parallelism there is none."""
    module = sys.modules.get("weft_attn.distributed.context_parallel")
    return None if module is None else module.current_batch()


def mask_of_batch(batch: Any, asked: Asked) -> Mask:
    """The band that a model asks for inside a batch; anything else that it asks for is refused.

    Host reads: the position ids, once, where documents are cut so that positions jump.

    Raises:
        Unsupported: a KV cache, a batch size other than 1, padding, a mask that is no causal or sliding-window one.
        InvalidInput: the position ids are not the batch's.
    """
    if asked.rows != asked.keys or asked.row_offset or asked.key_offset:
        raise Unsupported(
            f"a KV cache has no place in a context-parallel batch: expected use_cache=False, given {asked.rows} rows after "
            f"position {asked.row_offset} over {asked.keys} keys"
        )
    if asked.batch != 1:
        raise Unsupported(f"a rank's rows are one packed sequence: expected batch size 1, given {asked.batch}")
    if host_padding(asked) is not None:
        raise Unsupported("a context-parallel batch has no padding: expected attention_mask=None, given one with padding")
    pattern = recognise(asked.function)
    if pattern is None or pattern.chunk is not None or pattern.right != 0:
        raise Unsupported(
            "models inside a context-parallel batch are decoders with causal or sliding-window layers: "
            "expected such a mask, given another one"
        )
    _check_positions(batch, pattern.positions, asked.rows)
    return Mask(None, pattern.window, batch=batch)


def _check_positions(batch: Any, positions: torch.Tensor | None, rows: int) -> None:
    """The model turns its rows by the positions of the documents, not by those of the shard."""
    expected = batch.parallel.position_ids(batch.cu_seqlens).cpu()
    require(
        len(expected) == rows,
        "a model inside a context-parallel batch gets the rank's rows",
        expected=f"{len(expected)} rows, as shard(cu_seqlens, x) gives",
        given=rows,
    )
    # transformers shows positions to a mask only where they jump, and where there is no cache and no padding mask.
    given = torch.arange(rows) + (expected[:1] if rows else 0) if positions is None else positions.reshape(-1).cpu()
    if not torch.equal(given, expected.to(given.dtype)):
        raise InvalidInput(
            "a model inside a context-parallel batch counts positions inside the documents: expected "
            "position_ids=cp.position_ids(cu_seqlens)[None], use_cache=False and no attention_mask, given "
            + ("other positions" if positions is not None else "a cache, an attention_mask or positions that never jump")
        )


def attend(
    batch: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Window, options: dict[str, Any]
) -> torch.Tensor:
    """(1, T_local, H, D) under the batch's plan, the layer's band and its options; (1, T_local, Hq, Dv)."""
    if q.shape[0] != 1:
        raise Unsupported(f"a rank's rows are one packed sequence: expected batch size 1, given {q.shape[0]}")
    left, right = window
    causal = right == 0
    bounds = (left, None) if causal else (left, right)
    out: torch.Tensor = batch.attention(
        q[0], k[0], v[0], causal=causal, window=None if bounds == (None, None) else bounds, **options
    )
    return out[None]
