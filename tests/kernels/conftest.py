"""Kernel tests run the real Triton kernels on CPU tensors, in Triton's interpreter, in a process of their own.

Triton decides when it is imported whether `triton.jit` compiles or interprets, so this file must come before any import of it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/kernels interpret the Triton kernels: expected Triton not to be imported yet, or TRITON_INTERPRET=1 from the start; "
        "given a process that has imported Triton to compile. Run `pytest tests/kernels` by itself."
    )
os.environ["TRITON_INTERPRET"] = "1"

import triton

assert triton.knobs.runtime.interpret

from weft_attn.kernels.call import KernelCall
from weft_attn.launch import device as launch_device
from weft_attn.launch.device import Device
from weft_attn.testing.interpreter import quick_interpreter

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    # Rows that see nothing take log2(0) and -inf - -inf on their way to a `where`; numpy warns, GPUs do not.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--covering", action="store_true", help="of each test one case, such that all together bring most values")


def values_of(item: pytest.Item) -> set[tuple[str, str]]:
    """What a case brings: its parameters' values."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return {(name, repr(value)) for name, value in parameters.items()}


def covering(tests: Iterable[Iterable[pytest.Item]]) -> list[pytest.Item]:
    """Of each test the case that brings most values which no case of a test before brings; of equal ones the last, which has most in it."""
    brought: set[tuple[str, str]] = set()
    kept = []
    for cases in tests:
        kept.append(max(reversed(list(cases)), key=lambda case: len(values_of(case) - brought)))
        brought |= values_of(kept[-1])
    return kept


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--covering"):
        return
    kept = covering(cases for _, cases in itertools.groupby(items, lambda item: item.nodeid.split("[")[0]))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    strangers = sorted({str(item.path) for item in session.items if HERE not in item.path.parents})
    if strangers:
        raise pytest.UsageError(
            f"tests/kernels interpret every Triton kernel of their process: expected them alone, given {strangers[0]} too. "
            "Run `pytest tests/kernels` by itself."
        )


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    with quick_interpreter():
        yield


@pytest.fixture(autouse=True)
def _unwritten_is_nan(nan_memory: None) -> None:
    """Every kernel test runs with outputs that hold NaN until a kernel writes them."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    """Change the interpreter's device: with many multiprocessors few rows split their keys; sm_90 has a copy engine."""

    def apply(**changes: Any) -> Device:
        changed = replace(launch_device.INTERPRETER, **changes)
        monkeypatch.setattr("weft_attn.ops.execute.device_of", lambda device: changed)
        return changed

    return apply


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[KernelCall]:
    """The kernel calls that a test launches, in order."""
    made: list[KernelCall] = []
    launch = KernelCall.launch

    def record(call: KernelCall) -> Any:
        if 0 not in call.grid:
            made.append(call)
        return launch(call)

    monkeypatch.setattr(KernelCall, "launch", record)
    return made
