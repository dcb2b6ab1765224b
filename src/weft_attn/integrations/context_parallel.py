"""Attention of a model inside `ContextParallel.batch`: the batch, not the model's mask, says who attends to whom.

A rank's rows are one sequence of local rows, (1, T_local). What the model may still say is the band: causal or not, a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft_attn.distributed.context_parallel import ActiveBatch
from weft_attn.errors import Unsupported, require
from weft_attn.integrations.mask_functions import Asked, host_padding, recognise
from weft_attn.integrations.plan_mask import Mask, Window
from weft_attn.integrations.positions import PositionRule

# Kinds of layers, as configs of transformers list them, whose rows meet in attention alone.
ATTENTION_LAYERS = frozenset(("attention", "full_attention", "sliding_attention", "chunked_attention"))
LISTS_OF_LAYERS = ("layer_types", "layers_block_type", "block_types")


def refuse_layers_that_mix_rows(config: Any) -> None:
    """Refuse a model that has layers beside attention that read neighbouring rows, such as convolutions or linear attention.

    A rank's rows are not neighbours in their documents, so such a layer would compute something else without a word.

    Raises:
        Unsupported: naming the kinds of layers.
    """
    kinds = {kind for name in LISTS_OF_LAYERS for kind in getattr(config, name, None) or ()} - ATTENTION_LAYERS
    if kinds:
        raise Unsupported(
            "all layers of a model inside a context-parallel batch meet other rows in attention alone: "
            f"expected {', '.join(sorted(ATTENTION_LAYERS))}, given {', '.join(sorted(kinds))}"
        )


# Models whose embedding of positions begins behind the padding token's number, by the names of their configs.
POSITIONS_BEHIND_PADDING = frozenset(
    ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")
)


def refuse_positions_that_begin_elsewhere(config: Any) -> None:
    """Refuse a model that counts positions from another number than 0.

    The batch's positions begin at 0 in each document, so such a model would embed other ones than it does without a word.

    Raises:
        Unsupported: naming the kind of model.
    """
    kind = getattr(config, "model_type", None)
    if kind in POSITIONS_BEHIND_PADDING:
        raise Unsupported(
            "models inside a context-parallel batch count positions from 0: "
            f"expected none of {', '.join(sorted(POSITIONS_BEHIND_PADDING))}, which begin at pad_token_id + 1, given {kind}"
        )


# RoPE whose frequencies follow the largest position that a call sees, and after how many positions they begin to.
ROPE_OF_THE_LARGEST_POSITION = {
    "longrope": ("original_max_position_embeddings",),
    "dynamic": ("original_max_position_embeddings", "max_position_embeddings"),
}


def refuse_rope_that_ranks_disagree_on(config: Any, longest: int) -> None:
    """Refuse a model whose RoPE takes its frequencies from the largest position it is given, where a document is long enough for it.

    Each rank is given its own rows' positions, so ranks would rotate queries and keys differently without a word.

    Args:
        longest: tokens of the batch's longest document.

    Raises:
        Unsupported: naming the kind of RoPE.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        kind = one.get("rope_type", one.get("type"))
        names = ROPE_OF_THE_LARGEST_POSITION.get(kind, ())
        given = [value for name in names for value in (one.get(name), getattr(config, name, None)) if value is not None]
        # The least: transformers has taken now one of them, now another.
        if names and longest > min(given, default=0):
            raise Unsupported(
                f"ranks take the same RoPE frequencies inside a context-parallel batch: expected documents of at most "
                f"{min(given, default=0)} tokens with rope_type {kind!r}, whose frequencies follow the largest position that a rank "
                f"sees, given one of {longest}"
            )


def mask_of_batch(batch: ActiveBatch, asked: Asked) -> Mask:
    """The band that a model asks for inside a batch; anything else that it asks for is refused.

    Host reads: the position ids, once; by the first layer where the mask has not seen them.

    Raises:
        Unsupported: a KV cache, a batch size other than 1, padding, a rank without a row, a mask that is no causal or sliding-window one.
        InvalidInput: the rows or the position ids are not the batch's.
    """
    if batch.fewest_rows == 0:
        # The rank without rows may have failed before it got here; the others must not wait for it in their first layer, nor to
        # refuse together.
        raise Unsupported(
            "models of transformers fail on empty inputs: expected a batch with a row for each of "
            f"{batch.parallel.world_size} ranks, given one that leaves a rank without"
        )
    with batch.refusing_together():
        return _band_of_batch(batch, asked)


def _band_of_batch(batch: ActiveBatch, asked: Asked) -> Mask:
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
    expected = batch.parallel.position_ids(batch.cu_seqlens)
    require(
        len(expected) == asked.rows,
        "a model inside a context-parallel batch gets the rank's rows",
        expected=f"{len(expected)} rows, as shard(cu_seqlens, x) gives",
        given=asked.rows,
    )
    rule = PositionRule(expected)
    if pattern.positions is not None:
        rule.look(pattern.positions)
    return Mask(None, pattern.window, batch=batch, positions=rule)


def attend(
    batch: ActiveBatch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Window, options: dict[str, Any]
) -> torch.Tensor:
    """(1, T_local, H, D) under the batch's plan, the layer's band and its options; (1, T_local, Hq, Dv)."""
    with batch.refusing_together():
        if q.shape[0] != 1:
            raise Unsupported(f"a rank's rows are one packed sequence: expected batch size 1, given {q.shape[0]}")
    left, right = window
    causal = right == 0
    bounds = (left, None) if causal else (left, right)
    out = batch.attention(q[0], k[0], v[0], causal=causal, window=None if bounds == (None, None) else bounds, **options)
    assert isinstance(out, torch.Tensor)
    return out[None]
