"""Time the kernels of several source trees against each other, and compare what they compute: before and after a change.

    git worktree add ../before HEAD~1
    python tools/compare_trees.py before=../before/src after=src --suites square,packed

Each tree runs in a process of its own, all on one device, and only one of them at a time. A round runs every tree once, in the orders of
`bench/timing.py: rounds_of`, on a card that is heated first; ratios are of rounds, and rounds are short, so that the card's clocks
cancel (ADR 27). Results are compared with the first tree's in sampled rows, to say whether a change changed them, not whether they are right: that is what `weft bench` and the tests say. A name twice on one tree
shows what no change looks like.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Rows of each result that are compared, and the relative difference up to which two orders of the same sums may be apart.
SAMPLED_ROWS = 64
ALLOWED = 1e-2


# ---- a tree's process -----------------------------------------------------------------------------------------------------


class Bench:
    """The cases of one tree, on its device; what the parent asks for is a method's name and its arguments."""

    def __init__(
        self,
        device: str,
        suites: Sequence[str],
        only: str,
        quick: bool,
        model: dict[str, Any],
        deterministic: bool,
        work: dict[str, Any],
    ) -> None:
        from weft_attn.bench import cases, timing

        self.device = cases.chosen_device(device)
        self.clock = timing.clock_of(self.device)
        sizes = cases.QUICK if quick else cases.HOUSE
        chosen = cases.chosen_model(quick=quick, **model)
        found = [c for suite in suites for c in cases.suite_cases(suite, sizes, chosen, deterministic=deterministic, **work)]
        self.cases = [case for case in found if only in case.name]

    def names(self) -> list[dict[str, Any]]:
        return [dict(name=f"{case.suite}: {case.name}", passes=case.passes) for case in self.cases]

    def prepare(self, index: int) -> None:
        """Take up a case; the one before is dropped."""
        from weft_attn.bench import cases, peers

        self.case = self.cases[index]
        self.ready = peers.WEFT.prepare(self.case, cases.make_tensors(self.case, self.device))

    def results(self, pass_name: str) -> dict[str, list[float]]:
        """Sampled rows of what a pass computes."""
        if pass_name == "forward":
            found = {"out": self.ready.packed_forward()}
        else:
            (dq,), dk, dv = self.ready.packed_backward(self.case.plan.total_k)
            found = {"dq": dq, "dk": dk, "dv": dv}
        return {
            name: x[np.linspace(0, len(x) - 1, min(SAMPLED_ROWS, len(x))).astype(int)].float().flatten().tolist()
            for name, x in found.items()
        }

    def milliseconds(self, pass_name: str, repeats: int) -> float:
        numbers = itertools.count()
        run = getattr(self.ready, pass_name)
        return self.clock.measure(lambda: run(next(numbers)), repeats)

    def rate(self, pass_name: str, milliseconds: float) -> tuple[float, str]:
        return self.case.rate(pass_name, milliseconds), self.case.unit


def serve(setup: dict[str, Any]) -> None:
    """Answer the parent's requests, a line of JSON each, until it closes the pipe."""
    # What else writes to the standard output must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import weft_attn

    if not Path(weft_attn.__file__).is_relative_to(setup["source"]):
        raise SystemExit(f"the tree's own code runs: expected weft_attn of {setup['source']}, given {weft_attn.__file__}")
    bench = Bench(**{name: value for name, value in setup.items() if name != "source"})
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(bench, request[0])(*request[1:])), file=answers, flush=True)


# ---- the parent -----------------------------------------------------------------------------------------------------------


class Tree:
    """A process that runs the kernels of one source tree."""

    def __init__(self, name: str, source: Path, setup: dict[str, Any]) -> None:
        self.name = name
        # The tree goes before everything else on the path, an installed package too.
        source = source.resolve()
        environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", json.dumps({**setup, "source": str(source)})]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def ask(self, *request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"{self.name}: its process has ended; its error is above")
        return json.loads(answer)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Row:
    """What one tree gave in one case and pass, beside the first tree."""

    case: str
    pass_name: str
    tree: str
    rate: float
    unit: str
    ratio: float
    quartiles: tuple[float, float]
    difference: float

    def __str__(self) -> str:
        low, high = self.quartiles
        return (
            f"{self.case:40} {self.pass_name:9} {self.tree:16} {self.rate:8.1f} {self.unit:8}"
            f" x{self.ratio:.3f} ({low:.3f}-{high:.3f})  differs by {self.difference:.1e}"
        )


def difference(found: dict[str, list[float]], first: dict[str, list[float]]) -> float:
    """The largest relative difference of any tensor, in the root mean square; infinite where only one of them is a number."""
    worst = 0.0
    for name, values in first.items():
        one, other = np.array(found[name]), np.array(values)
        if not np.array_equal(np.isfinite(one), np.isfinite(other)):
            return float("inf")
        apart, size = (np.sqrt(np.mean(np.square(np.where(np.isfinite(other), x, 0.0)))) for x in (one - other, other))
        worst = max(worst, float(apart / size) if size else float(apart > 0))
    return worst


def compare(trees: Sequence[Tree], warm_up_ms: float, round_ms: float, rounds: int, passes: Sequence[str]) -> list[Row]:
    """Rows of every case, pass and tree, printed as they come."""
    listed = [tree.ask("names") for tree in trees]
    if any(names != listed[0] for names in listed):
        raise SystemExit("the trees do not list the same cases: compare trees whose benchmarks agree")
    if not listed[0]:
        raise SystemExit("no case has this name")
    # The environment's own: a tree may be older than what is asked for.
    from weft_attn.bench import timing

    found = []
    for index, case in enumerate(listed[0]):
        for tree in trees:
            tree.ask("prepare", index)
        for pass_name in (name for name in case["passes"] if name in passes):
            results = [tree.ask("results", pass_name) for tree in trees]
            repeats = [timing.repeats_of(round_ms, tree.ask("milliseconds", pass_name, 1)) for tree in trees]
            times = np.empty((rounds, len(trees)))
            orders = list(timing.rounds_of(range(len(trees)), rounds))
            loaded = 0.0
            while loaded < warm_up_ms:
                loaded += sum(n * tree.ask("milliseconds", pass_name, n) for n, tree in zip(repeats, trees, strict=True))
            for turn in range(rounds):
                for at in orders[turn]:
                    times[turn, at] = trees[at].ask("milliseconds", pass_name, repeats[at])
            for at, tree in enumerate(trees):
                ratios = times[:, 0] / times[:, at]
                rate, unit = tree.ask("rate", pass_name, float(np.median(times[:, at])))
                low, median, high = np.percentile(ratios, [25, 50, 75]).tolist()
                apart = difference(results[at], results[0])
                found.append(Row(case["name"], pass_name, tree.name, rate, unit, median, (low, high), apart))
                print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "trees", nargs="+", metavar="NAME=SRC", help="a name and the folder that holds weft_attn; the first is the base"
    )
    parser.add_argument(
        "--suites",
        default="square,zigzag,packed",
        help="square, zigzag or packed, comma-separated; decode is served from CUDA graphs, which `weft bench` times",
    )
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--passes", default="forward,backward")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--dtype", dest="dtype_name")
    parser.add_argument("--seqlen", type=int, help="tokens in place of the suites' own")
    parser.add_argument("--world", type=int, help="ranks of zigzag")
    parser.add_argument("--rank", help='rank of zigzag, or "all"')
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--round-ms", type=float, default=40.0, help="time a tree gets in a round")
    parser.add_argument("--warm-up-ms", type=float, default=2000.0, help="load before the first round, over all trees together")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no figure to quote")
    options = parser.parse_args()
    if "decode" in options.suites.split(","):
        parser.error("decode is served from CUDA graphs: `weft bench decode` times it")
    passes = options.passes.split(",")
    if not set(passes) <= {"forward", "backward"}:
        parser.error(f"a pass is forward or backward: given {options.passes!r}")
    if options.rounds < 1:
        parser.error(f"rounds are counted: expected >= 1, given {options.rounds}")
    setup = dict(
        device=options.device,
        suites=options.suites.split(","),
        only=options.only,
        quick=options.quick,
        model={name: getattr(options, name) for name in ("heads", "kv_heads", "head_dim", "dtype_name")},
        deterministic=options.deterministic,
        work={name: getattr(options, name) for name in ("seqlen", "world", "rank")},
    )
    trees = []
    for given in options.trees:
        name, _, source = given.partition("=")
        if not source or not (Path(source) / "weft_attn" / "__init__.py").is_file():
            parser.error(f"a tree is NAME=SRC, SRC a folder that holds weft_attn: given {given!r}")
        trees.append(Tree(name, Path(source), setup))
    rows = compare(trees, options.warm_up_ms, options.round_ms, options.rounds, passes)
    for tree in trees:
        tree.end()
    changed = [row for row in rows if not row.difference <= ALLOWED]
    if changed:
        raise SystemExit(f"{len(changed)} of {len(rows)} results differ from the first tree's by more than {ALLOWED:.0e}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(json.loads(sys.argv[2]))
    else:
        main()
