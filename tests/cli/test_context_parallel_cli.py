"""`weft bench cp` on two processes, and `weft simulate` on what it has measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from weft_attn.bench.group_ways import BOTH, COMMUNICATION, FORWARD, IDEAL, KERNELS, WEFT
from weft_attn.bench.rates import ALL_GATHER, REDUCE_SCATTER, read_rates
from weft_attn.bench.records import ABSENT, OK, GroupRecord, read_json
from weft_attn.cli.bench_cp import bench_cp
from weft_attn.cli.main import main
from weft_attn.cli.simulate import simulate
from weft_attn.errors import InvalidInput, Unsupported


def command(function, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """What a run on two ranks prints, its records, its rates."""
    folder = tmp_path_factory.mktemp("cp")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    bench = ["-m", "weft_attn.cli.main", "bench", "cp", "--quick", "--device", "cpu", "--rounds", "2"]
    files = ["--out", "records.json", "--write-rates", "rates.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [*torchrun, *bench, *files], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, folder / "records.json", folder / "rates.json"


def test_two_ranks_measure_every_part_and_one_of_them_prints(measured: tuple[str, Path, Path]):
    text, path, _ = measured
    found = read_json(path, GroupRecord)
    by_name = {(r.case, r.peer, r.pass_name): r for r in found if r.workload is not None}
    assert {r.status for r in found} == {OK, ABSENT}
    assert {r.workload.world_size for r in by_name.values()} == {2}
    for case in {case for case, _, _ in by_name}:
        assert text.count(f"({case})") > 0
        for name in (WEFT, KERNELS, COMMUNICATION, IDEAL):
            assert {by_name[case, name, p].status for p in (FORWARD, BOTH)} == {OK}
    assert {r.pass_name for r in found if r.workload is None} == {ALL_GATHER, REDUCE_SCATTER}
    # Once for the collectives and once for each of two workloads: one rank prints.
    assert text.count("share of") == 3


def test_predictions_are_checked_against_what_was_measured(measured: tuple[str, Path, Path]):
    _, path, rates = measured
    assert {link.operation for link in read_rates(rates).links} == {ALL_GATHER, REDUCE_SCATTER}
    result = command(simulate, "--check", str(path), "--rates", str(rates))
    assert result.exit_code == 0, result.output
    assert "Against measurements" in result.output
    # Workloads, passes, and the whole, its kernels, its communication; then the largest and the mean error.
    assert result.output.count("%") == 2 * 2 * 3 + 2


def test_a_run_without_torchrun_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    result = command(bench_cp, "--quick", "--device", "cpu")
    assert isinstance(result.exception, Unsupported)
    assert "torchrun" in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--peers", "spiral"),
        ("--dtype", "int8"),
        ("--dtype", ""),
        ("--heads", "0"),
        ("--rounds", "0"),
        ("--groups", "0"),
        ("--groups", "1+7"),
        ("--work", "short"),
        ("--work", "long", "--write-rates", "rates.json"),
        ("--device", "cuda:1"),
        ("--copy-engines",),
        ("--copy-engines", "--device", "cuda", "--work", "links"),
        ("--copy-engines", "--device", "cuda", "--write-rates", "rates.json"),
    ],
)
def test_bad_requests_are_refused_before_a_group_is_made(arguments: tuple[str, ...]):
    assert isinstance(command(bench_cp, "--device", "cpu", *arguments).exception, InvalidInput)


def test_a_simulation_prints_and_writes_every_world(tmp_path: Path):
    out = tmp_path / "out.json"
    result = command(
        simulate,
        "--world",
        "8..1024",
        "--tokens",
        "1048576",
        "--documents",
        "lognormal:50:1",
        "--link-gbps",
        "50",
        "--out",
        str(out),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [one["workload"]["world_size"] for one in found] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert all(one["forward"]["total_ms"] > 0 and one["backward"]["total_ms"] > 0 for one in found)
    for word in ("1,048,576", "1024", "share of ideal", "NVIDIA H200", "GPU and direction"):
        assert word in result.output


def test_documents_per_gpu_grow_with_the_ranks(tmp_path: Path):
    out = tmp_path / "out.json"
    result = command(simulate, "--world", "2,4", "--documents", "256,7392,544", "--per-gpu", "--out", str(out))
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [sum(one["workload"]["lengths"]) for one in found] == [2 * 8192, 4 * 8192]
    assert [one["rank_tokens"] for one in found] == [8192, 8192]


def test_tokens_alone_are_one_document_and_nothing_at_all_is_refused(tmp_path: Path):
    out = tmp_path / "out.json"
    assert command(simulate, "--world", "2", "--tokens", "4096", "--out", str(out)).exit_code == 0
    assert json.loads(out.read_text())[0]["workload"]["lengths"] == [4096]
    assert command(simulate, "--world", "2").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--tokens", "64", "--layout", "snake"), InvalidInput),
        (("--tokens", "64", "--documents", "3,4"), InvalidInput),
        (("--tokens", "64", "--documents", ""), InvalidInput),
        (("--tokens", "0"), InvalidInput),
        (("--tokens", "64", "--heads", "0"), InvalidInput),
        (("--tokens", "64", "--kv-heads", "0"), InvalidInput),
        (("--tokens", "64", "--head-dim", "0"), InvalidInput),
        (("--tokens", "64", "--dtype", ""), InvalidInput),
        (("--tokens", "64", "--world", "x"), InvalidInput),
        (("--tokens", "64", "--head-dim", "64"), Unsupported),
        (("--tokens", "64", "--world", "12", "--link-gbps", "50"), Unsupported),
        (("--tokens", "64", "--rates", "nowhere.json"), InvalidInput),
        (("--tokens", "64", "--link-gbps", "0"), InvalidInput),
        (("--check", "nowhere.json"), InvalidInput),
    ],
)
def test_simulations_that_make_no_sense_are_refused(arguments: tuple[str, ...], error: type[Exception]):
    assert isinstance(command(simulate, *arguments).exception, error)


def test_the_command_line_knows_both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def said(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        return end.value.code, *capsys.readouterr()

    _, listed, _ = said("--help")
    assert "bench cp" in listed
    assert "simulate" in listed
    assert "--max-gather-bytes" in said("bench", "cp", "--help")[1]
    code, _, error = said("bench", "cp", "--quick", "--device", "cpu")
    assert code == 2
    assert "torchrun" in error
