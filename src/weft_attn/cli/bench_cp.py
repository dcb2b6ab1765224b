"""`weft bench cp`: measure context parallelism on the ranks of a group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer

from weft_attn.bench import cases, context_parallel, group_report, measured_rates, rates, report, timing
from weft_attn.bench.records import GroupRecord
from weft_attn.distributed.process_group import process_group
from weft_attn.errors import require
from weft_attn.outputs import require_writable


def bench_cp(
    layout: Annotated[str, typer.Option(help="zigzag, contiguous or striped")] = "zigzag",
    max_gather_bytes: Annotated[int | None, typer.Option(help="cap of gathered keys, values and gradients (4 GiB)")] = None,
    groups: Annotated[
        str | None,
        typer.Option(help="also in other groups of KV heads, comma-separated: 4 (equal ones), 1+6+1 (a backward's launches)"),
    ] = None,
    work: Annotated[
        str | None,
        typer.Option(
            help='only the "packings" of 8K tokens a GPU, only the "long" document, or only the "links": collectives alone'
        ),
    ] = None,
    head_dim: Annotated[int | None, typer.Option()] = None,
    heads: Annotated[int | None, typer.Option(help="query heads")] = None,
    kv_heads: Annotated[int | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32")] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds in which every variant runs")] = None,
    peers: Annotated[str | None, typer.Option(help="only these, comma-separated; Weft always runs")] = None,
    out: Annotated[Path | None, typer.Option(help="write the records as JSON")] = None,
    write_rates: Annotated[Path | None, typer.Option(help="write measured rates for `weft simulate --rates`")] = None,
    device: Annotated[str, typer.Option(help="cuda: each rank its own GPU, with NCCL; cpu: gloo")] = "cuda",
    copy_engines: Annotated[
        bool,
        typer.Option(
            help="gather into symmetric memory, in a group that asks NCCL for no multiprocessors, on GPUs; without the collectives alone"
        ),
    ] = False,
    check: Annotated[bool, typer.Option(help="check results before timing them")] = True,
    sustained: Annotated[bool, typer.Option(help="long rounds on a heated card, whose power bounds its clocks")] = False,
    quick: Annotated[bool, typer.Option(help="tiny sizes and few rounds: a smoke run, no figures to quote")] = False,
) -> None:
    """Time context parallelism, its kernels and its communication alone, and its peers: packed documents on all ranks.

    Start it as `torchrun --nproc-per-node N -m weft_attn.cli.main bench cp`; rank 0 prints. Times are those of the slowest rank;
    the ideal is one GPU's time for the whole batch, in the same rounds, over the ranks: the GPUs' mean, and the slowest GPU's, which
    is what a group can reach that cuts work evenly. Exits with 1 when a result is wrong on
    any rank.
    """
    request = context_parallel.Request(
        model=cases.chosen_model(quick=quick, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype_name=dtype),
        peers=context_parallel.chosen_peers(cases.comma_separated(peers)),
        device_name=device,
        pace=timing.chosen_pace(quick=quick, rounds=rounds, sustained=sustained),
        layout=layout,
        max_gather_bytes=max_gather_bytes,
        copy_engines=copy_engines,
        groupings=context_parallel.chosen_groupings(cases.comma_separated(groups)),
        work=context_parallel.chosen_work(work),
        check=check,
        quick=quick,
    )
    require(
        not copy_engines or device == "cuda",
        "copy engines are GPUs'",
        expected="--copy-engines with --device cuda",
        given=f"--device {device}",
    )
    require(
        not copy_engines or (work != context_parallel.LINKS and write_rates is None),
        "collectives alone, and rates, are of ordinary memory",
        expected="--copy-engines without --work links and --write-rates",
        given=f"--work {work}, --write-rates {write_rates}",
    )
    require(
        write_rates is None or work is None,
        "rates are those of kernels and of collectives",
        expected="--write-rates without --work",
        given=f"--work {work}",
    )
    records: list[GroupRecord] = []
    own_device = context_parallel.rank_device(device)
    if os.environ["RANK"] == "0":
        # The rank that writes, before it holds up the others.
        for path in (out, write_rates):
            if path is not None:
                require_writable(path)
    with process_group(own_device, copy_engines=copy_engines):

        def run(notify: timing.Notify) -> context_parallel.Batches:
            for batch in context_parallel.run_group(request, own_device, notify):
                records.extend(batch)
                yield batch

        if dist.get_rank() == 0:
            code = report.show(run, out, group_report.group_figures)
            if write_rates is not None:
                rates.write_rates(measured_rates.rates_of(records), write_rates)
        else:
            code = 1 if [line for batch in run(timing.silent) for line in report.failures(batch)] else 0
    raise typer.Exit(code)
