"""`weft doctor` says what selection would do, and why."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable

import pytest
import torch

from weft_attn.cli.main import main
from weft_attn.launch.config import ForwardConfig
from weft_attn.launch.device import TARGETS, target
from weft_attn.launch.explain import explain, inspect_machine, numbers
from weft_attn.launch.resources import accumulator_registers, shared_memory
from weft_attn.launch.select import DKDV_KERNELS, DQ_KERNELS, FORWARD_KERNELS, Problem, select, select_first
from weft_attn.plan import Plan


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["doctor", *arguments])
    captured = capsys.readouterr()
    assert end.value.code == 0, captured.err
    return " ".join(captured.out.split())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["doctor", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("arch", TARGETS)
def test_for_a_target_it_names_every_kernel_its_numbers_and_their_source(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--arch", arch, "--head-dim", "64", "--dtype", "fp16")
    for kernels in (FORWARD_KERNELS, DKDV_KERNELS, DQ_KERNELS, ("combine",), ("delta",)):
        choice = select_first(kernels, Problem(64, 64, 16, group=4), target(arch))
        assert f"{choice.config.kernel} {numbers(choice.config)} from {choice.source}" in text
        assert (
            f"{shared_memory(choice.config, Problem(64, 64, 16).shape, arch):,} of {target(arch).shared_memory:,} bytes" in text
        )


def test_it_says_which_kernels_compute_the_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    long = said(capsys, "--arch", "sm_90", "--rows", "16384", "--keys", "16384")
    assert (
        "backward: hopper_backward and finish_dq, for deterministic=True with programs that add in turn where that pays;"
        in long
    )
    short = said(capsys, "--arch", "sm_90", "--rows", "256", "--keys", "256")
    assert "backward: hopper_backward_dkdv and hopper_backward_dq; deterministic" in short
    assert "delta runs only where dQ is not wanted" in short
    assert "finish_dq" not in short
    portable = said(capsys, "--arch", "sm_80")
    assert "backward: backward_dkdv and backward_dq; deterministic" in portable
    assert "delta runs only" not in portable


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--head-dim", "128"], "Hopper's kernels: hopper_forward, hopper_backward_dkdv, hopper_backward_dq, hopper_backward"),
        (["--head-dim", "192"], "Hopper's kernels: none, head dims 192/192 are not both a power of two from 16 on"),
        (["--head-dim", "32"], "Hopper's kernels: none, for no row of the tables serves the call"),
        (["--head-dim", "128", "--head-dim-v", "64"], "Hopper's kernels: none, head dims 128/64 differ"),
        (["--dtype", "fp32"], "Hopper's kernels: none, tensors are not of 16 bits"),
    ],
)
def test_on_hopper_it_says_whether_its_kernels_serve(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ["--rows", "16384", "--keys", "16384"]
    assert expected in said(capsys, "--arch", "sm_90", *long, *options)
    assert "Hopper's" not in said(capsys, "--arch", "sm_80", *long, *options)


def test_registers_of_accumulators_are_shown_beside_what_a_thread_has(capsys: pytest.CaptureFixture[str]) -> None:
    choice = select("backward_dkdv", Problem(128, 128, 16), target("sm_80"))
    registers = accumulator_registers(choice.config, Problem(128, 128, 16).shape, 32)
    assert registers > 0
    assert f"{registers} of 255 registers for accumulators" in said(capsys, "--arch", "sm_80")


def test_few_rows_pack_heads_and_split_keys_and_many_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    few = said(capsys, "--arch", "sm_90", "--rows", "1", "--keys", "131072")
    assert "4 query heads share a tile" in few
    assert "tiles whose keys are split: 1, into " in few
    many = said(capsys, "--arch", "sm_90", "--rows", "131072", "--no-causal")
    assert "rows of one head" in many
    assert "combine does not run" in many
    assert f"{131072**2:,} visible pairs" in many


def test_the_explanation_counts_what_the_cut_makes() -> None:
    plan = Plan.dense(1, 1, 100_000, causal=True)
    found = explain(plan, 32, 8, Problem(128, 128, 16), target("sm_90"))
    assert isinstance(found.cut.config, ForwardConfig)
    assert found.split_tiles == 1
    assert found.cut.tiling.max_tiles is not None
    tiles = math.ceil(100_000 / found.cut.config.block_k)
    assert found.parts == found.items == math.ceil(tiles / found.cut.tiling.max_tiles)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: its kernels are explained instead")
def test_without_a_gpu_the_reference_runs_and_it_says_how_to_ask_for_more(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys)
    assert "kernel: reference" in text
    assert "--arch" in text
    assert "none that torch can use" in text
    assert torch.__version__ in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: its kernels are explained instead")
def test_in_the_interpreter_it_says_so(weft: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = weft("doctor", interpret=True)
    assert done.returncode == 0, done.stderr
    assert "on (TRITON_INTERPRET=1)" in done.stdout
    assert "in Triton's interpreter" in done.stdout


def test_an_unknown_target_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for arch in ("sm_99", ""):
        message = refused(capsys, "--arch", arch)
        assert repr(arch) in message
        assert all(known in message for known in TARGETS)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("--head-dim", "100"), "multiple of 8"),
        (("--head-dim-v", "264"), "multiple of 8"),
        (("--heads", "6", "--kv-heads", "4"), "multiple of KV heads"),
        (("--dtype", "int8"), "bf16"),
        (("--rows", "-1"), "--rows"),
    ],
)
def test_a_problem_that_attention_refuses_is_refused(
    arguments: tuple[str, ...], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rule in refused(capsys, *arguments)


def test_a_machine_without_triton_or_driver_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from weft_attn.launch import explain as module

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "version", missing)
    monkeypatch.setattr(module, "CUDA_DRIVER", "libno-such-driver.so")
    machine = inspect_machine()
    assert machine.triton is None
    assert machine.cuda_driver is None
