"""Measured rates of kernels and links, which a prediction starts from: what was measured, where it was measured, nothing else.

A kernel's rate depends on how many rows fill the GPU and on how many keys a row walks, so it is kept by (rows x query heads,
visible keys a row). Between measurements it is the mean of them weighted by 1 / distance^4 in the logarithms of both, rows
counting for half, since a GPU that is full works no faster on more of them; at a measurement it is the measurement. A link's rate is kept by the bytes that a rank receives, and interpolated in their logarithm;
beyond the measurements the nearest one counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources as package_files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weft_attn.errors import InvalidInput, Unsupported

FloatArray = NDArray[np.float64]

ALL_GATHER, REDUCE_SCATTER = "all_gather", "reduce_scatter"
# Ranks that NVLink joins; beyond them a network does.
GPUS_PER_NODE = 8
ROWS_COUNT_FOR = 0.5
PACKAGED = "nvidia_h200"


@dataclass(frozen=True)
class KernelRate:
    """TFLOP/s over visible pairs of a pass ("forward", "backward") on one GPU.

    Attributes:
        row_heads: query rows times query heads.
        keys_per_row: visible pairs over rows.
        source: the measurement: a case, a note, a date.
    """

    pass_name: str
    row_heads: int
    keys_per_row: float
    tflops: float
    source: str


@dataclass(frozen=True)
class LinkRate:
    """GB/s per direction of a collective between GPUs that NVLink joins: bytes that a rank receives from others over the time."""

    operation: str
    bytes_received: int
    gigabytes_per_second: float
    source: str


@dataclass(frozen=True)
class Rates:
    """Measured rates of one kind of GPU.

    Attributes:
        device, date, versions: what they were measured on, when and with what.
        head_dim, dtype_name: of the kernels' measurements; others are refused.
    """

    device: str
    date: str
    versions: str
    head_dim: int
    dtype_name: str
    kernels: tuple[KernelRate, ...]
    links: tuple[LinkRate, ...]

    def kernel_tflops(self, pass_name: str, row_heads: FloatArray, keys_per_row: FloatArray) -> FloatArray:
        """TFLOP/s of a pass for each entry of two arrays of one shape.

        Raises:
            Unsupported: the pass was not measured.
        """
        measured = [rate for rate in self.kernels if rate.pass_name == pass_name]
        if not measured:
            raise Unsupported(f"the kernel's rate was measured: expected a {pass_name} rate of {self.device}, given none")
        at = np.array([[rate.row_heads, rate.keys_per_row] for rate in measured], dtype=np.float64)
        asked = np.stack([np.maximum(row_heads, 1), np.maximum(keys_per_row, 1)], axis=-1)
        distance = (np.log2(asked)[..., None, :] - np.log2(at)) * (ROWS_COUNT_FOR, 1.0)
        # Near enough to a measurement, it outweighs all others.
        weights = 1 / np.maximum(np.square(distance).sum(axis=-1), 1e-12) ** 2
        tflops = np.array([rate.tflops for rate in measured])
        return (weights * tflops).sum(axis=-1) / weights.sum(axis=-1)

    def link_bytes_per_ms(self, operation: str, bytes_received: float) -> float:
        """Bytes a millisecond of a collective of this size. Reduce-scatter counts as all-gather where it was not measured.

        Raises:
            Unsupported: no collective was measured.
        """
        measured = self.links_of(operation) or self.links_of(ALL_GATHER)
        if not measured:
            raise Unsupported(f"the link's rate was measured: expected an {ALL_GATHER} of {self.device}, given none")
        at = [np.log(rate.bytes_received) for rate in measured]
        rates = [rate.gigabytes_per_second for rate in measured]
        return float(np.interp(np.log(max(1.0, bytes_received)), at, rates)) * 1e6

    def links_of(self, operation: str) -> list[LinkRate]:
        """Measurements of a collective, the smallest first."""
        return sorted((rate for rate in self.links if rate.operation == operation), key=lambda rate: rate.bytes_received)


def packaged_rates() -> Rates:
    """The rates that the package brings, with their sources."""
    file = package_files.files("weft_attn.bench") / "measured" / f"{PACKAGED}.json"
    return _parse(file.read_text(encoding="utf-8"), f"{PACKAGED}.json")


def read_rates(path: Path) -> Rates:
    """Rates that `write_rates` wrote.

    Raises:
        InvalidInput: the file is not there or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"the rates can be read: expected a file at {path}, given {error}") from error
    return _parse(text, str(path))


def write_rates(rates: Rates, path: Path) -> None:
    """Write rates as JSON."""
    path.write_text(json.dumps(asdict(rates), indent=2) + "\n", encoding="utf-8")


def _parse(text: str, name: str) -> Rates:
    try:
        entry: dict[str, Any] = json.loads(text)
        kernels: Sequence[dict[str, Any]] = entry["kernels"]
        links: Sequence[dict[str, Any]] = entry["links"]
        return Rates(
            **{**entry, "kernels": tuple(KernelRate(**k) for k in kernels), "links": tuple(LinkRate(**x) for x in links)}
        )
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidInput(
            f"the file holds measured rates: expected what `weft bench cp --write-rates` writes, given {name}"
        ) from error
