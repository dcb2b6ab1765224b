"""Which kernels compute a plan's gradients: the same for all documents, or others for those that see few keys.

The fused backward adds dQ up in memory, which is written, read and written again for every row; the pair of kernels computes two products
twice. Which is faster depends on how many keys a query sees: a table's `least_keys` says from where on the fused one is. Where a plan
has documents of both kinds, enough of each to fill the device, each kind goes its own way (docs/adr/0030).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from weft_attn.launch.config import HopperBackwardDqConfig, HopperConfig
from weft_attn.launch.device import Device
from weft_attn.launch.select import Choice, Problem, least_keys_of_fused, select_backward
from weft_attn.plan.seen import Seen, documents_of
from weft_attn.plan.slices import Plan

# Keys of a work item of the kernels by keys.
ITEM_KEYS = 128
# Rounds of a device's multiprocessors that each kind's items make at least: with fewer, what more launches cost is not little.
LEAST_ROUNDS = 4


@dataclass(frozen=True)
class Part:
    """Documents of a plan, and the kernels that compute their gradients: one for all of them, or one for dK and dV and one for dQ.

    Attributes:
        seen: which documents (plan/seen.py); None: all.
    """

    choices: tuple[Choice, ...]
    seen: Seen | None = None


def backward_parts(plan: Plan, problem: Problem, kv_heads: int, device: Device, *, deterministic: bool) -> tuple[Part, ...]:
    """The parts of a backward that computes all gradients; more than one only where none needs another's row statistics.

    Args:
        problem: of the plan as a whole.
        deterministic: as `select_backward` takes it.

    Raises:
        InvalidConfig, Unsupported: as `select_backward`.
    """
    whole = (Part(select_backward(problem, device, deterministic=deterministic)),)
    least = None if deterministic else least_keys_of_fused(problem, device)
    if not least:
        return whole
    documents = documents_of(plan.rows)
    long_rows = documents.within((least, math.inf))
    items = -(-documents.keys // ITEM_KEYS)
    if min(items[long_rows].sum(), items[~long_rows].sum()) * kv_heads < LEAST_ROUNDS * device.multiprocessors:
        return whole
    fused, pair = (
        select_backward(replace(problem, keys_per_query=keys), device, deterministic=False) for keys in (least, least - 1)
    )
    if not (_makes_statistics(pair) and all(isinstance(each.config, HopperConfig) for each in (*fused, *pair))):
        return whole
    return Part(fused, (least, math.inf)), Part(pair, (0, least))


def _makes_statistics(choices: tuple[Choice, ...]) -> bool:
    """Whether one of these kernels makes the row statistics that they need."""
    return any(isinstance(choice.config, HopperBackwardDqConfig) for choice in choices)
