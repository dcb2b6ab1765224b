"""One of Weft's kernels on one case under many launch configs: what tuning and ablation measure.

The backward is called through its operator, which runs one of its kernels at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

import torch

from weft_attn import ops
from weft_attn.bench.cases import TERABYTES, Case, Tensors
from weft_attn.bench.oracle import Oracle, build_oracle, wrong_tensors
from weft_attn.bench.records import ABSENT, OK, RED, Environment, Record, describe_case, first_line
from weft_attn.bench.timing import Call, Clock, Notify, Pace, clock_of, interleave, silent
from weft_attn.errors import Unsupported
from weft_attn.launch.config import LaunchConfig
from weft_attn.launch.device import device_of
from weft_attn.launch.select import DKDV_KERNELS, DQ_KERNELS, Choice, override, select, select_backward, select_first
from weft_attn.testing.compare import Budget

FORWARD, DKDV, DQ = "forward", "backward_dkdv", "backward_dq"
# Products that a kernel computes for each visible pair; the forward's two are one `forward_flops`.
PRODUCTS = {FORWARD: 2, DKDV: 4, DQ: 3}


def kernels_of(pass_name: str) -> tuple[str, ...]:
    """The stream kernels of a pass."""
    return (FORWARD,) if pass_name == "forward" else (DKDV, DQ)


def needs_kernels(device: torch.device) -> None:
    """Raise `Unsupported` where attention runs the reference: launch configs change nothing there."""
    if ops.runs_reference(device):
        raise Unsupported("launch configs are of kernels: expected a GPU, given a device that runs the reference")


def base_choice(kernel: str, case: Case, tensors: Tensors) -> Choice:
    """What selection gives this portable kernel for the case, overrides included, whether or not another runs in its place."""
    problem = ops.problem_of(case.plan, tensors.q, tensors.k, tensors.v)
    if kernel == FORWARD:
        running = running_choice(kernel, case, tensors)
        if running.config.kernel == FORWARD:
            return running
    return select(kernel, problem, device_of(tensors.device))


def running_choice(kernel: str, case: Case, tensors: Tensors) -> Choice:
    """What runs for the work of this portable kernel: itself, or the one that is preferred to it."""
    if kernel == FORWARD:
        return ops.prepare_forward(case.plan, tensors.q, tensors.k, tensors.v).cut.choice
    problem = ops.problem_of(case.plan, tensors.q, tensors.k, tensors.v)
    return select_first(DKDV_KERNELS if kernel == DKDV else DQ_KERNELS, problem, device_of(tensors.device))


def describe_choice(pass_name: str, case: Case, tensors: Tensors) -> str:
    """The configs of a pass and where they were chosen, for a record."""
    if ops.runs_reference(tensors.device):
        return "reference"
    choices: tuple[Choice, ...]
    if pass_name == "forward":
        choices = (running_choice(FORWARD, case, tensors),)
    else:
        # The result of a forward lies in memory like q, and so does its gradient.
        problem = ops.backward_problem(case.plan, tensors.q, tensors.k, tensors.v, tensors.q, tensors.dout)
        deterministic = ops.is_deterministic(case.deterministic)
        choices = select_backward(problem, device_of(tensors.device), deterministic=deterministic)
    return "; ".join(f"{describe_config(c.config)} [{c.source}]" for c in choices)


def describe_config(config: LaunchConfig) -> str:
    """forward(block_q=128, ...), the fields that differ from their defaults."""
    shown = [f"{f.name}={getattr(config, f.name)!r}" for f in fields(config) if getattr(config, f.name) != f.default]
    return f"{config.kernel}({', '.join(shown)})"


def kernel_rate(kernel: str, case: Case, milliseconds: float) -> float:
    """The case's own rate; TFLOP/s count the kernel's own products over visible pairs."""
    forward = case.rate("forward", milliseconds)
    return forward if case.unit == TERABYTES else forward * PRODUCTS[kernel] / PRODUCTS[FORWARD]


def with_config(config: LaunchConfig, call: Call) -> Call:
    """The call, under one config."""

    def run(turn: int) -> object:
        with override(config):
            return call(turn)

    return run


class KernelRuns:
    """A case's forward, and each backward kernel on the result of it.

    The backward's operator computes the row statistics too: a few per cent, the same for every portable config.
    """

    def __init__(self, case: Case, tensors: Tensors) -> None:
        self.case, self.tensors = case, tensors
        self._mask = (case.plan.table, 1, False, None, None)
        self._scalars = (tensors.q.shape[2] ** -0.5, 0.0, case.deterministic)
        self._out, self._lse = self._forward(0)

    def splits_keys(self) -> bool:
        """Whether the forward, as configured now, splits its keys."""
        t = self.tensors
        return ops.prepare_forward(self.case.plan, t.q, t.k, t.v).stream.slots > 0

    def call(self, kernel: str) -> Call:
        """Runs one kernel; takes the call's number."""
        if kernel == FORWARD:
            return self._forward
        return lambda _turn: self._backward(needs_dq=kernel == DQ, needs_dkv=kernel == DKDV)

    def check(self, kernel: str, oracle: Oracle) -> dict[str, Budget]:
        """The kernel's results against the exact ones, under the configs in force."""
        if kernel == FORWARD:
            return oracle.check_forward(*self._forward(0))
        dq, dk, dv = self._backward(needs_dq=kernel == DQ, needs_dkv=kernel == DKDV)
        return oracle.check_gradients({"dq": dq} if kernel == DQ else {"dk": dk, "dv": dv})

    def _forward(self, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            out, lse = torch.ops.weft.attention_forward(
                self.tensors.q, *self.tensors.turn(turn), None, *self._mask, *self._scalars
            )
        return out, lse

    def _backward(self, *, needs_dq: bool, needs_dkv: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        t = self.tensors
        dq, dk, dv, _ = torch.ops.weft.attention_backward(
            t.dout, None, t.q, t.k, t.v, None, self._out, self._lse, *self._mask, *self._scalars, needs_dq, needs_dkv, None
        )
        return dq, dk, dv


@dataclass(frozen=True)
class Check:
    """A case on which every config is checked before any is timed, and its exact answer."""

    runs: KernelRuns
    oracle: Oracle

    @classmethod
    def on(cls, runs: KernelRuns) -> Check:
        return cls(runs, build_oracle(runs.case, runs.tensors))


def measure_configs(
    runs: KernelRuns,
    kernel: str,
    configs: Mapping[str, LaunchConfig],
    check: Check,
    pace: Pace,
    environment: Environment,
    *,
    notify: Notify = silent,
    clock: Clock | None = None,
) -> list[Record]:
    """Check each config, then time in the same rounds those that are right.

    Args:
        runs: the case that is timed.
        configs: by label, which becomes the record's `peer`; ratios are to the first.
        check: where results are checked.

    Returns:
        one record for each config, in the order given; ABSENT with the reason where the device cannot run it.
    """
    template = partial(Record, environment=environment, pass_name=kernel, **describe_case(runs.case))
    problem = ops.problem_of(runs.case.plan, runs.tensors.q, runs.tensors.k, runs.tensors.v)
    device = device_of(runs.tensors.device)
    records: dict[str, Record] = {}
    calls: dict[str, Call] = {}
    for label, config in configs.items():
        notify(f"{runs.case.name}, {kernel}: checking {label}")
        record = template(peer=label, status=OK, config=describe_config(config))
        with override(config):
            try:
                select(kernel, problem, device)
                budgets = check.runs.check(kernel, check.oracle)
            except Exception as error:  # noqa: BLE001 (a compiler that gives up on one config must not end the search)
                records[label] = replace(record, status=ABSENT, note=first_line(error))
                continue
        record = replace(record, budgets=budgets)
        wrong = wrong_tensors(budgets)
        if wrong:
            record = replace(record, status=RED, note=wrong)
        else:
            calls[label] = with_config(config, runs.call(kernel))
        records[label] = record
    notify(f"{runs.case.name}, {kernel}: timing {len(calls)} configs")
    samples = interleave(calls, clock or clock_of(runs.tensors.device), pace)
    base = samples.get(next(iter(configs)))
    for label, one in samples.items():
        records[label] = replace(
            records[label],
            milliseconds=one.median,
            quartiles=one.quartiles,
            rate=kernel_rate(kernel, runs.case, one.median),
            unit=runs.case.unit,
            ratio_to_weft=None if base is None else one.speed_over(base),
        )
    return list(records.values())
