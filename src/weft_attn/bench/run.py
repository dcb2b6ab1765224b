"""Running a case: every peer checked, then those that are right timed side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from weft_attn.bench import timing
from weft_attn.bench.cases import (
    SUITES,
    Case,
    Model,
    Sizes,
    Tensors,
    chosen_device,
    chosen_world,
    log_normal_lengths,
    make_tensors,
    suite_cases,
)
from weft_attn.bench.one_kernel import describe_choice
from weft_attn.bench.oracle import Oracle, build_oracle, wrong_tensors
from weft_attn.bench.peers import WEFT, Peer, Prepared
from weft_attn.bench.records import ABSENT, OK, RED, UNCHECKED, Environment, Record, describe_case, environment_of, first_line
from weft_attn.bench.timing import Clock, HandoverClock, HostClock, Notify, Pace, Samples, clock_of, silent
from weft_attn.errors import require
from weft_attn.plan.build import concat_lengths
from weft_attn.plan.slices import Plan
from weft_attn.plan.stream import Tiling, host_stream
from weft_attn.testing.compare import Budget

PLAN_MEAN_LENGTH = 1725
BUILD_GOAL_MS = 5.0
# The cuts of the kernels' usual tiles.
CUTS = {
    "cut forward": Tiling(128, 128),
    "cut backward_dq": Tiling(128, 64),
    "cut backward_dkdv": Tiling(128, 64, transposed=True),
}


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        suites: names of SUITES.
        peers: who is measured; Weft among them.
        device_name: where; the "plan" suite needs no device.
        only: cases with this in their name. Empty: all.
        check: whether results are checked before they are timed.
        seqlen, world, rank, passes, deterministic: as in `suite_cases`.
    """

    suites: Sequence[str]
    model: Model
    sizes: Sizes
    peers: Sequence[Peer]
    device_name: str
    pace: Pace
    only: str = ""
    check: bool = True
    seqlen: int | None = None
    world: int | None = None
    rank: str | None = None
    passes: Sequence[str] | None = None
    deterministic: bool = False


def run_suites(request: Request, notify: Notify = silent) -> Iterator[list[Record]]:
    """The records of one case after the other. What is asked for is checked before anything runs."""
    for suite in request.suites:
        require(suite in SUITES, "the suite is known", expected=f"one of {SUITES}", given=repr(suite))
    world = chosen_world(request.world, request.sizes)
    cases = {
        suite: suite_cases(
            suite,
            request.sizes,
            request.model,
            seqlen=request.seqlen,
            world=world,
            rank=request.rank,
            passes=request.passes,
            deterministic=request.deterministic,
        )
        for suite in request.suites
        if suite != "plan"
    }
    plans = plan_cases(request.sizes, world) if "plan" in request.suites else {}
    names = [*(case.name for listed in cases.values() for case in listed), *plans]
    cases = {suite: [case for case in listed if request.only in case.name] for suite, listed in cases.items()}
    plans = {name: build for name, build in plans.items() if request.only in name}
    require(
        bool(plans) or any(cases.values()),
        "a case has this in its name",
        expected=f"a part of one of {names}",
        given=repr(request.only),
    )
    device = chosen_device(request.device_name) if any(cases.values()) else torch.device("cpu")
    environment = environment_of(device)
    for suite in request.suites:
        if suite == "plan" and plans:
            notify("building plans")
            yield run_plan_suite(plans, request.pace, environment)
        for case in cases.get(suite, ()):
            yield run_case(case, request.peers, device, request.pace, environment, check=request.check, notify=notify)


def run_case(
    case: Case,
    peers: Sequence[Peer],
    device: torch.device,
    pace: Pace,
    environment: Environment,
    *,
    check: bool = True,
    notify: Notify = silent,
    clock: Clock | None = None,
) -> list[Record]:
    """Records of every peer and pass of a case: figures, wrong results, absences.

    A peer with a wrong result in any pass gets no figure. What goes wrong inside another library makes that peer absent; what
    goes wrong inside Weft is raised.
    """
    template = partial(Record, environment=environment, **describe_case(case))
    tensors = make_tensors(case, device)
    notify(f"{case.name}: exact answer")
    oracle = build_oracle(case, tensors) if check else None

    records: list[Record] = []
    ready: dict[str, Prepared] = {}
    budgets: dict[str, dict[str, dict[str, Budget]]] = {}
    for peer in peers:
        notify(f"{case.name}: {peer.name}")
        absent = partial(template, peer=peer.name, status=ABSENT)
        reason = peer.supports(case, device)
        if reason is None:
            try:
                prepared = peer.prepare(case, tensors)
                found = _first_run(case, prepared, oracle)
            except Exception as error:
                if peer is WEFT:
                    raise
                reason = f"failed with {first_line(error)}"
        if reason is not None:
            records += [absent(pass_name=name, note=reason) for name in case.passes]
            continue
        wrong = wrong_tensors({name: d for of_pass in found.values() for name, d in of_pass.items()})
        if wrong:
            red = partial(template, peer=peer.name, status=RED, note=wrong)
            records += [red(pass_name=name, budgets=found[name]) for name in case.passes]
            continue
        ready[peer.name], budgets[peer.name] = prepared, found

    status = OK if check else UNCHECKED
    for pass_name in case.passes:
        notify(f"{case.name}: timing {pass_name}")
        calls = {name: getattr(prepared, pass_name) for name, prepared in ready.items()}
        if case.suite == "decode" and device.type == "cuda":
            for name, prepared in ready.items():
                calls[name], how = _without_host_time(calls[name], len(tensors.kv))
                ready[name] = replace(prepared, note="; ".join(part for part in (prepared.note, how) if part))
        samples = timing.interleave(calls, clock or _clock_of(case, device), pace)
        for name, one in samples.items():
            record = template(
                peer=name, pass_name=pass_name, status=status, note=ready[name].note, budgets=budgets[name][pass_name]
            )
            records.append(_with_figure(record, case, tensors, one, samples.get(WEFT.name)))
    return sorted(records, key=lambda record: case.passes.index(record.pass_name))


def _clock_of(case: Case, device: torch.device) -> Clock:
    """On a CPU the host does the work too, and all of a call is timed."""
    return HandoverClock() if case.suite == "host" and device.type == "cuda" else clock_of(device)


def _without_host_time(call: timing.Call, copies: int) -> tuple[timing.Call, str]:
    """Decoding is served from CUDA graphs: the replayed call where it can be captured, and in words which of the two it is."""
    try:
        return timing.replayed(call, copies), "replayed as a CUDA graph"
    except RuntimeError as error:
        torch.cuda.synchronize()
        return call, f"launched by the host, whose time is included: not captured ({first_line(error)})"


def _first_run(case: Case, prepared: Prepared, oracle: Oracle | None) -> dict[str, dict[str, Budget]]:
    """Run every pass once, which compiles what is compiled on first use; budgets by pass and tensor."""
    found: dict[str, dict[str, Budget]] = {}
    for pass_name in case.passes:
        if oracle is None:
            getattr(prepared, pass_name)(0)
            found[pass_name] = {}
        elif pass_name == "forward":
            found[pass_name] = oracle.check_forward(prepared.packed_forward(), prepared.lse() if prepared.lse else None)
        else:
            (dq,), dk, dv = prepared.packed_backward(case.plan.total_k)
            found[pass_name] = oracle.check_gradients({"dq": dq, "dk": dk, "dv": dv})
    return found


def _with_figure(record: Record, case: Case, tensors: Tensors, samples: Samples, of_weft: Samples | None) -> Record:
    return replace(
        record,
        milliseconds=samples.median,
        quartiles=samples.quartiles,
        rate=case.rate(record.pass_name, samples.median),
        unit=case.unit,
        ratio_to_weft=None if of_weft is None else samples.speed_over(of_weft),
        config=describe_choice(record.pass_name, case, tensors) if record.peer == WEFT.name else "",
    )


def plan_cases(sizes: Sizes, world: int) -> dict[str, Callable[[], Plan]]:
    """The plans of many documents that the "plan" suite builds, by the name of the case."""
    documents = sizes.plan_documents
    cu_seqlens = concat_lengths(log_normal_lengths(documents, documents * PLAN_MEAN_LENGTH))
    return {
        f"{documents} documents, zigzag, W={world}": lambda: Plan.zigzag(cu_seqlens, rank=world // 2, world_size=world),
        f"{documents} documents, packed": lambda: Plan.from_cu_seqlens(cu_seqlens, cu_seqlens, causal=True),
    }


def run_plan_suite(plans: Mapping[str, Callable[[], Plan]], pace: Pace, environment: Environment) -> list[Record]:
    """Host time of building plans, and of cutting them into a kernel's work. No device."""
    records = []
    for name, build in plans.items():
        plan = build()
        calls: dict[str, timing.Call] = {"build": lambda _turn, build=build: build()}  # type: ignore[misc]
        for cut, tiling in CUTS.items():
            calls[cut] = lambda _turn, plan=plan, tiling=tiling: host_stream(plan, tiling)  # type: ignore[misc]
        for pass_name, samples in timing.interleave(calls, HostClock(), pace).items():
            records.append(
                Record(
                    suite="plan",
                    case=name,
                    peer=WEFT.name,
                    pass_name=pass_name,
                    status=OK,
                    environment=environment,
                    note=f"goal: under {BUILD_GOAL_MS:.0f} ms" if pass_name == "build" else "",
                    milliseconds=samples.median,
                    quartiles=samples.quartiles,
                    pairs=plan.pairs,
                )
            )
    return records
