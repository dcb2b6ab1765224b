"""What is installed: the wheel's files, and a command line that starts where its extra is missing and fails in words."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import weft_attn
from weft_attn.cli.main import COMMANDS, main
from weft_attn.errors import InvalidInput

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "weft_attn"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling", reason="the build backend is of the test extra")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    assert path.name == f"weft_attn-{weft_attn.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package_its_tables_and_its_type_marker(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if not name.startswith(f"weft_attn-{weft_attn.__version__}.dist-info/")}
    sources = {path for suffix in ("*.py", "*.toml", "*.json") for path in PACKAGE.rglob(suffix)} | {PACKAGE / "py.typed"}
    assert packed == {path.relative_to(PACKAGE.parent).as_posix() for path in sources}
    assert any(name.startswith("weft_attn/launch/tables/") for name in packed)


def test_the_wheel_names_its_licence_command_and_dependencies(wheel: zipfile.ZipFile) -> None:
    info = f"weft_attn-{weft_attn.__version__}.dist-info"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "weft = weft_attn.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.11", "Provides-Extra: cli", "Provides-Extra: draw"):
        assert line in metadata


def run_and_list_modules(arguments: list[str], prefixes: tuple[str, ...]) -> tuple[str, list[str]]:
    """What `weft` prints in a fresh process, and the modules with these prefixes that it has imported in the end."""
    code = (
        "import sys\n"
        "from weft_attn.cli.main import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print(*sorted(name for name in sys.modules if name.startswith({prefixes})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *printed, modules = done.stdout.split("\n")[:-1]
    return "\n".join(printed), modules.split()


def test_help_names_every_command_without_importing_triton_or_matplotlib() -> None:
    printed, modules = run_and_list_modules(["--help"], ("triton", "matplotlib"))
    assert all(f" {name} " in printed for name in COMMANDS)
    assert modules == []


def test_only_the_command_that_was_asked_for_is_imported() -> None:
    _, modules = run_and_list_modules(["doctor", "--help"], ("weft_attn.cli.",))
    assert modules == ["weft_attn.cli.doctor", "weft_attn.cli.main"]


def test_without_the_cli_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "typer" else honest(name, *rest))
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "weft: the command line needs typer: pip install 'weft-attn[cli]'\n"


def test_an_error_of_the_library_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**options: object) -> None:
        raise InvalidInput("rows are counted: expected >= 0, given -1")

    monkeypatch.setattr("weft_attn.launch.explain.inspect_machine", refuse)
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "weft: rows are counted: expected >= 0, given -1\n"


def test_an_unknown_command_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["weave"])
    assert end.value.code == 2
    assert "weave" in capsys.readouterr().err
