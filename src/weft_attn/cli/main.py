"""The `weft` command."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weft_attn.errors import WeftError

if TYPE_CHECKING:
    import typer

# Each is a function of its name in the module of its name, with "_" for the space of a command of two words.
COMMANDS = ("demo", "check", "doctor", "compile", "bench", "bench cp", "simulate", "tune", "ablate")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `weft` with `arguments`, the process's own by default. Exit code 2: bad input; 1: what was asked for failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"weft: the command line needs {' and '.join(missing)}: pip install 'weft-attn[cli]'", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)
    # Two words that name a command are one argument.
    if " ".join(given[:2]) in COMMANDS:
        given[:2] = [" ".join(given[:2])]
    # Import the command that was asked for; all of them only to list them.
    asked = [name for name in given[:1] if name in COMMANDS]
    try:
        build_app(asked or COMMANDS)(args=given, prog_name="weft")
    except WeftError as error:
        print(f"weft: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


def build_app(names: Sequence[str]) -> typer.Typer:
    """The application with some of its commands."""
    import typer

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def about() -> None:
        """Exact attention for many groups of queries over one stream of keys."""

    for name in names:
        function = name.replace(" ", "_")
        app.command(name)(getattr(importlib.import_module(f"weft_attn.cli.{function}"), function))
    return app


if __name__ == "__main__":
    # `torchrun ... -m weft_attn.cli.main` starts ranks.
    main()
