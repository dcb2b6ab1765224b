"""What a measurement leaves behind: records that say everything needed to judge a figure, and their JSON form."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

import weft_attn
from weft_attn.bench.cases import Case, Model
from weft_attn.bench.workload import Workload
from weft_attn.errors import InvalidInput
from weft_attn.testing.compare import Budget

# Measured; measured without a check; wrong result, so no figure; not measured, for the reason in the note.
OK, UNCHECKED, RED, ABSENT = "ok", "unchecked", "red", "absent"


@dataclass(frozen=True)
class Environment:
    """Where and with what a measurement ran; `revision` is the git description of the package, where it has one."""

    device: str
    torch: str
    triton: str
    weft: str
    revision: str | None
    date: str


@dataclass(frozen=True)
class Record:
    """One pass of one peer on one case.

    Attributes:
        status: OK, UNCHECKED, RED or ABSENT; only the first two carry a figure.
        note: why a peer is absent, what failed, what a peer's work includes.
        milliseconds: median time of a call; quartiles: its spread over the rounds.
        rate, unit: TFLOP/s over visible pairs (backward: 2.5 forwards), TB/s of K and V, calls/s where the host's time is measured, or None.
        ratio_to_weft: speed as a share of Weft's in the same rounds: 1.1 is 10% faster than Weft.
        budgets: error against float64 and its bound, by tensor, over the sampled rows and keys.
        config: launch config and where it was chosen.
    """

    suite: str
    case: str
    peer: str
    pass_name: str
    status: str
    environment: Environment
    note: str = ""
    milliseconds: float | None = None
    quartiles: tuple[float, float] | None = None
    rate: float | None = None
    unit: str | None = None
    ratio_to_weft: float | None = None
    budgets: dict[str, Budget] = field(default_factory=dict)
    config: str = ""
    plan_digest: str = ""
    pairs: int = 0
    heads: str = ""
    deterministic: bool = False

    @property
    def failed(self) -> bool:
        return self.status == RED


@dataclass(frozen=True)
class GroupRecord(Record):
    """One pass of one way of context parallelism on one batch, measured on all ranks together.

    Attributes:
        milliseconds, quartiles: of the slowest rank in each round.
        workload: the batch and its ranks; None for a collective that is measured alone.
        spread_ms: slowest less fastest rank, the median over the rounds.
        share_of_ideal: time of the same whole work on one GPU alone, the mean of the GPUs, over the ranks, over this time.
        share_of_slowest_ideal: the same of the slowest GPU's time, one GPU's in all rounds: what a group can reach that cuts work evenly,
            however its GPUs differ.
        outside_ms: of a call, outside its attention launches, on the rank where that is least: copies, and communication that nothing
            hides. Both are measured in the same calls, so that clocks do not come between; None for what is no whole call of Weft's.
        peak_bytes: allocated above the inputs at the worst moment, on the rank with most; None where it is not counted.
        formula_bytes: what `ContextParallel.memory` says of the same call; None for those that are not Weft's.
        bytes_received: by a rank from the others, in a collective that is measured alone.
    """

    workload: Workload | None = None
    spread_ms: float | None = None
    share_of_ideal: float | None = None
    share_of_slowest_ideal: float | None = None
    outside_ms: float | None = None
    peak_bytes: int | None = None
    formula_bytes: int | None = None
    bytes_received: int | None = None


def describe_case(case: Case) -> dict[str, Any]:
    """The fields of a record that follow from its case."""
    model = case.model
    return {
        "suite": case.suite,
        "case": case.name,
        "plan_digest": case.plan_digest,
        "pairs": case.plan.pairs,
        "heads": model.name,
        "deterministic": case.deterministic,
    }


def first_line(error: Exception) -> str:
    """An exception as a note: its class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def environment_of(device: torch.device) -> Environment:
    """The environment of measurements on a device, now."""
    return Environment(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        torch=str(torch.__version__),
        triton=_installed("triton"),
        weft=weft_attn.__version__,
        revision=_revision(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _revision() -> str | None:
    """Git description of the checkout that the package runs from, None for an installed one."""
    package = Path(weft_attn.__file__)
    try:
        # A package installed inside some other checkout is not tracked by it.
        _git(package.parent, "ls-files", "--error-unmatch", package.name)
        return _git(package.parent, "describe", "--always", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def write_json(records: Sequence[Record], path: Path) -> None:
    """Write records as a JSON list."""
    path.write_text(json.dumps([asdict(record) for record in records], indent=2) + "\n", encoding="utf-8")


R = TypeVar("R", bound=Record)


def read_json(path: Path, kind: type[R] = Record) -> list[R]:  # type: ignore[assignment]
    """Records of one kind that `write_json` wrote.

    Raises:
        InvalidInput: the file holds something else.
    """
    try:
        return [_record(entry, kind) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidInput(
            f"the file holds benchmark records: expected what `weft bench --out` writes, given {path}"
        ) from error


def _record(entry: dict[str, Any], kind: type[R]) -> R:
    quartiles = entry["quartiles"]
    return kind(
        **{
            **entry,
            **({"workload": _workload(entry["workload"])} if kind is GroupRecord else {}),
            "environment": Environment(**entry["environment"]),
            "quartiles": None if quartiles is None else tuple(quartiles),
            "budgets": {name: Budget(**{**one, "worst": tuple(one["worst"])}) for name, one in entry["budgets"].items()},
        }
    )


def _workload(entry: dict[str, Any] | None) -> Workload | None:
    return (
        None if entry is None else Workload(**{**entry, "lengths": tuple(entry["lengths"]), "model": Model(**entry["model"])})
    )
