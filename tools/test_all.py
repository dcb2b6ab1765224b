"""Run every check of the project that needs no GPU, and end with one line: `N passed, N failed, N skipped`.

The linter, the formatter and the type checker count as one test each. Tests run in several pytest processes, because Triton decides at import
whether it interprets kernels, and because the kernels are held to two releases of it. Two of these run at a time: tests that start processes
wait for them now and then, and a suite's last tests leave a core idle. What runs beside gives way, so that no test waits long for its turn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Targets for which nothing is generated that others do not have: sm_86 is as sm_80, and sm_120 multiplies as sm_80 and copies as sm_90.
ALIKE = ("sm_86", "sm_120")
INTERPRETED = {"TRITON_INTERPRET": "1"}
COMPILATION = "tests/cli/test_compile.py"
# A worker that is free takes the next file: what a module's tests share, processes among it, is made once.
BY_FILE = ("--dist", "loadfile", "--no-loadscope-reorder")
# Or the next test: those that take long and share nothing leave no worker waiting for another.
BY_TEST = ("--dist", "load", "--maxschedchunk", "1")
# Each worker begins with a part of its own, in order, and takes of another's when it is done.
IN_PARTS = ("--dist", "worksteal")


@dataclass(frozen=True)
class Counts:
    """Outcomes of a step."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclass(frozen=True)
class Check:
    """A command that passes or fails as a whole."""

    name: str
    arguments: tuple[str, ...]

    def run(self) -> Counts:
        return Counts(passed=1) if run_beside(self.name, self.arguments, dict(os.environ)) == 0 else Counts(failed=1)


def run_beside(name: str, arguments: Sequence[str], environment: dict[str, str]) -> int:
    """Run a Python module while something else runs, which comes first; what it prints appears when it is done. Its exit code."""
    command = ["nice", "-n", "10", sys.executable, "-m", *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(f"\n== {name}: {' '.join(arguments)}\n{result.stdout}", end="", flush=True)
    return result.returncode


@dataclass(frozen=True)
class Suite:
    """One pytest process, how it deals its tests out to its workers, and whether it runs beside others."""

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    deal: tuple[str, ...] = IN_PARTS
    is_beside: bool = False

    def run(self) -> Counts:
        workers = str(min(os.cpu_count() or 1, 8))
        # One thread a worker: the workers fill the cores already.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        environment = {name: value for name, value in environment.items() if value}
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            pytest = ["pytest", "-q", "-n", workers, *self.deal, f"--junitxml={report}", "-m", "not gpu", *self.arguments]
            if self.is_beside:
                code = run_beside(self.name, pytest, environment)
            else:
                print(f"\n== {self.name}: {' '.join(pytest)}", flush=True)
                code = subprocess.run([sys.executable, "-m", *pytest], cwd=ROOT, env=environment, check=False).returncode
            counts = read_report(report)
        # A process that died, or that found no test, has failed even when no test did.
        return counts + Counts(failed=1) if code != 0 and counts.failed == 0 else counts


def read_report(path: Path) -> Counts:
    """The counts of a pytest JUnit report; nothing where pytest wrote none."""
    if not path.exists():
        return Counts()
    total = failed = skipped = 0
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return Counts(total - failed - skipped, failed, skipped)


def without(targets: tuple[str, ...]) -> list[str]:
    """Arguments of pytest that leave the compilation for some targets out."""
    test = f"{COMPILATION}::test_what_selection_gives_compiles_for_every_target_within_bounds"
    return [f"--deselect={test}[{target}-" for target in targets]


def checks() -> list[Check]:
    """The steps that are no tests."""
    return [
        Check("lint", ("ruff", "check", ".")),
        Check("format", ("ruff", "format", "--check", ".")),
        # One process: where cores are scarce, mypy's workers do not answer in time.
        Check("types", ("mypy",)),
    ]


def suites(old_triton: Path) -> list[Suite]:
    """All tests. `old_triton`: a folder with the oldest Triton served and a numpy that its interpreter takes."""
    old = {"PYTHONPATH": os.pathsep.join([str(old_triton.resolve()), str(ROOT / "src")])}
    # An empty value takes a name out of the environment.
    compiled = {"TRITON_INTERPRET": ""}
    others = ("tests/kernels", "tests/gpu", COMPILATION)
    return [
        Suite("tests", ("tests", *(f"--ignore={path}" for path in others)), compiled, BY_FILE),
        Suite("compilation", (COMPILATION,), compiled, BY_TEST),
        # Short tests, which may wait; those of the compilation could run out of time.
        Suite("kernels, interpreted", ("tests/kernels",), INTERPRETED, is_beside=True),
        Suite("kernels, interpreted, oldest Triton", ("tests/kernels", "--covering"), {**old, **INTERPRETED}, is_beside=True),
        Suite(
            "compilation and launches, oldest Triton",
            (COMPILATION, "tests/unit/test_replay.py", *without(ALIKE)),
            {**old, **compiled},
            BY_TEST,
        ),
    ]


def timed(step: Check | Suite) -> tuple[Counts, str]:
    """A step's outcomes, and the line that tells of them."""
    begin = time.monotonic()
    counts = step.run()
    return counts, f"{step.name:<40} {counts}  ({time.monotonic() - begin:.0f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old-triton", type=Path, required=True, help="folder that holds the oldest Triton served")
    old_triton: Path = parser.parse_args().old_triton
    if not (old_triton / "triton").is_dir():
        parser.error(f"--old-triton holds an installed Triton: expected {old_triton / 'triton'}")
    found = suites(old_triton)
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.map(timed, [*checks(), *(suite for suite in found if suite.is_beside)])
        told = [timed(suite) for suite in found if not suite.is_beside]
        told = [*waiting, *told]
    total = sum((counts for counts, _ in told), Counts())
    print("\n" + "\n".join(line for _, line in told))
    print(total, flush=True)
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
