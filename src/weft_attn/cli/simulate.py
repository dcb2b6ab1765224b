"""`weft simulate`: what a batch costs on any number of ranks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weft_attn.bench import cases, group_report, rates, workload
from weft_attn.bench import simulate as simulation
from weft_attn.bench.records import GroupRecord, read_json
from weft_attn.outputs import require_writable


def simulate(
    world: Annotated[str, typer.Option(help="ranks: 8..1024 doubles from 8 to 1024; or 2,4,8")] = "8..1024",
    tokens: Annotated[int | None, typer.Option(help="tokens of the whole batch")] = None,
    documents: Annotated[
        str | None,
        typer.Option(help="how many, with --tokens; or lengths: 8192,4096; lognormal:N[:SEED]; equal:L; a file of lengths"),
    ] = None,
    per_gpu: Annotated[bool, typer.Option(help="every document is that many times as long as there are ranks")] = False,
    layout: Annotated[str, typer.Option(help="zigzag, contiguous or striped")] = "zigzag",
    max_gather_bytes: Annotated[int | None, typer.Option(help="cap of gathered keys, values and gradients (4 GiB)")] = None,
    head_dim: Annotated[int | None, typer.Option()] = None,
    heads: Annotated[int | None, typer.Option(help="query heads")] = None,
    kv_heads: Annotated[int | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32")] = None,
    link_gbps: Annotated[float | None, typer.Option(help="GB/s per GPU and direction between nodes of 8 GPUs")] = None,
    rates_: Annotated[Path | None, typer.Option("--rates", help="of `weft bench cp --write-rates`; or the package's")] = None,
    check: Annotated[Path | None, typer.Option(help="records of `weft bench cp --out` to compare predictions with")] = None,
    out: Annotated[Path | None, typer.Option(help="write the predictions as JSON")] = None,
) -> None:
    """Predict work, bytes, memory and time of causal attention under context parallelism, from the layout and measured rates.

    Times are of one attention layer. Nothing is made up: what has no measured or given rate has no time.
    """
    if out is not None:
        require_writable(out)
    hardware = simulation.Hardware(rates.packaged_rates() if rates_ is None else rates.read_rates(rates_), link_gbps)
    console = group_report.wide_console()
    if check is not None:
        checked = simulation.check_records(read_json(check, GroupRecord), hardware)
        console.print(group_report.render_checked(checked, hardware.rates))
    if documents is None and tokens is None:
        if check is None:
            raise typer.BadParameter("--tokens, --documents or --check says what to predict")
        return
    lengths = workload.document_lengths(str(tokens) if documents is None else documents, tokens)
    model = cases.chosen_model(quick=False, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype_name=dtype)
    predictions = [
        simulation.predict(
            workload.Workload(
                tuple(length * (ranks if per_gpu else 1) for length in lengths), ranks, model, layout, max_gather_bytes
            ),
            hardware,
        )
        for ranks in simulation.world_sizes(world)
    ]
    console.print(group_report.render_predictions(predictions, hardware))
    if out is not None:
        out.write_text(json.dumps([asdict(one) for one in predictions], indent=2) + "\n", encoding="utf-8")
