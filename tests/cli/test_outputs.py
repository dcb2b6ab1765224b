"""A command that could not keep its results refuses before its work, in one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from weft_attn.bench import run, tune
from weft_attn.bench import simulate as simulation
from weft_attn.cli import bench_cp
from weft_attn.cli.main import main
from weft_attn.demo import attention_report, launch
from weft_attn.errors import InvalidInput
from weft_attn.launch.device import INTERPRETER
from weft_attn.outputs import require_writable

TINY = ("--device", "cpu", "--quick")
# Commands, their options that name a file to write, and whether they make its folder.
WRITERS = {
    "bench": (("bench", "square", *TINY, "--out"), False),
    "bench cp": (("bench", "cp", *TINY, "--out"), False),
    "bench cp, rates": (("bench", "cp", *TINY, "--write-rates"), False),
    "simulate": (("simulate", "--tokens", "64", "--world", "2", "--out"), False),
    "ablate": (("ablate", *TINY, "--out"), False),
    "tune": (("tune", *TINY, "--out"), False),
    "tune, table": (("tune", *TINY, "--write"), False),
    "demo": (("demo", "--device", "cpu", "--steps", "1", "--picture"), True),
    "check": (("check", "--device", "cpu", "--picture"), True),
}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command fails the test where its work begins. This process counts as the first rank of a group."""
    begun = lambda *args, **kwargs: pytest.fail("the work has begun")  # noqa: E731
    for owner, name in (
        (run, "run_case"),
        (simulation, "predict"),
        (bench_cp, "process_group"),
        (tune, "tune"),
        (launch, "start_ranks"),
        (attention_report, "project"),
    ):
        monkeypatch.setattr(owner, name, begun)
    monkeypatch.setattr(tune, "needs_kernels", lambda device: None)
    monkeypatch.setattr(attention_report, "choose_device", lambda name: torch.device("cpu"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1), said
    return said


@pytest.mark.parametrize(("command", "makes_folders"), WRITERS.values(), ids=WRITERS)
def test_a_place_that_takes_no_file_is_refused_before_the_work(
    command: tuple[str, ...], makes_folders: bool, no_work: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    assert str(tmp_path / "folder.png") in refusal(capsys, *command, tmp_path / "folder.png")
    assert str(tmp_path / "file") in refusal(capsys, *command, tmp_path / "file" / "out.png")
    if Path("/proc/self").is_dir():
        # Not even root may make a file there.
        assert "/proc" in refusal(capsys, *command, "/proc/out.png")
    if not makes_folders:
        assert str(tmp_path / "missing") in refusal(capsys, *command, tmp_path / "missing" / "out.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_only_the_rank_that_writes_needs_the_place(no_work: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(pytest.fail.Exception, match="the work has begun"):
        main(["bench", "cp", *TINY, "--out", "/proc/out.json"])


@pytest.mark.parametrize("text", ["not = [toml", "", '[match]\ndevice = "x"\n', "[match]\narch = 'gfx942'\n"])
def test_a_table_that_cannot_be_brought_up_to_date_is_refused_before_the_search(
    text: str, no_work: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.toml"
    path.write_text(text)
    monkeypatch.setattr(tune, "device_of", lambda device: INTERPRETER)
    assert "table" in refusal(capsys, "tune", *TINY, "--write", path)
    assert path.read_text() == text


# ---- the rule -------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_keeps_its_content_and_its_time(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("kept")
    os.utime(path, (1, 1))
    require_writable(path)
    assert (path.read_text(), path.stat().st_mtime) == ("kept", 1)


def test_a_file_or_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    require_writable(tmp_path / "out.json")
    require_writable(tmp_path / "new" / "folder" / "out.png", makes_folders=True)
    with pytest.raises(InvalidInput, match="an existing folder"):
        require_writable(tmp_path / "new" / "out.json")
    assert not list(tmp_path.iterdir())


def test_a_link_leads_to_where_the_result_would_go(tmp_path: Path) -> None:
    (tmp_path / "good").symlink_to(tmp_path / "out.json")
    (tmp_path / "bad").symlink_to(tmp_path / "missing" / "out.json")
    require_writable(tmp_path / "good")
    with pytest.raises(InvalidInput, match="missing"):
        require_writable(tmp_path / "bad")


def test_a_device_or_a_pipe_may_take_a_result(tmp_path: Path) -> None:
    require_writable(Path("/dev/null"))
    os.mkfifo(tmp_path / "pipe")
    require_writable(tmp_path / "pipe")


def test_permissions_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system says it to who is not root, who may write everywhere."""

    def denied(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "out.json").touch()
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InvalidInput, match="Permission denied"):
        require_writable(tmp_path / "out.json")
    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(InvalidInput, match="Permission denied"):
        require_writable(tmp_path / "new.json")
