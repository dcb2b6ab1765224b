"""Run every check of the project that needs no GPU, and end with one line: `N passed, N failed, N skipped`.

The linter, the formatter and the type checker count as one test each. Tests run in several pytest processes, because Triton
decides at import whether it interprets kernels, and because the kernels are held to two releases of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Targets for which nothing is generated that others do not have: sm_86 is as sm_80, and sm_120 multiplies as sm_80 and copies as sm_90.
ALIKE = ("sm_86", "sm_120")
INTERPRETED = {"TRITON_INTERPRET": "1"}


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
        result = subprocess.run([sys.executable, "-m", *self.arguments], cwd=ROOT, check=False)
        return Counts(passed=1) if result.returncode == 0 else Counts(failed=1)


@dataclass(frozen=True)
class Suite:
    """One pytest process."""

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def run(self) -> Counts:
        workers = str(min(os.cpu_count() or 1, 8))
        # One thread a worker: the workers fill the cores already.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        environment = {name: value for name, value in environment.items() if value}
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            # Each worker begins with a part of its own, in order: what a module's tests share is seldom made twice.
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-n",
                workers,
                "--dist",
                "worksteal",
                f"--junitxml={report}",
                "-m",
                "not gpu",
            ]
            code = subprocess.run([*command, *self.arguments], cwd=ROOT, env=environment, check=False).returncode
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
    test = "tests/cli/test_compile.py::test_what_selection_gives_compiles_for_every_target_within_bounds"
    return [f"--deselect={test}[{target}-" for target in targets]


def steps(old_triton: Path) -> list[Check | Suite]:
    """All steps. `old_triton`: a folder with the oldest Triton served and a numpy that its interpreter takes."""
    old = {"PYTHONPATH": os.pathsep.join([str(old_triton.resolve()), str(ROOT / "src")])}
    # An empty value takes a name out of the environment.
    compiled = {"TRITON_INTERPRET": ""}
    return [
        Check("lint", ("ruff", "check", ".")),
        Check("format", ("ruff", "format", "--check", ".")),
        Check("types", ("mypy", "--num-workers", "auto")),
        Suite("tests", ("tests", "--ignore=tests/kernels", "--ignore=tests/gpu"), compiled),
        Suite("kernels, interpreted", ("tests/kernels",), INTERPRETED),
        Suite("kernels, interpreted, oldest Triton", ("tests/kernels", "--covering"), {**old, **INTERPRETED}),
        Suite(
            "compilation and launches, oldest Triton",
            ("tests/cli/test_compile.py", "tests/unit/test_replay.py", *without(ALIKE)),
            {**old, **compiled},
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old-triton", type=Path, required=True, help="folder that holds the oldest Triton served")
    old_triton: Path = parser.parse_args().old_triton
    if not (old_triton / "triton").is_dir():
        parser.error(f"--old-triton holds an installed Triton: expected {old_triton / 'triton'}")
    total = Counts()
    lines = []
    for step in steps(old_triton):
        print(f"\n== {step.name}: {' '.join(step.arguments)}", flush=True)
        begin = time.monotonic()
        counts = step.run()
        total += counts
        lines.append(f"{step.name:<40} {counts}  ({time.monotonic() - begin:.0f} s)")
    print("\n" + "\n".join(lines))
    print(total, flush=True)
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
