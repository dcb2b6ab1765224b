"""Which numbers a kernel runs with: one function, one order.

    the caller's override, the exact device's table, the architecture's table, the analytic default

and otherwise an error that says what was asked. A table is a TOML file in `tables/`; a row that a device cannot launch is never
chosen, because `resources.py` computes what it needs.
"""

from __future__ import annotations

import contextlib
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from importlib import resources as package_files
from typing import Any

from weft_attn.errors import Unsupported
from weft_attn.launch.config import (
    CONFIGS,
    HopperBackwardConfig,
    HopperConfig,
    InvalidConfig,
    LaunchConfig,
    PairedConfig,
    StreamConfig,
)
from weft_attn.launch.device import Device
from weft_attn.launch.resources import Shape, shortfall

MANY_ROWS = 0

# Kernels for the same work, the preferred one first.
FORWARD_KERNELS = ("hopper_forward", "forward")
DKDV_KERNELS = ("hopper_backward_dkdv", "backward_dkdv")
DQ_KERNELS = ("hopper_backward_dq", "backward_dq")
# All gradients in one kernel, five products instead of seven, where the order of dQ's sums need not be fixed.
FUSED_KERNEL = "hopper_backward"


@dataclass(frozen=True)
class Problem:
    """What selection looks at.

    Attributes:
        head_dim, head_dim_v: D and Dv.
        dtype_bits: 16 or 32.
        few_rows: rows of a packed query tile that hold work when query rows are few and keys are split; MANY_ROWS otherwise.
        tma_possible: the tensors' alignment allows tensor descriptors.
        keys_per_query: visible keys of a query row, in the mean.
        group: query heads of a KV head.
    """

    head_dim: int
    head_dim_v: int
    dtype_bits: int
    few_rows: int = MANY_ROWS
    tma_possible: bool = True
    keys_per_query: float = math.inf
    group: int = 1

    @property
    def shape(self) -> Shape:
        return Shape(self.head_dim, self.head_dim_v, self.dtype_bits)


@dataclass(frozen=True)
class Choice:
    """A config, where it came from and why."""

    config: LaunchConfig
    source: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A table's row: what it serves, the numbers, and what was measured with them.

    Attributes:
        head_dim: serves padded head dims up to this.
        dtype_bits: serves this width.
        few_rows: serves packed tiles of up to this many rows when keys are split; MANY_ROWS: full tiles.
        least_keys: serves queries that see so many keys or more, in the mean.
    """

    table: str
    head_dim: int
    dtype_bits: int
    few_rows: int
    config: LaunchConfig
    measured: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)
    note: str = ""
    least_keys: int = 0


@dataclass(frozen=True)
class Table:
    """One TOML file: rows for an architecture, or for one device of it."""

    name: str
    arch: str
    device: str | None
    rows: tuple[Row, ...]


@lru_cache(maxsize=1)
def tables() -> tuple[Table, ...]:
    """All tables of the package, parsed once."""
    found = []
    for entry in sorted((package_files.files("weft_attn.launch") / "tables").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".toml"):
            found.append(parse_table(entry.name.removesuffix(".toml"), entry.read_text(encoding="utf-8")))
    return tuple(found)


def parse_table(name: str, text: str) -> Table:
    """A table from its TOML text; an unknown key or kernel is an error, not ignored."""
    data = tomllib.loads(text)
    match = data.pop("match")
    rows = []
    for kernel, entries in data.items():
        if kernel not in CONFIGS:
            raise InvalidConfig(f"table {name} names known kernels: expected one of {sorted(CONFIGS)}, given {kernel!r}")
        names = {f.name for f in fields(CONFIGS[kernel])}
        for entry in entries:
            numbers = {key: entry.pop(key) for key in list(entry) if key in names}
            rows.append(Row(table=name, config=CONFIGS[kernel](**numbers), **{"few_rows": MANY_ROWS, **entry}))
    return Table(name, match["arch"], match.get("device"), tuple(rows))


# Replaced, never mutated. Of the process, not of the context: a backward on a GPU runs on threads of autograd's own.
_overrides: dict[str, LaunchConfig] = {}


@contextlib.contextmanager
def override(*configs: LaunchConfig) -> Iterator[None]:
    """Run kernels with these configs inside the scope: for tests, tuning and ablation.

    Args:
        configs: at most one per kernel; the config's type names the kernel.

    Raises:
        InvalidConfig: two configs for one kernel, or something that is no config. A config that the device cannot hold raises
            when its kernel is to be launched; it is never replaced.
    """
    global _overrides
    outer, chosen = _overrides, dict(_overrides)
    seen: set[str] = set()
    for config in configs:
        if not isinstance(config, LaunchConfig) or config.kernel in seen:
            raise InvalidConfig(f"override takes one config per kernel: expected distinct configs, given {configs}")
        seen.add(config.kernel)
        chosen[config.kernel] = config
    _overrides = chosen
    try:
        yield
    finally:
        _overrides = outer


def current_overrides() -> tuple[LaunchConfig, ...]:
    """The configs of the innermost scopes, hashable: part of what a prepared launch depends on."""
    return tuple(_overrides.values())


def select(kernel: str, problem: Problem, device: Device) -> Choice:
    """The config that `kernel` runs with for `problem` on `device`.

    Raises:
        InvalidConfig: an override that the device cannot hold.
        Unsupported: no config fits the device.
    """
    overridden = _overrides.get(kernel)
    if overridden is not None:
        if isinstance(overridden, HopperConfig) and not _serves_hopper(problem, device):
            raise InvalidConfig(
                f"the overriding {kernel} config fits the call: expected 16-bit tensors that are 16-byte aligned, equal head dims "
                f"that are a power of two, enough rows, and sm_90; given {problem} on {device.name} ({device.arch})"
            )
        if problem.group % programs_of(overridden):
            raise InvalidConfig(
                f"the overriding {kernel} config fits the call: expected an even number of query heads for each KV head, "
                f"given {problem.group} and {overridden}"
            )
        lacking = shortfall(overridden, problem.shape, device)
        if lacking:
            raise InvalidConfig(f"the overriding {kernel} config fits {device.name}: {lacking}, given {overridden}")
        if isinstance(overridden, StreamConfig) and overridden.use_tma and not tma_usable(problem, device):
            raise InvalidConfig(
                f"the overriding {kernel} config fits the tensors: expected use_tma=False for head dims that are no power of "
                f"two, tensors that are not 16-byte aligned, or {device.arch}; given {overridden}"
            )
        return Choice(overridden, "override")
    return _select_from_tables(kernel, problem, device)


def select_first(kernels: tuple[str, ...], problem: Problem, device: Device) -> Choice:
    """The first of several kernels for the same work that is overridden, else the first that a table serves.

    Raises:
        InvalidConfig, Unsupported: as `select` does for the one that is overridden, or for the last.
    """
    for kernel in kernels:
        if kernel in _overrides:
            return select(kernel, problem, device)
    for kernel in kernels[:-1]:
        choice, _ = _search_tables(kernel, problem, device)
        if choice is not None:
            return choice
    return select(kernels[-1], problem, device)


def select_fused(problem: Problem, device: Device) -> Choice | None:
    """The config of the kernel that computes all gradients, or None where the kernels for each of them run instead.

    Raises:
        InvalidConfig: an override that the device cannot hold.
    """
    if FUSED_KERNEL in _overrides:
        return select(FUSED_KERNEL, problem, device)
    if any(kernel in _overrides for kernel in (*DKDV_KERNELS, *DQ_KERNELS)):
        return None
    return _search_tables(FUSED_KERNEL, problem, device)[0]


def select_in_turn(problem: Problem, device: Device) -> Choice | None:
    """The config of the kernel that computes all gradients with programs that add in turn, deterministic; None: there is none.

    Raises:
        InvalidConfig: as `select_fused`.
    """
    choice = select_fused(problem, device)
    return choice if choice and isinstance(choice.config, HopperBackwardConfig) and choice.config.in_turn else None


def select_backward(problem: Problem, device: Device, *, deterministic: bool) -> tuple[Choice, ...]:
    """The kernels that compute all gradients: one for all of them, or one for dK and dV and one for dQ.

    Args:
        deterministic: bits must not change from run to run.

    Raises:
        InvalidConfig, Unsupported: as `select_first`.
    """
    fused = None if deterministic else select_fused(problem, device)
    if fused:
        return (fused,)
    return select_first(DKDV_KERNELS, problem, device), select_first(DQ_KERNELS, problem, device)


def tma_usable(problem: Problem, device: Device) -> bool:
    """Tensor descriptors need the hardware, aligned tensors, and heads that fill their tile's columns."""
    return not tma_lacking(problem, device)


def tma_lacking(problem: Problem, device: Device) -> str:
    """Why there are no tensor descriptors, in words; empty where there are."""
    if not device.has_tma:
        return "the device has no copy engine for them"
    if not all(d >= 16 and d & (d - 1) == 0 for d in (problem.head_dim, problem.head_dim_v)):
        return f"head dims {problem.head_dim}/{problem.head_dim_v} are not both a power of two from 16 on"
    return "" if problem.tma_possible else "their strides or addresses are not whole 16 bytes"


def programs_of(config: LaunchConfig) -> int:
    """Programs of a cluster: they share a KV head, so its query heads are divided among them."""
    return config.cluster if isinstance(config, PairedConfig) else 1


def is_served(kernel: str, problem: Problem, device: Device) -> bool:
    """Whether a table has a row of this kernel for the problem that the device can hold."""
    return _search_tables(kernel, problem, device)[0] is not None


def _serves_hopper(problem: Problem, device: Device) -> bool:
    """What every Hopper kernel asks of a call."""
    return device.has_hopper_kernels and not hopper_lacking(problem, device)


def hopper_lacking(problem: Problem, device: Device) -> str:
    """Which of what every Hopper kernel asks of a call is not so, in words; empty where all is."""
    if problem.dtype_bits != 16:
        return "tensors are not of 16 bits"
    if problem.head_dim != problem.head_dim_v:
        return f"head dims {problem.head_dim}/{problem.head_dim_v} differ"
    if problem.few_rows != MANY_ROWS:
        return "query rows are few"
    return tma_lacking(problem, device)


def _select_from_tables(kernel: str, problem: Problem, device: Device) -> Choice:
    choice, rejected = _search_tables(kernel, problem, device)
    if choice is None:
        raise Unsupported(
            f"a {kernel} config fits {device.name} ({device.arch}) for head dims {problem.head_dim}/{problem.head_dim_v}, "
            f"{problem.dtype_bits}-bit: expected a table row or override that fits, given {rejected or 'no row'}"
        )
    return choice


def _search_tables(kernel: str, problem: Problem, device: Device) -> tuple[Choice | None, list[str]]:
    """The first row that serves and fits, and why the rows before it do not."""
    # Plans whose queries see as many keys as far as any row tells them apart are searched for once.
    keys = max(least for least in _key_numbers() if least <= problem.keys_per_query)
    return _search_rows(kernel, replace(problem, keys_per_query=keys), device)


@lru_cache(maxsize=1)
def _key_numbers() -> frozenset[int]:
    """All rows' `least_keys`, and 0."""
    return frozenset({0, *(row.least_keys for table in tables() for row in table.rows)})


@lru_cache(maxsize=4096)
def _search_rows(kernel: str, problem: Problem, device: Device) -> tuple[Choice | None, list[str]]:
    rejected: list[str] = []
    for source, rows in _candidates(kernel, problem, device):
        for row in rows:
            config, note = row.config, row.note
            if isinstance(config, StreamConfig) and config.use_tma and not tma_usable(problem, device):
                config = replace(config, use_tma=False)
                note = f"{note}; reads through pointers: {tma_lacking(problem, device)}".lstrip("; ")
            lacking = shortfall(config, problem.shape, device)
            if not lacking:
                return Choice(config, source, note), rejected
            rejected.append(f"{source}: {lacking}")
    return None, rejected


def _candidates(kernel: str, problem: Problem, device: Device) -> Iterator[tuple[str, list[Row]]]:
    def serving(table: Table) -> list[Row]:
        rows = [
            row
            for row in table.rows
            if row.config.kernel == kernel
            and row.dtype_bits == problem.dtype_bits
            and row.head_dim >= problem.shape.widest
            and row.least_keys <= problem.keys_per_query
            and problem.group % programs_of(row.config) == 0
            and (row.few_rows == MANY_ROWS) == (problem.few_rows == MANY_ROWS or kernel != "forward")
            and (
                not isinstance(row.config, HopperConfig)
                or (row.head_dim == problem.head_dim and _serves_hopper(problem, device))
            )
        ]
        # The tightest row that serves, one for pairs of heads before another; when no few-rows tile holds all rows, the largest one.
        return sorted(
            rows,
            key=lambda r: (
                r.head_dim,
                -r.least_keys,
                -programs_of(r.config),
                r.few_rows < problem.few_rows,
                abs(r.few_rows - problem.few_rows),
            ),
        )

    for table in tables():
        if table.device is not None and table.arch == device.arch and table.device in device.name:
            yield f"device table {table.name}", serving(table)
    for table in tables():
        if table.device is None and table.arch == device.arch:
            yield f"architecture table {table.name}", serving(table)
    analytic = next(t for t in tables() if t.arch == "any")
    yield (
        "analytic default (largest of a short list that fits)",
        sorted(
            serving(analytic), key=lambda r: -r.config.block_q * r.config.block_k if isinstance(r.config, StreamConfig) else 0
        ),
    )
