"""How a forward is cut: full tiles, or packed heads and split keys when query rows are few."""

from __future__ import annotations

from dataclasses import dataclass, replace

from weft_attn.launch.config import ForwardConfig, HopperForwardConfig
from weft_attn.launch.device import Device
from weft_attn.launch.select import FORWARD_KERNELS, Choice, Problem, select, select_first
from weft_attn.plan.cost import steps_of
from weft_attn.plan.slices import Plan
from weft_attn.plan.stream import DeviceStream, Tiling, count_items

# Below this share of the multiprocessors, programs are too few: pack heads and split the keys.
OCCUPIED = 0.8
# An item shorter than this is mostly start-up and combining.
MIN_TILES = 4
# Rows that a multiprocessor may go through in wide items, over those in narrow ones: three consumers gained 1.5 to 9% when this was
# measured (docs/adr/0022), and gain more since docs/adr/0033.
PADDING = 1.04


@dataclass(frozen=True)
class ForwardCut:
    """The forward's config, how many heads share a tile, and how the plan is cut."""

    choice: Choice
    config: ForwardConfig | HopperForwardConfig
    pack: int
    tiling: Tiling


def cut_forward(plan: Plan, heads: int, kv_heads: int, problem: Problem, device: Device) -> ForwardCut:
    """Decide how the forward of a plan runs on a device.

    Full tiles of one head each, on Hopper by its own kernel where a table names one, unless their number falls below 0.8 of the
    multiprocessors. Then the query heads of a KV head share a tile (K and V are read once for all of them) and each tile's keys are
    split over the machine.
    """
    choice = _choose_forward(plan, heads, problem, device)
    config = choice.config
    if isinstance(config, HopperForwardConfig):
        if _fill(count_items(plan, config.cut[0]) * heads, device) or choice.source == "override":
            return ForwardCut(choice, config, 1, Tiling(*config.cut))
        choice = select("forward", problem, device)
        config = choice.config
    assert isinstance(config, ForwardConfig)
    if _fill(count_items(plan, config.block_q) * heads, device):
        return ForwardCut(choice, config, 1, Tiling(config.block_q, config.block_k))

    group = heads // kv_heads
    few = replace(problem, few_rows=max(1, plan.total_q * group))
    choice = select("forward", few, device)
    config = choice.config
    assert isinstance(config, ForwardConfig)
    pack = max(p for p in range(1, group + 1) if group % p == 0 and p <= config.block_q)
    rows = config.block_q // pack
    programs = max(1, device.multiprocessors * config.programs_per_sm // (heads // pack))
    max_tiles = max(MIN_TILES, -(-steps_of(plan, rows, config.block_k) // programs))
    return ForwardCut(choice, config, pack, Tiling(rows, config.block_k, max_tiles))


def _choose_forward(plan: Plan, heads: int, problem: Problem, device: Device) -> Choice:
    """What selection says; where it says wide items and these fill the machine worse than narrow ones, what it says of few keys."""
    wide = select_first(FORWARD_KERNELS, problem, device)
    if not isinstance(wide.config, HopperForwardConfig) or wide.config.consumers == 2 or wide.source == "override":
        return wide
    narrow = select_first(FORWARD_KERNELS, replace(problem, keys_per_query=0), device)
    if not isinstance(narrow.config, HopperForwardConfig):
        return wide
    wide_rows, narrow_rows = wide.config.rows_per_item, narrow.config.rows_per_item
    wide_items, narrow_items = (count_items(plan, rows) * heads for rows in (wide_rows, narrow_rows))
    rounds = [-(-items // device.multiprocessors) for items in (wide_items, narrow_items)]
    if _fill(wide_items, device) and rounds[0] * wide_rows <= PADDING * rounds[1] * narrow_rows:
        return wide
    return replace(narrow, note=f"items of {wide_rows} rows would fill the machine worse")


def _fill(items: int, device: Device) -> bool:
    """Whether so many programs, an item each, are enough for the device."""
    return items >= OCCUPIED * device.multiprocessors


def heads_per_wave(bytes_per_head: int, wave_bytes: int, heads: int) -> int:
    """Heads whose streamed tensors fit `wave_bytes` together, at least one."""
    return max(1, min(heads, wave_bytes // max(1, bytes_per_head)))


def last_heads(stream: DeviceStream, multiprocessors: int, heads: int) -> int:
    """Heads of a wave that takes as long as its longest item: a last wave of fewer would wait for that one."""
    return min(heads, -(-multiprocessors * stream.longest // max(1, stream.tiles)))
