"""Tables of what a group of ranks measured, and of what is predicted for one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from weft_attn.bench.group_ways import WEFT
from weft_attn.bench.rates import ALL_GATHER, REDUCE_SCATTER, Rates
from weft_attn.bench.records import ABSENT, GroupRecord
from weft_attn.bench.report import WIDE, ends_section, milliseconds, worst
from weft_attn.bench.simulate import Checked, Hardware, PassTime, Prediction

MIB = 2**20


def group_figures(records: Sequence[GroupRecord]) -> Table:
    """Time of the slowest rank, rate, spread over ranks, what no launch hides, shares of the ideal, memory above the inputs and by the
    formula, of each record.
    """
    table = Table("case")
    for name in ("pass", "who", "ms (quartiles)", "rate"):
        table.add_column(name, no_wrap=True)
    for name in (
        "ranks differ, ms",
        "outside launches, ms",
        "share of ideal, mean / slowest GPU's",
        "ratio",
        "peak MiB",
        "formula MiB",
    ):
        table.add_column(name)
    table.add_column("error / bound", no_wrap=True)
    shown = [record for record in records if record.status != ABSENT]
    for index, record in enumerate(shown):
        begins = index == 0 or shown[index - 1].case != record.case
        table.add_row(
            record.case if begins else "",
            record.pass_name,
            record.peer,
            milliseconds(record),
            "" if record.rate is None else f"{record.rate:.4g} {record.unit}",
            "" if record.spread_ms is None else f"{record.spread_ms:.3f}",
            "" if record.outside_ms is None else f"{record.outside_ms:.3f}",
            _shares(record),
            "" if record.ratio_to_weft is None else f"{record.ratio_to_weft:.2f}",
            mebibytes(record.peak_bytes),
            mebibytes(record.formula_bytes),
            worst(record),
            end_section=ends_section(shown, index),
            style="red" if record.failed else None,
        )
    return table


def _shares(record: GroupRecord) -> str:
    """Of the ideal, the GPUs' mean, and of the slowest GPU's."""
    return " / ".join(f"{share:.1%}" for share in (record.share_of_ideal, record.share_of_slowest_ideal) if share is not None)


def mebibytes(count: int | None) -> str:
    """Bytes in MiB, nothing for None."""
    return "" if count is None else f"{count / MIB:,.1f}"


# ---- predictions ----------------------------------------------------------------------------------------------------------


def wide_console() -> Console:
    """A console that folds no table where its output is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def render_predictions(predictions: Sequence[Prediction], hardware: Hardware) -> RenderableType:
    """A row for each world size and pass, then where the rates come from."""
    work = Table("ranks", "tokens", "documents", "rows of a rank", "balance, max / mean", title="Work", title_justify="left")
    for name in ("gathered MiB", "gathered again and reduced MiB", "memory MiB", "groups of heads"):
        work.add_column(name, justify="right")
    times = Table("ranks", "pass", "kernels ms", "communication ms", "exposed ms", "total ms", "share of ideal")
    times.title, times.title_justify = "Time", "left"
    for one in predictions:
        work.add_row(
            str(one.workload.world_size),
            f"{one.workload.tokens:,}",
            f"{len(one.workload.lengths):,}",
            f"{one.rank_tokens:,}",
            f"{one.balance:.4f}",
            mebibytes(one.gathered_bytes),
            mebibytes(one.backward_bytes),
            mebibytes(one.memory_bytes),
            f"{sizes(one.forward_groups)} | {sizes(one.backward_groups)}",
        )
        for pass_name, time in (("forward", one.forward), ("backward", one.backward)):
            times.add_row(str(one.workload.world_size), pass_name, *time_cells(time), end_section=pass_name == "backward")
    return Group(work, times, *(Text(line, style="dim") for line in sources(hardware)))


def sizes(groups: Sequence[int]) -> str:
    """Heads of each group: 1+7, or 8 x 1 where there are many alike."""
    return f"{len(groups)} x {groups[0]}" if len(groups) > 4 and len(set(groups)) == 1 else "+".join(map(str, groups))


def time_cells(time: PassTime) -> list[str]:
    """A pass's times as a table shows them."""
    shown = (time.kernels_ms, time.communication_ms, time.exposed_ms, time.total_ms)
    return [*(f"{ms:.3f}" for ms in shown), f"{time.share_of_ideal:.1%}"]


def sources(hardware: Hardware) -> list[str]:
    """Where the rates come from, and what was not measured."""
    rates = hardware.rates
    lines = [f"rates of {rates.device}, {rates.date}, {rates.versions}, head dim {rates.head_dim}, {rates.dtype_name}:"]
    at: dict[tuple[float, str], list[str]] = {}
    for kernel in rates.kernels:
        at.setdefault((kernel.keys_per_row, kernel.source), []).append(f"{kernel.pass_name} {kernel.tflops:.0f}")
    lines += [f"  {', '.join(found)} TFLOP/s at {keys:,.0f} keys a row: {source}" for (keys, source), found in at.items()]
    lines += [
        f"  {link.operation} {link.gigabytes_per_second:.3g} GB/s at {link.bytes_received / MIB:.4g} MiB: {link.source}"
        for link in rates.links
    ]
    if not rates.links_of(REDUCE_SCATTER):
        lines.append(f"  {REDUCE_SCATTER}: not measured, taken as {ALL_GATHER}'s")
    if hardware.network is None:
        lines.append("  between nodes of 8: taken to be as fast as inside one; --link-gbps says what your network does")
    else:
        lines.append(f"  between nodes of 8: {hardware.network:g} GB/s per GPU and direction, as given")
    return lines


def render_checked(checked: Sequence[Checked], rates: Rates) -> RenderableType:
    """Predicted beside measured."""
    table = Table("case", "pass", "what", "measured ms", "predicted ms", "error", title="Against measurements")
    table.title_justify = "left"
    for one in checked:
        record = one.record
        measured = f"{record.milliseconds:.3f}"
        table.add_row(record.case, record.pass_name, record.peer, measured, f"{one.predicted_ms:.3f}", f"{one.error:+.1%}")
    lines = [f"rates of {rates.device}, {rates.date}"]
    of_weft = [one.error for one in checked if one.record.peer == WEFT]
    if of_weft:
        worst_error = max(of_weft, key=abs)
        lines.insert(0, f"whole passes: off by {worst_error:+.1%} at most, {np.mean(np.abs(of_weft)):.1%} in the mean")
    return Group(table, *(Text(line, style="dim") for line in lines))
