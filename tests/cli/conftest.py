"""Commands run in processes of their own: Triton decides when it is imported whether it interprets kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Weft = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def weft(tmp_path: Path) -> Weft:
    """Run `weft` with arguments in an empty folder; the completed process, with its output."""

    def run(*arguments: object, interpret: bool = False) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if interpret:
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-c", "from weft_attn.cli.main import main; main()", *map(str, arguments)]
        # Wide enough that no line of output is broken.
        environment["COLUMNS"] = "200"
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run
