"""`weft demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    more: Annotated[list[Path] | None, typer.Argument(metavar="[PATH]...", help="More paths for --documents.")] = None,
    documents: Annotated[
        list[Path] | None, typer.Option(help="Files or folders to train on. Default: the Python standard library.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a batch. Default: 1,024 on CPUs, 8,192 on GPUs.")] = None,
    steps: Annotated[int, typer.Option(help="Batches to train on.")] = 40,
    ranks: Annotated[
        int | None, typer.Option(help="Processes that share a batch. Default: 4, or fewer with fewer GPUs.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: GPUs where there are several.")] = None,
    picture: Annotated[Path, typer.Option(help="Where to draw losses and plans.")] = Path("out/weft-demo.png"),
) -> None:
    """Train a small Llama on packed documents, in one process and under context parallelism; compare the two.

    On a cluster: torchrun --nnodes N --nproc-per-node G ... -m weft_attn.demo, with these options.
    """
    from weft_attn.demo.launch import RankFailed, run_demo
    from weft_attn.demo.options import Options

    paths = [*(documents or []), *(more or [])]
    try:
        passed = run_demo(Options(paths, tokens, steps, ranks, device, picture))
    except RankFailed as failure:
        typer.echo(f"weft: {failure}", err=True)
        raise typer.Exit(1) from None
    if not passed:
        raise typer.Exit(1)
