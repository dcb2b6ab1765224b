"""`weft tune`: search launch configs on this machine's GPU and write them as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft_attn.bench import cases, report, timing
from weft_attn.bench import tune as tuning


def tune(
    kernel: Annotated[list[str] | None, typer.Option(help="forward, backward_dkdv or backward_dq; all by default")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="one search for each")] = None,
    heads: Annotated[int | None, typer.Option(help="query heads")] = None,
    kv_heads: Annotated[int | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32")] = None,
    few_rows: Annotated[int, typer.Option(help="rows of a packed tile, for split keys; 0: full tiles")] = 0,
    seqlen: Annotated[int | None, typer.Option(help="tokens of the timed causal square (keys, with few rows)")] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds of the finalists")] = None,
    write: Annotated[Path | None, typer.Option(help="TOML table to write, or to bring up to date")] = None,
    out: Annotated[Path | None, typer.Option(help="write the records as JSON")] = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:N")] = "cuda",
    quick: Annotated[bool, typer.Option(help="tiny sizes and few rounds: a smoke run, no figures to quote")] = False,
) -> None:
    """Check and time every launch config of a grid that the device can hold, then the fastest of them again.

    A ratio is speed over the config that selection gives now. Exits with 1 when a config gives a wrong result; it is never
    written.
    """
    request = tuning.Request(
        searches=tuning.searches(
            kernel,
            cases.chosen_model(quick=quick, heads=heads, kv_heads=kv_heads, head_dim=None, dtype_name=dtype),
            head_dim,
            few_rows=few_rows,
            seqlen=seqlen,
            sizes=cases.QUICK if quick else cases.HOUSE,
        ),
        device_name=device,
        pace=timing.chosen_pace(quick=quick, rounds=rounds),
        write=write,
    )
    raise typer.Exit(report.show(lambda notify: tuning.run_searches(request, notify), out))
