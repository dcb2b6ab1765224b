"""`weft check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(
    more: Annotated[list[Path] | None, typer.Argument(metavar="[PATH]...", help="More paths for --documents.")] = None,
    documents: Annotated[
        list[Path] | None, typer.Option(help="Files or folders to pack. Default: the Python standard library.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Most tokens to pack. Default: 1,536 on a CPU, 32,768 on a GPU.")] = None,
    ranks: Annotated[int, typer.Option(help="Context-parallel ranks.")] = 4,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if there is one.")] = None,
    picture: Annotated[Path, typer.Option(help="Where to draw the ranks' plans.")] = Path("out/weft-check.png"),
) -> None:
    """Cut packed documents over zigzag ranks, run the kernels, compare with one device, draw the plan."""
    from rich.console import Console

    from weft_attn.demo.attention_report import Options, run_check

    paths = [*(documents or []), *(more or [])]
    if not run_check(Options(paths, tokens, ranks, device, picture), Console()):
        raise typer.Exit(1)
