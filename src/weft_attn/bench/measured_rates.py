"""The rates that a run of `weft bench cp` has measured."""

from __future__ import annotations

from collections.abc import Sequence

from weft_attn.bench.group_ways import BOTH, FORWARD, IDEAL, KERNELS
from weft_attn.bench.rates import KernelRate, LinkRate, Rates
from weft_attn.bench.records import GroupRecord
from weft_attn.bench.simulate import work_by_rank
from weft_attn.bench.workload import Workload
from weft_attn.errors import Unsupported
from weft_attn.plan.cost import BACKWARD_OVER_FORWARD


def rates_of(records: Sequence[GroupRecord]) -> Rates:
    """Rates of kernels on a rank's rows and on a whole batch's, and of collectives by their size.

    Raises:
        Unsupported: no figure that was checked is among the records.
    """
    timed = {
        (r.workload, r.peer, r.pass_name): r for r in records if r.workload and r.milliseconds is not None and not r.failed
    }
    kernels = []
    for (workload, peer, pass_name), record in timed.items():
        both = timed.get((workload, peer, BOTH))
        if workload is not None and both is not None and peer in (KERNELS, IDEAL) and pass_name == FORWARD:
            kernels += _kernel_rates(workload, record, both)
    if not kernels:
        raise Unsupported("rates follow from figures: expected kernels that were timed, given none")
    first = next(iter(timed.values()))
    assert first.workload is not None
    environment = first.environment
    return Rates(
        device=environment.device,
        date=environment.date,
        versions=f"torch {environment.torch}, triton {environment.triton}, weft {environment.revision or environment.weft}",
        head_dim=first.workload.model.head_dim,
        dtype_name=first.workload.model.dtype_name,
        kernels=tuple(kernels),
        links=tuple(
            LinkRate(r.pass_name, r.bytes_received, r.rate, f"{r.peer}, {r.case}")
            for r in records
            if r.bytes_received is not None and r.rate is not None
        ),
    )


def _kernel_rates(workload: Workload, forward: GroupRecord, both: GroupRecord) -> list[KernelRate]:
    """Of a rank's kernels, or of the whole batch on one GPU, whose records hold its time over the ranks."""
    assert forward.milliseconds is not None
    assert both.milliseconds is not None
    tokens, pairs = work_by_rank(workload)
    busiest = int(pairs.argmax())
    rows, visible, times = int(tokens[busiest]), int(pairs[busiest]), 1
    if forward.peer == IDEAL:
        rows, visible, times = int(tokens.sum()), int(pairs.sum()), workload.world_size
    model = workload.model
    flops = 4 * model.head_dim * model.heads * visible
    # The backward is what the two take beyond the forward.
    passes = (
        ("forward", flops, forward.milliseconds),
        ("backward", flops * BACKWARD_OVER_FORWARD, both.milliseconds - forward.milliseconds),
    )
    return [
        KernelRate(name, rows * model.heads, visible / rows, amount / (ms * times) / 1e9, f"{forward.peer}: {forward.case}")
        for name, amount, ms in passes
        if ms > 0 and visible > 0
    ]
