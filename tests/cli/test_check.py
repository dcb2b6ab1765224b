"""The check shows what it says: real documents, every rank through the kernels, the same as one device, or a failure."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from weft_attn.cli.main import main
from weft_attn.demo import attention_report as report
from weft_attn.demo.attention_ranks import RankResult, Sizes, ZigzagRanks, project
from weft_attn.demo.attention_report import Checks, compare
from weft_attn.demo.documents import Document, Pack, pack_documents
from weft_attn.errors import InvalidInput
from weft_attn.plan import Plan
from weft_attn.testing.cases import Inputs

SIZES = Sizes(tokens=90, heads=2, kv_heads=1, head_dim=16, dtype=torch.bfloat16)
CPU = torch.device("cpu")
LENGTHS = (37, 0, 3, 50)


def make_pack() -> Pack:
    bytes_of = np.random.default_rng(0)
    documents = [Document(f"{n}.txt", bytes_of.integers(0, 256, n).astype(np.uint8)) for n in LENGTHS]
    return Pack(tuple(documents), 0, "a test")


def run_ranks(world_size: int = 3) -> tuple[ZigzagRanks, list[RankResult], Inputs]:
    """The ranks of a small pack on the CPU, where attention is the reference."""
    pack = make_pack()
    inputs = project(pack, SIZES, CPU)
    ranks = ZigzagRanks(inputs, pack.cu_seqlens, world_size)
    return ranks, [ranks.run(rank) for rank in range(world_size)], inputs


def verdicts(checks: Checks) -> dict[str, bool]:
    found = {f"out {rank}": each.passed for rank, each in enumerate(checks.out)}
    found |= {f"dq {rank}": each.passed for rank, each in enumerate(checks.dq)}
    return found | {"dk": checks.dk.passed, "dv": checks.dv.passed}


# ---- the whole command ----------------------------------------------------------------------------------------------------


def test_the_check_runs_the_kernels_in_the_interpreter_and_passes(
    weft: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = weft("check", "--device", "cpu", "--tokens", 150, "--ranks", 2, "--picture", "pictures/plan.png")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "150 tokens" in done.stdout
    assert "interpreter" in done.stdout
    assert "the Python standard library" in done.stdout
    assert done.stdout.count("PASS") == 2 + 2 + 1
    assert "FAIL" not in done.stdout
    assert (tmp_path / "pictures" / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_own_documents_are_packed_in_the_order_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "choose_device", lambda name: CPU)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"x" * 20)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_bytes(b"some words of a document")
    (tmp_path / "folder" / "c.txt").write_bytes(b"never reached")
    with pytest.raises(SystemExit) as end:
        main(["check", "--device", "cpu", "--ranks", "1", "--tokens", "40", "--documents", "b.txt", "folder"])
    said = capsys.readouterr().out
    assert end.value.code == 0, said
    assert "b.txt 20, a.txt 20" in said
    assert "left out, for room: 1 documents" in said


def test_a_wrong_plan_makes_the_check_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = ZigzagRanks.plan

    def one_key_too_many(self: ZigzagRanks, rank: int) -> Plan:
        plan = honest(self, rank)
        first, *others = plan.slices
        return Plan([replace(first, hi=(first.hi or 0) + 1), *others], plan.total_q, plan.total_k)

    monkeypatch.setattr(report, "choose_device", lambda name: CPU)
    arguments = ["check", "--ranks", "2", "--tokens", "200", "--picture", str(tmp_path / "plan.png")]
    for plan, code, verdict in ((honest, 0, "PASS  every row"), (one_key_too_many, 1, "FAIL  an error exceeds")):
        monkeypatch.setattr(ZigzagRanks, "plan", plan)
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == code
        assert verdict in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--documents", "no-such-file"), "no-such-file"),
        (("--ranks", "0"), "ranks are counted"),
        (("--tokens", "0"), "tokens are counted"),
        (("--picture", "out.foo"), ".png"),
        (("--picture", "missing.txt/out"), ".png"),
        (("--picture", "."), "no folder"),
    ],
)
def test_bad_requests_exit_with_2_before_anything_runs(
    arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "choose_device", lambda name: CPU)
    monkeypatch.setattr(report, "project", lambda *args: pytest.fail("ran"))
    with pytest.raises(SystemExit) as end:
        main(["check", *arguments])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["abacus", "", "meta"])
def test_a_device_is_a_cpu_or_a_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["check", "--device", name])
    assert end.value.code == 2
    assert "cpu, cuda or cuda:N" in capsys.readouterr().err


def test_a_process_whose_triton_compiles_cannot_interpret_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    import triton

    assert not triton.knobs.runtime.interpret
    with pytest.raises(SystemExit) as end:
        main(["check", "--device", "cpu"])
    assert end.value.code == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


# ---- what it compares -----------------------------------------------------------------------------------------------------


def test_ranks_agree_with_one_device() -> None:
    ranks, results, inputs = run_ranks()
    checks = compare(ranks, results, inputs, SIZES)
    assert all(verdicts(checks).values())
    assert checks.passed


@pytest.mark.parametrize("name", ["out", "dq"])
def test_one_wrong_row_fails_its_rank_alone(name: str) -> None:
    ranks, results, inputs = run_ranks()
    wrong = getattr(results[1], name).clone()
    wrong[-1] += 0.5
    results[1] = replace(results[1], **{name: wrong})
    checks = compare(ranks, results, inputs, SIZES)
    assert [key for key, passed in verdicts(checks).items() if not passed] == [f"{name} 1"]
    assert not checks.passed


@pytest.mark.parametrize("name", ["dk", "dv"])
def test_a_rank_whose_gradient_is_lost_fails_the_sum(name: str) -> None:
    ranks, results, inputs = run_ranks()
    results[2] = replace(results[2], **{name: torch.zeros_like(getattr(results[2], name))})
    checks = compare(ranks, results, inputs, SIZES)
    assert [key for key, passed in verdicts(checks).items() if not passed] == [name]
    assert not checks.passed


def test_nan_fails() -> None:
    ranks, results, inputs = run_ranks()
    results[0] = replace(results[0], out=results[0].out * float("nan"))
    assert not compare(ranks, results, inputs, SIZES).passed


def test_equal_documents_have_equal_keys_whatever_comes_before_them() -> None:
    tokens = np.frombuffer(b"the same words", dtype=np.uint8)
    other = Document("other", np.frombuffer(b"others", dtype=np.uint8))
    pack = Pack((Document("one", tokens), other, Document("again", tokens)), 0, "a test")
    inputs = project(pack, SIZES, CPU)
    torch.testing.assert_close(inputs.k[: len(tokens)], inputs.k[-len(tokens) :])
    torch.testing.assert_close(inputs.v[: len(tokens)], inputs.v[-len(tokens) :])


# ---- what it packs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [150, 1536, 32_768])
def test_the_standard_library_fills_the_cap_the_same_way_each_time(tokens: int) -> None:
    one, other = pack_documents([], tokens), pack_documents([], tokens)
    assert int(one.cu_seqlens[-1]) == tokens
    assert [d.name for d in one.documents] == [d.name for d in other.documents]
    assert (one.tokens == other.tokens).all()
    assert tokens < 1000 or len(one.documents) >= 3


def test_the_last_document_is_cut_at_the_cap(tmp_path: Path) -> None:
    for name, text in (("a", b"12345"), ("b", b""), ("c", b"6789"), ("d", b"0")):
        (tmp_path / name).write_bytes(text)
    pack = pack_documents([tmp_path], 7)
    assert bytes(pack.tokens) == b"1234567"
    assert pack.cu_seqlens.tolist() == [0, 5, 5, 7]
    assert pack.left_out == 1


def test_documents_without_a_byte_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(InvalidInput, match="at least one byte"):
        pack_documents([tmp_path], 10)
