"""`weft ablate`: what each technique of the kernels is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft_attn.bench import ablation, cases, report, timing


def ablate(
    techniques: Annotated[str | None, typer.Option(help="only these, comma-separated")] = None,
    seqlen: Annotated[int | None, typer.Option(help="tokens (keys for decoding) in place of the house's")] = None,
    head_dim: Annotated[int | None, typer.Option()] = None,
    heads: Annotated[int | None, typer.Option(help="query heads")] = None,
    kv_heads: Annotated[int | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32")] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds in which every setting runs")] = None,
    out: Annotated[Path | None, typer.Option(help="write the records as JSON")] = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:N")] = "cuda",
    quick: Annotated[bool, typer.Option(help="tiny sizes and few rounds: a smoke run, no figures to quote")] = False,
) -> None:
    """Switch one field of the chosen launch config at a time, in the same rounds; speed as a share of the chosen config's.

    Exits with 1 when a setting gives a wrong result.
    """
    request = ablation.Request(
        techniques=ablation.chosen_techniques(cases.comma_separated(techniques)),
        model=cases.chosen_model(quick=quick, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype_name=dtype),
        sizes=cases.QUICK if quick else cases.HOUSE,
        device_name=device,
        pace=timing.chosen_pace(quick=quick, rounds=rounds),
        seqlen=seqlen,
    )
    raise typer.Exit(report.show(lambda notify: ablation.run_ablation(request, notify), out))
