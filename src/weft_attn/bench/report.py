"""Records as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from weft_attn.bench.records import ABSENT, RED, UNCHECKED, Record, write_json
from weft_attn.bench.timing import Notify
from weft_attn.outputs import require_writable
from weft_attn.testing.compare import Budget

R = TypeVar("R", bound=Record)

# Columns where the output is no terminal.
WIDE = 180


def show(
    run: Callable[[Notify], Iterable[list[R]]],
    out: Path | None = None,
    figures: Callable[[Sequence[R]], Table] | None = None,
) -> int:
    """Print what a run yields as it comes, and keep it in a file; returns the exit code: 1 when a result is wrong.

    Args:
        run: told where to say what it is doing, yields records.
        out: JSON file of all records so far, written anew after each batch; None: no file.
        figures: the table of a batch of records; None: that of one device's.

    Raises:
        InvalidInput: `out` could not be written, before anything runs; what `run` raises.
    """
    if out is not None:
        require_writable(out)
    console = Console()
    if not console.is_terminal:
        # A file or a pipe has no width to fold tables to.
        console = Console(width=WIDE)
    records: list[R] = []
    with console.status("") as status:
        for batch in run(lambda what: status.update(escape(what))):
            records += batch
            console.print(render(batch, (figures or figures_table)(batch)))
            if out is not None:
                write_json(records, out)
    wrong = failures(records)
    for line in wrong:
        console.print(Text(f"WRONG {line}", style="bold red"))
    return 1 if wrong else 0


def render(records: Sequence[Record], figures: Table) -> RenderableType:
    """Figures, then who is absent and why, what ran, and the environment."""
    parts: list[RenderableType] = [figures]
    parts += [
        Text(line, style="dim")
        for line in _grouped("absent", ((r.peer, r.note, r.case) for r in records if r.status == ABSENT))
    ]
    measured = [r for r in records if r.status not in (RED, ABSENT)]
    parts += [Text(line, style="dim") for line in _grouped("note", ((r.peer, r.note, r.case) for r in measured if r.note))]
    # What the others are compared with; their own configs are in the records.
    bases = {(r.case, r.pass_name): r for r in reversed(measured) if r.config}
    ran = _grouped("ran", ((f"{r.peer}, {r.pass_name}", r.config, r.case) for r in reversed(bases.values())))
    parts += [Text(line, style="dim") for line in ran]
    parts += [Text(line, style="dim") for line in dict.fromkeys(_environment(r) for r in records)]
    return Group(*parts)


def failures(records: Iterable[Record]) -> list[str]:
    """One line for each wrong result."""
    return [f"{_who(record)}: {record.note}" for record in records if record.failed]


def _grouped(title: str, entries: Iterable[tuple[str, str, str]]) -> list[str]:
    """One line for each (who, what), with the cases that share it."""
    cases: dict[tuple[str, str], dict[str, None]] = {}
    for who, what, case in entries:
        cases.setdefault((who, what), {})[case] = None
    return [f"{title} {who}: {what} ({', '.join(names)})" for (who, what), names in cases.items()]


def figures_table(records: Sequence[Record]) -> Table:
    """Time, rate, ratio to Weft and error of each record."""
    table = Table("case", "pass", "peer", "ms (quartiles)", "rate", "ratio", "error / bound")
    shown = [r for r in records if r.status != ABSENT]
    for index, record in enumerate(shown):
        last = ends_section(shown, index)
        table.add_row(
            record.case,
            record.pass_name,
            record.peer,
            milliseconds(record),
            "" if record.rate is None else f"{record.rate:.3g} {record.unit}",
            "" if record.ratio_to_weft is None else f"{record.ratio_to_weft:.2f}",
            worst(record),
            end_section=last,
            style="red" if record.failed else None,
        )
    return table


def ends_section(records: Sequence[Record], index: int) -> bool:
    """Whether the next record is of another case or pass."""
    of = [(record.case, record.pass_name) for record in records[index : index + 2]]
    return len(of) == 1 or of[0] != of[1]


def milliseconds(record: Record) -> str:
    """Median and quartiles, or the status where there is no figure."""
    if record.milliseconds is None or record.quartiles is None:
        return record.status
    low, high = record.quartiles
    return f"{record.milliseconds:.3f} ({low:.3f}-{high:.3f})"


def worst(record: Record) -> str:
    """The tensor nearest to its bound, or beyond it: error / bound of its worst element, relative to its row."""
    if record.status == UNCHECKED:
        return UNCHECKED
    if not record.budgets:
        return ""
    name, found = max(record.budgets.items(), key=lambda item: share_of_bound(item[1]))
    return f"{name} {found.row_error:.1e} / {found.row_bound:.1e}"


def share_of_bound(found: Budget) -> float:
    """Error as a share of its bound."""
    if found.reason:
        return float("inf")
    return max(found.error / found.bound, found.row_error / found.row_bound) if found.bound and found.row_bound else 0.0


def _who(record: Record) -> str:
    return f"{record.peer}, {record.case}, {record.pass_name}"


def _environment(record: Record) -> str:
    e = record.environment
    revision = "" if e.revision is None else f" ({e.revision})"
    versions = f"torch {e.torch}, triton {e.triton}, weft {e.weft}{revision}"
    return "; ".join(part for part in (e.device, record.heads, versions, e.date) if part)
