"""The debug mode's question to all ranks: do you make the same call?"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import torch

from weft_attn.distributed.collectives import Ranks
from weft_attn.errors import InvalidInput, WeftError

# What ranks compare; every rank sends a digest of each, in this order, whatever it calls.
FACTS = (
    "call",
    "cu_seqlens",
    "layout",
    "heads and dims",
    "dtype",
    "kind of device",
    "mask",
    "scalars",
    "gradients",
    "groups of heads",
    "symmetric memory",
)


def require_agreement(ranks: Ranks, facts: Mapping[str, object], refusal: WeftError | None = None) -> None:
    """Compare what the ranks are about to do; collective.

    Args:
        facts: by name, of FACTS, what must be equal on every rank; of a rank that refuses it is not compared.
        refusal: why this rank refuses the call, or None.

    Raises:
        WeftError: `refusal`, on the rank that has one.
        InvalidInput: on all others, where a rank refuses; on all ranks, naming those that differ, where facts differ.
    """
    assert facts.keys() <= set(FACTS), facts.keys() - set(FACTS)
    digests = [int(refusal is not None), *(_digest(facts.get(name)) for name in FACTS)]
    buffer = torch.empty(ranks.world_size, len(digests), dtype=torch.int64, device=ranks.control_device)
    ranks.own_rows(buffer).copy_(torch.tensor([digests], device="cpu"))
    ranks.all_gather(buffer).wait()
    if refusal is not None:
        raise refusal
    refused, *columns = buffer.cpu().T.tolist()
    if any(refused):
        raise InvalidInput(f"every rank accepts the call: expected no refusal, given one by {_named(refused)}")
    different = [
        f"{name} on {_named([value != _most_common(column) for value in column])}"
        for name, column in zip(FACTS, columns, strict=True)
        if len(set(column)) > 1
    ]
    if different:
        raise InvalidInput(f"all ranks make the same call: expected equal arguments, given different {', '.join(different)}")


def _digest(fact: object) -> int:
    """A signed 64-bit digest of what a fact prints."""
    text = fact if isinstance(fact, bytes) else repr(fact).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _most_common(values: list[int]) -> int:
    """What most ranks say; of equally many, what the lowest rank says."""
    return Counter(values).most_common(1)[0][0]


def _named(chosen: list[int] | list[bool]) -> str:
    found = [str(rank) for rank, is_chosen in enumerate(chosen) if is_chosen]
    return f"rank{'s' if len(found) > 1 else ''} {', '.join(found)}"
