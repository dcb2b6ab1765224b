"""Searching launch configs: a stated grid, what the device can hold of it, checked, timed side by side, written as a table.

Two stages. The whole grid gets a few short rounds; the fastest, and the fastest one's switches flipped, then get full ones.
Nothing here runs during training: kernels read the table that this writes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from weft_attn import ops
from weft_attn.bench.cases import (
    TERABYTES,
    Case,
    Model,
    Sizes,
    chosen_device,
    chosen_tokens,
    decode_case,
    make_tensors,
    packed_case,
    square_cases,
)
from weft_attn.bench.one_kernel import (
    DKDV,
    DQ,
    FORWARD,
    Check,
    KernelRuns,
    base_choice,
    describe_config,
    measure_configs,
    needs_kernels,
)
from weft_attn.bench.records import Environment, Record, environment_of
from weft_attn.bench.timing import Notify, Pace, silent
from weft_attn.errors import InvalidInput, WeftError, require
from weft_attn.launch.config import CONFIGS, LaunchConfig, StreamConfig
from weft_attn.launch.device import Device, device_of
from weft_attn.launch.resources import shortfall
from weft_attn.launch.select import MANY_ROWS, Problem, Row, Table, parse_table, tma_usable
from weft_attn.outputs import require_writable

MIB = 2**20
KERNELS = (FORWARD, DKDV, DQ)
FEW_ROWS = "forward, few rows"
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    FORWARD: {
        "block_q": (64, 128),
        "block_k": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "use_tma": (False, True),
    },
    FEW_ROWS: {
        "block_q": (16, 32, 64),
        "block_k": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "programs_per_sm": (1, 2, 4),
    },
    DKDV: {
        "block_q": (32, 64, 128),
        "block_k": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
        "use_tma": (False, True),
    },
    DQ: {
        "block_q": (64, 128),
        "block_k": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
        "use_tma": (False, True),
    },
}
# Tried one at a time on the fastest config of the grid.
SWITCHES: dict[str, tuple[Any, ...]] = {
    "cache_modifier": ("", ".cg"),
    "identity_dot": (False, True),
    "wave_bytes": (16 * MIB, 32 * MIB, 64 * MIB),
}
FINALISTS = 6
GRID_ROUNDS, GRID_ROUND_MS = 3, 5.0
CHOSEN = "as chosen"
# Documents of the shape on which candidates are checked: a single key, partial tiles, several tiles.
CHECK_LENGTHS = (1, 63, 129, 319)


@dataclass(frozen=True)
class Search:
    """What to tune for.

    Attributes:
        kernel: one of KERNELS.
        model: heads, head dim and dtype.
        seqlen: tokens of the causal square that is timed (keys, with few rows).
        few_rows: rows of a packed tile that hold work when keys are split; MANY_ROWS for full tiles.
    """

    kernel: str
    model: Model
    seqlen: int
    few_rows: int = MANY_ROWS

    def __post_init__(self) -> None:
        require(self.kernel in KERNELS, "the kernel is tunable", expected=f"one of {KERNELS}", given=repr(self.kernel))
        require(
            self.few_rows == MANY_ROWS or self.kernel == FORWARD,
            "few rows are the forward's",
            expected=f"kernel {FORWARD!r}",
            given=repr(self.kernel),
        )

    @property
    def rows_of_tokens(self) -> int:
        """Query rows whose heads fill `few_rows` rows of a packed tile."""
        return max(1, self.few_rows * self.model.kv_heads // self.model.heads)

    def timed_case(self) -> Case:
        if self.few_rows != MANY_ROWS:
            return decode_case(self.model, self.rows_of_tokens, self.seqlen)
        return square_cases(self.model, self.seqlen)[0]

    def checked_case(self) -> Case:
        if self.few_rows != MANY_ROWS:
            return decode_case(self.model, self.rows_of_tokens, sum(CHECK_LENGTHS))
        return packed_case(self.model, "checked", CHECK_LENGTHS)


@dataclass(frozen=True)
class Tuned:
    """A search's records, the grid's before the finalists', and the table row of the fastest; None if nothing ran."""

    records: list[Record]
    row: Row | None


@dataclass(frozen=True)
class Request:
    """What to tune, where, and the table to write; None: none."""

    searches: Sequence[Search]
    device_name: str
    pace: Pace
    write: Path | None = None


def searches(
    kernels: Sequence[str] | None,
    model: Model,
    head_dims: Sequence[int] | None,
    *,
    few_rows: int,
    seqlen: int | None,
    sizes: Sizes,
) -> list[Search]:
    """A search for each kernel (None: all that `few_rows` leaves) and head dim; `seqlen` defaults to the suites' own."""
    chosen = kernels or ((FORWARD,) if few_rows != MANY_ROWS else KERNELS)
    tokens = chosen_tokens(seqlen, sizes.decode_keys if few_rows != MANY_ROWS else sizes.square)
    models = [replace(model, head_dim=head_dim) for head_dim in head_dims or (model.head_dim,)]
    return [Search(kernel, one, tokens, few_rows) for kernel in chosen for one in models]


def run_searches(request: Request, notify: Notify = silent) -> Iterator[list[Record]]:
    """The records of one search after the other, each written to the table before the next begins.

    Raises:
        InvalidInput: a table that could not be written, or that is another device's, before anything runs.
    """
    if request.write is not None:
        require_writable(request.write)
    device = chosen_device(request.device_name)
    needs_kernels(device)
    if request.write is not None:
        table_to_write(request.write, device_of(device))
    environment = environment_of(device)
    for search in request.searches:
        tuned = tune(search, device, request.pace, environment, notify=notify)
        if request.write is not None and tuned.row is not None:
            write_rows(request.write, [tuned.row], device_of(device))
        yield tuned.records


def candidates(search: Search, problem: Problem, device: Device) -> list[StreamConfig]:
    """The configs of the search's grid that the device can hold."""
    grid = GRIDS[FEW_ROWS if search.few_rows != MANY_ROWS else search.kernel]
    found = []
    for values in itertools.product(*grid.values()):
        config = CONFIGS[search.kernel](**dict(zip(grid, values, strict=True)))
        assert isinstance(config, StreamConfig)
        if _holds(config, problem, device):
            found.append(config)
    return found


def flipped(config: StreamConfig, problem: Problem, device: Device) -> list[StreamConfig]:
    """The config with one switch set otherwise, each in turn."""
    own = {f.name for f in fields(config)}
    found = [
        replace(config, **{name: value})
        for name, values in SWITCHES.items()
        for value in values
        if name in own and value != getattr(config, name)
    ]
    return [other for other in found if _holds(other, problem, device)]


def _holds(config: StreamConfig, problem: Problem, device: Device) -> bool:
    if config.use_tma and not tma_usable(problem, device):
        return False
    return not shortfall(config, problem.shape, device)


def tune(search: Search, device: torch.device, pace: Pace, environment: Environment, *, notify: Notify = silent) -> Tuned:
    """Search one kernel's configs on a device."""
    case = search.timed_case()
    runs = KernelRuns(case, make_tensors(case, device))
    require(
        search.few_rows == MANY_ROWS or runs.splits_keys(),
        "few rows leave the device idle, so that keys are split",
        expected="fewer heads or rows, or more keys",
        given=f"{search.rows_of_tokens} rows of {search.model.heads} heads on {search.seqlen} keys",
    )
    small = search.checked_case()
    check = Check.on(KernelRuns(small, make_tensors(small, device)))
    problem, holder = ops.problem_of(runs.case.plan, runs.tensors.q, runs.tensors.k, runs.tensors.v), device_of(device)
    chosen = base_choice(search.kernel, case, runs.tensors).config

    def measured(configs: Iterable[LaunchConfig], at: Pace) -> tuple[list[Record], list[LaunchConfig]]:
        """Records of the chosen config and of these, and those that were timed, fastest first."""
        named = {CHOSEN: chosen} | {describe_config(config): config for config in configs if config != chosen}
        records = measure_configs(runs, search.kernel, named, check, at, environment, notify=notify)
        timed = sorted((r.milliseconds, r.peer) for r in records if r.milliseconds is not None)
        return records, [named[label] for _, label in timed]

    quick = replace(pace, rounds=min(GRID_ROUNDS, pace.rounds), round_ms=min(GRID_ROUND_MS, pace.round_ms))
    grid_records, ranked = measured(candidates(search, problem, holder), quick)
    if not ranked:
        return Tuned(grid_records, None)
    assert isinstance(ranked[0], StreamConfig)
    finalists = [*ranked[:FINALISTS], *flipped(ranked[0], problem, holder)]
    final_records, ranked = measured(finalists, pace)
    return Tuned(grid_records + final_records, _row(search, ranked[0], problem, final_records) if ranked else None)


def _row(search: Search, config: LaunchConfig, problem: Problem, records: Sequence[Record]) -> Row:
    best = min((r for r in records if r.milliseconds is not None), key=lambda r: r.milliseconds or 0.0)
    assert best.rate is not None
    figure = "terabytes_per_s" if best.unit == TERABYTES else "tflops"
    environment = best.environment
    return Row(
        table="",
        head_dim=problem.shape.widest,
        dtype_bits=problem.dtype_bits,
        few_rows=search.few_rows,
        config=config,
        measured={
            figure: round(best.rate, 2 if best.unit == TERABYTES else 0),
            "torch": environment.torch,
            "triton": environment.triton,
            "date": environment.date[:10],
        },
        note=f"{best.case}, {best.heads}",
    )


# ---- tables ---------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Sequence[Row], device: Device) -> None:
    """Write rows into a device's table: a new file, or in place of the rows for the same work in the one that is there.

    Raises:
        InvalidInput: as `table_to_write`.
    """
    table, heading = table_to_write(path, device)
    kept = {_work(row): row for row in table.rows} | {_work(row): row for row in rows}
    path.write_text(heading + format_table(replace(table, rows=tuple(kept.values()))), encoding="utf-8")


def table_to_write(path: Path, device: Device) -> tuple[Table, str]:
    """A device's table and the comment above it; an empty one where there is no file.

    Raises:
        InvalidInput: the file holds no table, or that of another device.
    """
    if not path.exists():
        return Table(path.stem, device.arch, device.name, ()), ""
    try:
        text = path.read_text(encoding="utf-8")
        table = parse_table(path.stem, text)
    except WeftError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"the file holds a launch table: expected what `weft tune --write` writes, given {path}") from error
    if table.arch != device.arch or (table.device is not None and table.device not in device.name):
        raise InvalidInput(
            f"the table is this device's: expected {device.name} ({device.arch}), given {table.device} ({table.arch})"
        )
    return table, "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))


def _work(row: Row) -> tuple[str, int, int, int, int]:
    """What a row serves."""
    return row.config.kernel, row.head_dim, row.dtype_bits, row.few_rows, row.least_keys


def format_table(table: Table) -> str:
    """A table as TOML, the inverse of `launch.select.parse_table`: rows by kernel, widest last."""
    match = {"arch": table.arch} | ({} if table.device is None else {"device": table.device})
    blocks = ["[match]\n" + _entries(match)]
    for kernel in CONFIGS:
        rows = sorted((row for row in table.rows if row.config.kernel == kernel), key=_work)
        blocks += [f"[[{kernel}]]\n" + _entries(_row_entries(row)) for row in rows]
    return "\n".join(blocks)


def _row_entries(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {} if row.few_rows == MANY_ROWS else {"few_rows": row.few_rows}
    found |= {"head_dim": row.head_dim, "dtype_bits": row.dtype_bits}
    found |= {"least_keys": row.least_keys} if row.least_keys else {}
    found |= {f.name: getattr(row.config, f.name) for f in fields(row.config)}
    found |= {"measured": row.measured} if row.measured else {}
    return found | ({"note": row.note} if row.note else {})


def _entries(values: dict[str, Any]) -> str:
    return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)
