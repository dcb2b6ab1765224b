"""`weft bench`, `weft ablate` and `weft tune` from the command line, at sizes that a CPU does in a blink."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

import weft_attn as weft
from weft_attn.bench import ablation, one_kernel, records, run, tune
from weft_attn.cli.ablate import ablate as ablate_command
from weft_attn.cli.bench import bench as bench_command
from weft_attn.cli.tune import tune as tune_command
from weft_attn.errors import InvalidInput, Unsupported
from weft_attn.launch.select import parse_table

TINY = ("--device", "cpu", "--quick", "--seqlen", "48", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--rounds", "2")


def words(value: object) -> str | None:
    """A test's id: the command line as it is written."""
    return " ".join(value) if isinstance(value, tuple) else None


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weft_command(*arguments: str) -> Result:
    app = typer.Typer()
    for name, command in (("bench", bench_command), ("ablate", ablate_command), ("tune", tune_command)):
        app.command(name)(command)
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def configs_on_the_reference(monkeypatch: pytest.MonkeyPatch):
    """Let the CPU stand in for a GPU: configs change nothing there, everything else is the same."""
    monkeypatch.setattr(ablation, "needs_kernels", lambda device: None)
    monkeypatch.setattr(tune, "needs_kernels", lambda device: None)
    grid = {"block_q": (16, 32), "block_k": (16,), "num_warps": (4,), "num_stages": (1,)}
    monkeypatch.setattr(tune, "GRIDS", dict.fromkeys(tune.GRIDS, grid))


@pytest.mark.parametrize(
    ("suites", "measured"),
    [
        (("square",), 6),
        (("zigzag", "--world", "2", "--rank", "all"), 4),
        (("decode",), 2),
        (("packed", "--pass", "forward"), 2),
        (("host",), 2),
        (("square", "decode", "--pass", "forward", "--deterministic"), 5),
    ],
    ids=words,
)
def test_a_quick_run_writes_a_record_for_every_figure_it_shows(suites: tuple[str, ...], measured: int, tmp_path: Path):
    out = tmp_path / "records.json"
    result = weft_command("bench", *suites, *TINY, "--out", str(out))
    assert result.exit_code == 0, result.output
    found = records.read_json(out)
    assert len([r for r in found if r.status == records.OK]) == measured
    assert {r.peer for r in found if r.status == records.ABSENT} == {"cudnn", "flash", "flex", "flash4"}
    for record in found:
        assert record.case in result.output
    assert "needs a CUDA device" in result.output


def test_building_plans_is_measured_without_a_device():
    result = weft_command("bench", "plan", "--quick", "--rounds", "2", "--device", "cuda")
    assert result.exit_code == 0, result.output
    assert "50 documents, zigzag, W=4" in result.output


def test_named_peers_only():
    result = weft_command("bench", "decode", *TINY, "--peers", "flex, flash", "--no-peers", "flash")
    assert result.exit_code == 0, result.output
    assert "absent flex" in result.output
    assert "absent flash" not in result.output


def test_a_wrong_kernel_prints_no_figure_and_exits_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    honest = weft.plan_attention

    def planted(*args, **kwargs):
        found = honest(*args, **kwargs)
        return (found[0] * 1.05, found[1]) if isinstance(found, tuple) else found * 1.05

    monkeypatch.setattr(weft, "plan_attention", planted)
    out = tmp_path / "records.json"
    result = weft_command("bench", "square", *TINY, "--peers", "weft", "--out", str(out))
    assert result.exit_code == 1
    assert "WRONG weft" in result.output
    assert "TFLOP/s" not in result.output
    assert {(r.status, r.milliseconds, r.rate) for r in records.read_json(out)} == {(records.RED, None, None)}


def test_only_cases_with_a_name_run(tmp_path: Path):
    out = tmp_path / "figures.json"
    result = weft_command("bench", "square", "plan", *TINY, "--peers", "weft", "--only", "causal", "--out", str(out))
    assert result.exit_code == 0, result.output
    names = {record.case for record in records.read_json(out)}
    assert names
    assert all("causal" in name for name in names)
    assert "full" not in result.output
    # Where only plans are built, no device is asked for.
    result = weft_command(
        "bench", "square", "plan", "--quick", "--rounds", "2", "--device", "cuda", "--only", "documents, packed"
    )
    assert result.exit_code == 0, result.output
    assert "zigzag" not in result.output


def test_unchecked_runs_say_so():
    result = weft_command("bench", "decode", *TINY, "--no-check", "--peers", "weft")
    assert result.exit_code == 0, result.output
    assert records.UNCHECKED in result.output


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("bench", "round", "--device", "cpu"), InvalidInput),
        (("bench", "square", "--device", "cpu", "--only", "a circle"), InvalidInput),
        (("bench", "square", "--device", "cpu", "--dtype", "int8"), InvalidInput),
        (("bench", "square", "--device", "cpu", "--pass", "sideways"), InvalidInput),
        (("bench", "square", "--device", "cpu", "--peers", "fastest"), InvalidInput),
        (("bench", "square", "--device", "cpu", "--rounds", "0"), InvalidInput),
        (("bench", "square", "--device", "cpu", "--heads", "0"), InvalidInput),
        (("bench", "square", "--device", "cpu", "--kv-heads", "0"), InvalidInput),
        (("bench", "square", "--device", "cpu", "--head-dim", "0"), InvalidInput),
        (("bench", "square", "--device", "cpu", "--dtype", ""), InvalidInput),
        (("bench", "zigzag", "--device", "cpu", "--quick", "--world", "0"), InvalidInput),
        (("bench", "square", "--device", "cpu", "--quick", "--world", "0"), InvalidInput),
        (("bench", "plan", "--quick", "--world", "0"), InvalidInput),
        (("ablate", "--device", "cpu", "--techniques", "magic"), InvalidInput),
        (("ablate", "--device", "cpu", "--techniques", ""), InvalidInput),
        (("ablate", "--device", "cpu", "--quick", "--seqlen", "0"), InvalidInput),
        (("ablate", "--device", "cpu", "--quick"), Unsupported),
        (("tune", "--device", "cpu", "--quick"), Unsupported),
        (("tune", "--device", "cpu", "--kernel", "delta"), InvalidInput),
        (("tune", "--device", "cpu", "--head-dim", "0"), InvalidInput),
        (("tune", "--device", "cpu", "--seqlen", "0"), InvalidInput),
    ],
    ids=words,
)
def test_bad_requests_are_refused_before_anything_runs(
    arguments: tuple[str, ...], error: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    for work in ("run_case", "run_plan_suite"):
        monkeypatch.setattr(run, work, lambda *args, **kwargs: pytest.fail("ran"))
    assert isinstance(weft_command(*arguments).exception, error)


def test_ablation_shows_every_setting_beside_the_chosen_config(configs_on_the_reference):
    result = weft_command("ablate", *TINY, "--techniques", "l2_order,tiles")
    assert result.exit_code == 0, result.output
    for label in (ablation.CHOSEN, "l2_order: one head at a time", "tiles: 32 x 32", *tune.KERNELS):
        assert label in result.output


def test_tuning_writes_a_table_that_selection_reads(configs_on_the_reference, tmp_path: Path):
    path = tmp_path / "here.toml"
    result = weft_command(
        "tune", *TINY, "--kernel", "forward", "--kernel", "backward_dq", "--dtype", "fp32", "--write", str(path)
    )
    assert result.exit_code == 0, result.output
    table = parse_table("here", path.read_text(encoding="utf-8"))
    assert [row.config.kernel for row in table.rows] == ["forward", "backward_dq"]
    assert all(row.measured["tflops"] >= 0 and row.measured["date"] for row in table.rows)


def test_a_wrong_config_makes_tuning_exit_with_1(configs_on_the_reference, monkeypatch: pytest.MonkeyPatch):
    honest = one_kernel.KernelRuns._forward
    monkeypatch.setattr(
        one_kernel.KernelRuns, "_forward", lambda self, turn: (honest(self, turn)[0] * 1.05, honest(self, turn)[1])
    )
    result = weft_command("tune", *TINY, "--kernel", "forward")
    assert result.exit_code == 1
    assert "WRONG" in result.output
