"""`weft bench`: measure Weft beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft_attn.bench import cases, peers, report, run, timing


def bench(
    suites: Annotated[list[str] | None, typer.Argument(metavar=f"[{'|'.join(cases.SUITES)}]...", help="all by default")] = None,
    only: Annotated[str, typer.Option(help="only cases with this in their name")] = "",
    seqlen: Annotated[int | None, typer.Option(help="tokens (keys for decode) in place of the suite's own")] = None,
    world: Annotated[int | None, typer.Option(help="ranks of zigzag and plan")] = None,
    rank: Annotated[str | None, typer.Option(help='rank of zigzag, or "all"')] = None,
    head_dim: Annotated[int | None, typer.Option()] = None,
    heads: Annotated[int | None, typer.Option(help="query heads")] = None,
    kv_heads: Annotated[int | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32")] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds in which every variant runs")] = None,
    peers_: Annotated[str | None, typer.Option("--peers", help="only these, comma-separated; Weft always runs")] = None,
    no_peers: Annotated[str | None, typer.Option(help="all but these, comma-separated")] = None,
    out: Annotated[Path | None, typer.Option(help="write the records as JSON")] = None,
    deterministic: Annotated[bool, typer.Option(help="ask every peer for bitwise repeatable gradients")] = False,
    pass_: Annotated[str, typer.Option("--pass", help="forward, backward, or both where the suite has both")] = "both",
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu for the reference")] = "cuda",
    check: Annotated[bool, typer.Option(help="check results before timing them")] = True,
    sustained: Annotated[bool, typer.Option(help="long rounds on a heated card, whose power bounds its clocks")] = False,
    quick: Annotated[bool, typer.Option(help="tiny sizes and few rounds: a smoke run, no figures to quote")] = False,
) -> None:
    """Time attention beside its peers, checked first, interleaved in rounds, on pairs counted from the plan.

    A ratio is speed as a share of Weft's in the same rounds. Exits with 1 when a result is wrong: whoever gave it gets no
    figure.
    """
    request = run.Request(
        suites=suites or cases.SUITES,
        model=cases.chosen_model(quick=quick, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype_name=dtype),
        sizes=cases.QUICK if quick else cases.HOUSE,
        peers=peers.chosen_peers(cases.comma_separated(peers_), cases.comma_separated(no_peers) or ()),
        device_name=device,
        pace=timing.chosen_pace(quick=quick, rounds=rounds, sustained=sustained),
        only=only,
        check=check,
        seqlen=seqlen,
        world=world,
        rank=rank,
        passes=cases.asked_passes(pass_),
        deterministic=deterministic,
    )
    raise typer.Exit(report.show(lambda notify: run.run_suites(request, notify), out))
