"""The demo trains twice and holds the two trainings to each other: honest ones pass, and a planted error fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from weft_attn.cli.main import main
from weft_attn.demo import launch, options
from weft_attn.demo.documents import Document, Pack, pack_batches
from weft_attn.demo.launch import RankFailed, start_ranks
from weft_attn.demo.options import Options, Setup, Sizes
from weft_attn.demo.report import Outcome, Step
from weft_attn.errors import InvalidInput, Unsupported
from weft_attn.plan.layouts import Zigzag
from weft_attn.testing.ranks import run_ranks

Weft = Callable[..., subprocess.CompletedProcess[str]]
SIZES = Sizes(tokens=61, layers=2, heads=2, kv_heads=1, head_dim=16)
LENGTHS = (23, 0, 1, 37)


def make_pack(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Pack:
    bytes_of = np.random.default_rng(seed)
    return Pack(tuple(Document(f"{n}.txt", bytes_of.integers(0, 256, n).astype(np.uint8)) for n in lengths), 0, "a test")


def make_setup(world_size: int = 2, steps: int = 2) -> Setup:
    batches = tuple(make_pack(seed=seed) for seed in range(steps))
    return Setup(SIZES, batches, world_size, on_gpu=False, picture=Path("unused.png"))


# ---- the whole command ----------------------------------------------------------------------------------------------------


def test_the_demo_trains_on_ranks_and_passes(weft: Weft, tmp_path: Path) -> None:
    done = weft("demo", "--ranks", 2, "--steps", 3, "--tokens", 150, "--device", "cpu", "--picture", "pictures/run.png")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 batches of 150 tokens" in done.stdout
    assert "the Python standard library" in done.stdout
    assert "2 zigzag ranks" in done.stdout
    assert "tokens/s" in done.stdout
    assert done.stdout.count("PASS") == 3 + 1
    assert "FAIL" not in done.stdout
    assert (tmp_path / "pictures" / "run.png").read_bytes().startswith(b"\x89PNG")


def test_torchrun_starts_the_same_demo(tmp_path: Path) -> None:
    (tmp_path / "words[1].txt").write_bytes(b"some words of a document " * 3)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "weft_attn.demo"]
    command = [sys.executable, "-m", *launcher, "--steps", "2", "--tokens", "40", "--device", "cpu", "words[1].txt"]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") == 3 + 1, "one rank speaks"
    assert "of words[1].txt" in done.stdout


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_the_verdict_is_the_exit_code(passed: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "start_ranks", lambda function, world_size, *args: [passed] * world_size)
    with pytest.raises(SystemExit) as end:
        main(["demo", "--device", "cpu", "--steps", "1"])
    assert end.value.code == code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--documents", "no-such-file"), "no-such-file"),
        (("--ranks", "0"), "ranks are counted"),
        (("--tokens", "1"), "tokens predict the next"),
        (("--steps", "0"), "steps are counted"),
        (("--device", "abacus"), "cpu or cuda"),
        (("--tokens", "2", "--ranks", "4"), "every rank has rows"),
        (("--picture", "out.foo"), ".png"),
        (("--picture", "out"), ".png"),
        (("--picture", "."), "no folder"),
        (("--picture", "/dev/null/out.png"), "/dev/null"),
    ],
)
def test_bad_requests_exit_with_2_before_any_process_starts(
    arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "start_ranks", lambda *args: pytest.fail("started"))
    with pytest.raises(SystemExit) as end:
        main(["demo", *arguments])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("lengths", "ranks"), [((2,), 4), ((1,) * 40 + (2,), 3), ((0, 4, 1), 5), ((3, 3), 8)])
def test_every_rank_has_rows_of_every_batch(lengths: tuple[int, ...], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    enough, thin = make_pack((64, 1)), make_pack(lengths)
    empty = Zigzag.of(thin.cu_seqlens, ranks).rank_tokens.tolist().index(0)
    asked = Options(device="cpu", steps=2, world_size=ranks)
    monkeypatch.setattr(options, "pack_batches", lambda *args: [enough, thin])
    with pytest.raises(InvalidInput, match=rf"batch 2 of {sum(lengths)} tokens, of which rank {empty} of {ranks} has none"):
        Setup.of(asked)
    monkeypatch.setattr(options, "pack_batches", lambda *args: [enough, enough])
    assert Setup.of(asked).world_size == ranks


def test_a_rank_that_draws_nothing_needs_no_place_for_the_picture(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    elsewhere = Options(device="cpu", steps=1, tokens=64, picture=tmp_path / "file" / "out.png")
    assert Setup.of(elsewhere, draws=False).picture == elsewhere.picture
    with pytest.raises(InvalidInput, match="an existing folder"):
        Setup.of(elsewhere)


def test_one_gpu_does_not_hold_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Unsupported, match="a GPU of its own"):
        Setup.of(Options(device="cuda", world_size=2, steps=1))
    assert not Setup.of(Options(steps=1)).on_gpu
    assert Setup.of(Options(steps=1, world_size=8), local_ranks=1).on_gpu, "one on each of eight machines"


def test_a_missing_package_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(Unsupported, match=r"weft-attn\[demo\], given no matplotlib"):
        Setup.of(Options(steps=1))


@pytest.mark.parametrize(("gpus", "ranks"), [(2, 2), (3, 3), (8, 4)])
def test_several_gpus_are_used(gpus: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    setup = Setup.of(Options(steps=1, tokens=64))
    assert (setup.world_size, setup.backend) == (ranks, "nccl")
    assert Setup.of(Options(steps=1, tokens=64, world_size=9)).backend == "gloo"


# ---- a rank that fails ----------------------------------------------------------------------------------------------------

ONE_RAISES = """
import os
import torch.distributed as dist
dist.init_process_group("gloo")
if os.environ["RANK"] == "1":
    raise ValueError("planted")
dist.barrier()
"""


def test_the_rank_that_raises_ends_the_run_with_its_error() -> None:
    with pytest.raises(RankFailed, match="rank 1 failed") as failure:
        start_ranks(exec, 2, ONE_RAISES)
    assert "ValueError: planted" in str(failure.value)


def test_a_failed_rank_is_told_and_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*args: Any) -> list[Any]:
        raise RankFailed("rank 3 failed: Traceback ...")

    monkeypatch.setattr(launch, "start_ranks", fail)
    with pytest.raises(SystemExit) as end:
        main(["demo", "--device", "cpu", "--steps", "1"])
    assert end.value.code == 1
    assert "rank 3 failed: Traceback" in capsys.readouterr().err


# ---- what it compares -----------------------------------------------------------------------------------------------------


def planted(name: str) -> Any:
    """An error in what a rank does, as a context; "nothing" is none."""
    from weft_attn.demo import training
    from weft_attn.demo.training import Share, Trainer

    share_of, gradients, all_reduce = training.share_of, Trainer.gradients, dist.all_reduce

    def labels_after_the_cut(batch: Pack, parallel: Any) -> Share:
        share = share_of(batch, parallel)
        return replace(share, labels=share.ids.roll(-1))

    def another_token(batch: Pack, parallel: Any) -> Share:
        share = share_of(batch, parallel)
        return replace(share, ids=share.ids.index_fill(0, torch.tensor([0]), 7))

    def wrong_element(trainer: Trainer) -> dict[str, torch.Tensor]:
        found = gradients(trainer)
        if trainer.parallel is not None:
            # Twice a step: for the reduction and for the comparison.
            norm = found["model.norm.weight"]
            norm[3] += 1e-3 * norm.abs().max()
        return found

    def own_part_only(tensor: torch.Tensor, **options: Any) -> None:
        if tensor.ndim == 0:
            all_reduce(tensor, **options)

    def mean_over_ranks(tensor: torch.Tensor, **options: Any) -> None:
        all_reduce(tensor, **options)
        tensor /= dist.get_world_size()

    plants: dict[str, tuple[Any, str, Any]] = {
        "labels shifted after the cut": (training, "share_of", labels_after_the_cut),
        "another token": (training, "share_of", another_token),
        "one wrong element of a gradient": (Trainer, "gradients", wrong_element),
        "gradients that are not summed": (dist, "all_reduce", own_part_only),
        "a mean of the ranks": (dist, "all_reduce", mean_over_ranks),
    }
    stack = ExitStack()
    if name != "nothing":
        stack.enter_context(mock.patch.object(*plants[name]))
    return stack


PLANTS = (
    "nothing",
    "labels shifted after the cut",
    "another token",
    "one wrong element of a gradient",
    "gradients that are not summed",
    "a mean of the ranks",
)


def verdicts(rank: int, world_size: int) -> dict[str, bool]:
    """In a rank: the verdict of a short run with each error planted."""
    from weft_attn.demo import run

    # What an environment may have chosen; the runs undo it.
    torch.set_float32_matmul_precision("medium")
    found = {}
    with mock.patch.object(run, "draw_run"):
        for name in PLANTS:
            with planted(name):
                found[name] = run.run_group(make_setup(world_size), torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    return found


def test_planted_errors_fail_and_their_absence_passes_on_every_rank() -> None:
    expected = {name: name == "nothing" for name in PLANTS}
    assert run_ranks(verdicts, 2) == [expected, expected]


def test_each_bound_can_fail_alone() -> None:
    honest = Step(3.0, 3.0, 1e-7, "weight", 1.0, 1.0)
    assert Outcome((honest, honest)).passed
    for index, wrong in (
        (0, replace(honest, gradient_gap=1e-3)),
        (1, replace(honest, gradient_gap=0.1)),
        (1, replace(honest, gradient_gap=float("nan"))),
        (1, replace(honest, loss_together=3.001)),
        (1, replace(honest, loss_together=float("nan"))),
    ):
        steps = [honest, honest]
        steps[index] = wrong
        assert not Outcome(tuple(steps)).passed, wrong


def test_the_largest_difference_is_found_wherever_it_is() -> None:
    from weft_attn.demo.training import largest_difference

    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[4.0, 0.0]]), "c": torch.zeros(2)}
    assert largest_difference(ours, ours)[0] == 0
    for name, wrong, expected in (
        ("a", torch.tensor([1.0, 2.5]), 0.5 / 2.5),
        ("b", torch.tensor([[4.0, -1.0]]), 1 / 4),
        ("c", torch.tensor([0.0, float("nan")]), float("inf")),
    ):
        assert largest_difference(ours, {**ours, name: wrong}) == (pytest.approx(expected), name)
    assert largest_difference(ours, {"a": ours["a"], "b": ours["b"]}) == (float("inf"), "c")


def test_the_one_process_and_a_group_of_one_cut_the_same_labels_and_positions() -> None:
    from weft_attn.demo.training import labelled, share_of, whole
    from weft_attn.distributed.context_parallel import ContextParallel

    for lengths in (LENGTHS, (1,), (0, 5, 0), (3, 3)):
        pack = make_pack(lengths)
        ours, theirs = whole(pack), share_of(pack, ContextParallel())
        for name in ("ids", "positions", "labels"):
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), (lengths, name)
        assert labelled(pack) == int((ours.labels != -100).sum())


# ---- what it trains on ----------------------------------------------------------------------------------------------------


def test_batches_follow_one_another_through_the_documents_and_around(tmp_path: Path) -> None:
    for name, text in (("a", b"12345"), ("b", b""), ("c", b"6789")):
        (tmp_path / name).write_bytes(text)
    packs = pack_batches([tmp_path], 4, 5)
    assert [bytes(pack.tokens) for pack in packs] == [b"1234", b"5678", b"9123", b"4567", b"8912"]
    assert packs[1].cu_seqlens.tolist() == [0, 1, 1, 4]


def test_documents_with_nothing_to_predict_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(InvalidInput, match="at least one byte"):
        Setup.of(Options([tmp_path], steps=1))
    (tmp_path / "one").write_bytes(b"1")
    with pytest.raises(InvalidInput, match="at least two bytes"):
        Setup.of(Options([tmp_path], tokens=4, steps=1))
