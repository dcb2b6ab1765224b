"""`weft compile` compiles what the tables ask for, and says what is wrong with it. No GPU, and no interpreter, is needed."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from weft_attn.cli.compile import MAX_SPILL
from weft_attn.cli.main import main
from weft_attn.errors import InvalidInput, Unsupported
from weft_attn.kernels import matrix
from weft_attn.kernels.call import KernelCall
from weft_attn.kernels.hopper.tiles import product_layout, write_rows
from weft_attn.kernels.matrix import Outcome, Variant, call_of, compile_variant, outcome_of, variants
from weft_attn.kernels.offline import Compiled, compile_call
from weft_attn.launch.config import (
    CONFIGS,
    WIDEST_NARROW,
    DeltaConfig,
    ForwardConfig,
    HopperBackwardConfig,
    HopperBackwardDqConfig,
    HopperConfig,
    HopperForwardConfig,
    PairedConfig,
)
from weft_attn.launch.device import TARGETS, target
from weft_attn.launch.select import tables
from weft_attn.testing.shared_memory import BYTES, NUM_WARPS, fill_call

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
HOPPER = Variant(
    "sm_90",
    "hopper_forward",
    "",
    HopperForwardConfig(block_k=128, num_warps=4, num_stages=2),
    128,
    torch.bfloat16,
    False,
    False,
)
FORWARD = Variant(
    "sm_80",
    "forward",
    "a test",
    ForwardConfig(block_q=64, block_k=32, num_warps=4, num_stages=2),
    head_dim=64,
    dtype=torch.bfloat16,
    few_rows=False,
    all_features=False,
)


@triton.jit
def adds_atomically(x_ptr, n, BLOCK: tl.constexpr):
    tl.atomic_add(x_ptr + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) < n)


# Of these PTX is read too, below.
ON_HOPPER = {
    row.config: row.head_dim
    for table in tables()
    for row in table.rows
    if isinstance(row.config, HopperForwardConfig)
    or (isinstance(row.config, HopperBackwardDqConfig) and row.config.cluster == 2)
    or (isinstance(row.config, HopperBackwardConfig) and row.head_dim <= WIDEST_NARROW)
}
# What takes longest is begun first: a process that has nothing left to do waits for the others.
QUICK = sorted(
    (v for v in variants(ARCHS, quick=True) if v.config not in ON_HOPPER), key=lambda v: not isinstance(v.config, HopperConfig)
)

ALL_FEATURES: dict[str, bool] = dict(all_features=True, in_turn=False)


def cluster_of(config: HopperConfig) -> int:
    return config.cluster if isinstance(config, PairedConfig) else 1


def test_the_tables_have_every_kind_whose_ptx_is_read() -> None:
    forwards = [config for config in ON_HOPPER if isinstance(config, HopperForwardConfig)]
    assert {(config.consumers, config.cluster) for config in forwards} == {(2, 1), (2, 2), (3, 1), (3, 2)}
    in_pairs = [config for config in ON_HOPPER if isinstance(config, PairedConfig) and config.cluster == 2]
    assert {type(config) for config in in_pairs} == {HopperForwardConfig, HopperBackwardDqConfig}
    assert HopperBackwardConfig in {type(config) for config in ON_HOPPER}


@pytest.mark.parametrize(
    "config", ON_HOPPER, ids=lambda config: f"{config.kernel}-{ON_HOPPER[config]}-{config.cut[0]}-{cluster_of(config)}"
)
def test_what_the_kernels_say_in_ptx_is_what_they_mean(config: HopperConfig) -> None:
    """Barriers of their own, registers of their own, parameters by name: the compiler knows nothing of them."""
    others = [{}]
    if config.cut[0] == 192:
        # Three consumers have the least room for anything: what is used most, too.
        others.append(dict(all_features=False))
    if isinstance(config, HopperBackwardConfig):
        others.append(dict(in_turn=True))
    for other in others:
        variant = replace(HOPPER, kernel=config.kernel, config=config, head_dim=ON_HOPPER[config], **(ALL_FEATURES | other))
        call = call_of(variant)
        compiled = compile_call(call, "sm_90")
        assert outcome_of(variant, compiled).faults(MAX_SPILL) == []
        # A persistent grid counts its items, by rows in two places, and the programs that are done; in turn each program's first item, too.
        assert compiled.atomics == (2 if isinstance(config, HopperBackwardConfig) and not variant.in_turn else 3)
        if isinstance(config, HopperForwardConfig):
            check_votes(config, compiled.assembly)
            if config.consumers == 3:
                check_turns(compiled)
                check_holds(variant.all_features, compiled)
        if cluster_of(config) == 2:
            check_fetches(config, call, compiled)
            check_waits(config.cut[0] // 64, compiled.assembly)
        if isinstance(config, HopperBackwardConfig):
            check_arrivals(config, variant.in_turn, compiled.assembly)


@pytest.mark.parametrize("variant", QUICK, ids=lambda variant: f"{variant.arch}-{variant.kernel}")
def test_what_selection_gives_compiles_for_every_target_within_bounds(
    variant: Variant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What `weft compile --quick` does, where the tests are: a process for each would begin with importing torch. With the test before it is
    all of it.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compile_variant(variant).faults(MAX_SPILL) == []


def check_arrivals(config: HopperBackwardConfig, in_turn: bool, assembly: str) -> None:
    """Barriers that count warps have as many arrivals as their readers and writers have warps, and each warp arrives once."""
    counts = Counter(int(count) for count in re.findall(r"mbarrier\.init\.shared::cta\.b64 \[[^]]+\], (\d+);", assembly))
    # Of the queries' slots and of dS, what two consumers arrive at; of dS, what one does. In turn four partitions hear of each item.
    assert (counts[8], counts[4]) == (config.num_stages + 3, 3 + (4 if in_turn else 0))
    # Two consumers fill and release in edge and in interior tiles; the third releases there.
    alone = r"bar\.warp\.sync 0xffffffff; elect\.sync _\|leader, 0xffffffff; @leader mbarrier\.arrive\.shared::cta\.b64 _, \["
    assert len(re.findall(alone, assembly)) == 2 * 2 * 2 + 2


def check_turns(compiled: Compiled) -> None:
    """Three consumers pass turns on, and spill little: what is timed is compiled by 3.6, newer assemblers copy packed weights (docs/adr/0033)."""
    assert compiled.spilled_bytes <= (24 if triton.__version__.startswith("3.6.") else 176)
    held = {("8", "32"), ("9", "32")}
    told = [
        (operation, barrier, threads)
        for operation, barrier, threads in re.findall(r"barrier\.(sync|arrive)\.aligned (\d+), (\d+);", compiled.assembly)
        if (barrier, threads) not in held
    ]
    assert {(barrier, threads) for _, barrier, threads in told} == {("13", "256"), ("14", "256"), ("15", "256")}
    # Edge tiles and interior tiles of each; the last one begins the first round, whose first one ends the last.
    assert Counter((operation, barrier) for operation, barrier, _ in told) == Counter(
        {
            (operation, barrier): 3 if barrier == "13" else 2
            for operation in ("sync", "arrive")
            for barrier in ("13", "14", "15")
        }
    )
    turns = [(int(a), int(b)) for (one, a, _), (two, b, _) in pairwise(told) if (one, two) == ("sync", "arrive")]
    assert len(turns) >= 6
    assert all(to == 13 + (by - 13 + 1) % 3 for by, to in turns), "to the one after"
    others = set(re.findall(r"(?:bar|barrier)\.sync\s+(\d+)", compiled.assembly))
    assert not others & {"13", "14", "15"}


def check_holds(caps_scores: bool, compiled: Compiled) -> None:
    """Three consumers wait for the product with V behind the first half of their weights, in edge and in interior tiles, and so does the
    machine; what 3.6 compiles, which is timed, packs weights among the second half's exponentials (docs/adr/0037).
    """
    told = re.findall(r"(@!?)some barrier\.arrive\.aligned (\d+), (\d+);", compiled.assembly)
    assert told == 2 * 3 * [("@", "8", "32"), ("@!", "9", "32")]
    named = Counter(re.findall(r"\b(?:bar|barrier)\.[.\w]+\s+(?:weft_vote_\d, )?(\d+)", compiled.assembly))
    assert (named["8"], named["9"]) == (6, 6), "nobody else's"
    # From the wait for scores to that for the product with V, and on to the vote: each consumer's two streams.
    until_values = r"WARPGROUP\.DEPBAR\.LE gsb0, 0x2 ;((?:(?!WARPGROUP\.DEPBAR).)*)WARPGROUP\.DEPBAR\.LE gsb0, 0x0 ;"
    found = re.findall(until_values + r"((?:(?!HGMMA).)*?)BAR\.RED", compiled.machine_code, re.DOTALL)
    assert len(found) == 2 * 3
    for before, behind in found:
        # 128 keys of 64 rows are 64 weights a thread, and to cap its score takes an exponential, too.
        each = 2 if caps_scores else 1
        exponentials = before.count("MUFU.EX2")
        assert exponentials >= 32 * each
        assert re.search(r"BAR\.ARV 0x8, 0x20 .*BAR\.ARV 0x9, 0x20 ", before, re.DOTALL)
        if triton.__version__.startswith("3.6."):
            # Newer assemblers bring arithmetic before the place that it stands behind.
            assert exponentials < 64 * each
            assert (before.count("F2FP"), behind.count("F2FP")) == (0, 32)


def check_waits(consumers: int, assembly: str) -> None:
    """Of programs in pairs, three consumers wait for tiles warp by warp, and warps do not meet from a wait to its product; two as Gluon waits."""
    waits = re.findall(r"again: mbarrier\.try_wait((?:(?!again: mbarrier\.try_wait).)*?)wgmma\.mma_async", assembly, re.DOTALL)
    # Of each consumer: for keys and for values, in an item's first tile and its last, in edge and in interior tiles.
    assert len(waits) == (6 * 3 if consumers == 3 else 0)
    assert not any("bar.sync" in text for text in waits)


def check_votes(config: HopperForwardConfig, text: str) -> None:
    """Consumers vote, each at a barrier and in a register of its own."""
    consumers = config.consumers
    voters = [str(consumer) for consumer in range(consumers)]
    assert sorted(re.findall(r"\.reg \.pred weft_vote_(\d);", text)) == voters, "each is declared once"
    votes = re.findall(r"barrier\.red\.or\.pred\.aligned weft_vote_(\d), (\d+), (\d+), mine;", text)
    assert Counter(votes) == {(c, str(16 - 2 * consumers + int(c)), "128"): 2 for c in voters}, (
        "at edge tiles and at interior ones"
    )
    # Each is read where it was written, before anything else is voted on.
    order = re.findall(r"\b(red|selp)\.[^;]*weft_vote_(\d)", text)
    assert order == [(what, c) for c, _, _ in votes for what in ("red", "selp")]
    others = set(re.findall(r"\b(?:bar|barrier)(?:\.cta)?\.(?:sync|arrive)\S*\s+(\w+)", text))
    assert others, "Triton's, and those of turns"
    assert others <= {str(barrier) for barrier in range(16)}, "by number"
    assert not {barrier for _, barrier, _ in votes} & others


def check_fetches(config: HopperConfig, call: KernelCall, compiled: Compiled) -> None:
    """Pairs fetch the tiles of K and V for both: what PTX says by name is what the kernel's arguments are."""
    assert call.cluster == 2
    text = compiled.assembly
    descriptors = [name for name in call.kernel.arg_names if name.endswith("_desc")]
    assert call.kernel.arg_names[: len(descriptors)] == descriptors, "parameters are counted from the first on"
    sizes = dict(re.findall(r"\.param (?:\.align 64 )?\.(?:b8|u\d+) (\w+)(?:\[(\d+)\])?[,\n]", text))
    fetched = re.findall(r"mov\.b64 desc, (\w+);.*?(cp\.async\.bulk\.tensor\S*)", text)
    assert {instruction for _, instruction in fetched} == {
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
    }
    named = Counter(parameter for parameter, _ in fetched)
    assert set(named) == {f"{call.kernel.__name__}_param_{5 * descriptors.index(name)}" for name in ("k_desc", "v_desc")}
    assert all(sizes[parameter] == "128" for parameter in named), "a descriptor, and nothing else, has 128 bytes"
    # Each box of 64 columns, of the stream of edge tiles and of that of interior ones.
    assert set(named.values()) == {2 * ON_HOPPER[config] // 64}
    # Triton fetches those before them: q, and what dQ needs beside it.
    of_triton = set(re.findall(r"complete_tx::bytes \[[^\]]*\], \[(%rd\d+)", text))
    assert len(of_triton) == descriptors.index("k_desc")
    # Every role meets the other program's before its first word and after its last, those of idle warps too. (In PTX, equal code may
    # have become one.)
    roles = config.cut[0] // 64 + 1 + 2
    assert compiled.dialect.count("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;") == 2 * roles


def test_several_targets_after_one_option_and_repeated_options_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["compile", "--quick", "--kernel", "delta", "--workers", "1", "--arch", "sm_80", "sm_90", "--arch", "gfx942"])
    assert end.value.code == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if " delta " in line] == [
        [arch, "delta"] for arch in ("sm_80", "gfx942", "sm_90")
    ]


@pytest.mark.parametrize("arch", TARGETS)
def test_every_row_of_a_targets_tables_is_compiled(arch: str) -> None:
    compiled = {(v.kernel, v.config, v.few_rows) for v in variants([arch])}
    for table in tables():
        for row in table.rows if table.arch == arch else ():
            choices = [row.config]
            if getattr(row.config, "use_tma", False):
                choices.append(replace(row.config, use_tma=False))
            assert any((row.config.kernel, config, row.few_rows > 0) in compiled for config in choices), (table.name, row)


def test_variants_cover_kernels_dtypes_features_and_ragged_heads() -> None:
    found = variants(["sm_80"])
    portable = {kernel for kernel, config in CONFIGS.items() if not issubclass(config, HopperConfig)}
    assert {v.kernel for v in found} == portable
    assert {v.kernel for v in variants(["sm_90"])} == set(CONFIGS)
    assert {v.dtype for v in found} == {torch.bfloat16, torch.float16, torch.float32}
    for kernel in portable:
        of_kernel = [v for v in found if v.kernel == kernel]
        assert {v.all_features for v in of_kernel} == {False, True}
        assert any(v.head_dim & (v.head_dim - 1) for v in of_kernel)
    assert any(v.few_rows for v in found)
    assert {v.head_dim for v in variants(["sm_80"], head_dim=72)} == {72}


def test_help_says_which_head_dims_quick_compiles(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main(["compile", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"head dim {matrix.QUICK_HEAD_DIM}, and the forward of {matrix.QUICK_RAGGED}." in said


@pytest.mark.parametrize(("arch", "dim", "runs"), [("sm_90", 128, True), ("sm_90", 80, False), ("sm_80", 128, False)])
def test_the_end_of_a_fused_backward_is_compiled_where_there_is_one(arch: str, dim: int, runs: bool) -> None:
    kernels = {variant.kernel for variant in variants([arch], head_dim=dim, quick=True)}
    assert ("finish_dq" in kernels) is ("hopper_backward" in kernels) is runs


@pytest.mark.parametrize("kernel", ["forward", "backward_dkdv", "backward_dq", "delta"])
def test_heads_of_any_multiple_of_eight_dims_are_read_16_bytes_at_a_time(kernel: str) -> None:
    """Two bytes at a time take eight times the instructions, and so many registers that they spill."""
    (variant,) = [v for v in variants(["sm_80"], kernels=[kernel], head_dim=72, quick=True) if not v.few_rows]
    loads = re.findall(r"ld\.global\S*", compile_call(call_of(variant), "sm_80").assembly)
    assert loads
    assert not [load for load in loads if load.endswith("b16")]


def test_only_what_the_target_holds_is_compiled() -> None:
    from weft_attn.launch.resources import shortfall

    for variant in variants(["sm_86", "gfx942"]):
        assert not shortfall(variant.config, variant.shape, target(variant.arch))


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome(FORWARD, error="CompilationError: no"), "CompilationError: no"),
        (Outcome(FORWARD, spilled_bytes=MAX_SPILL + 4), "spills 516 bytes"),
        (Outcome(FORWARD, shared_memory=target("sm_80").shared_memory + 1), "bytes of shared memory of 166912"),
        (Outcome(FORWARD, shared_memory=Outcome(FORWARD).shared_memory_bound + 1), "computed bound"),
        (Outcome(FORWARD, atomics=2), "2 atomics"),
        (Outcome(HOPPER, atomics=4), "4 atomics, expected at most 3"),
        (Outcome(HOPPER, added_waits=3), "+3 places"),
        (Outcome(HOPPER, added_waits=-1), "-1 places"),
    ],
)
def test_each_fault_is_found(outcome: Outcome, fault: str) -> None:
    assert any(fault in found for found in outcome.faults(MAX_SPILL))


def test_a_sound_kernel_has_no_fault_and_says_what_it_needs() -> None:
    outcome = compile_variant(FORWARD)
    assert outcome.faults(MAX_SPILL) == []
    assert 32 <= (outcome.registers or 0) <= 255
    # Q stays in shared memory or registers; two stages of K and V tiles do not fit registers.
    assert outcome.shared_memory >= 2 * 2 * 32 * 64 * 2


def test_a_config_that_drowns_in_registers_is_caught() -> None:
    drowning = ForwardConfig(block_q=128, block_k=32, num_warps=1, num_stages=1)
    faults = compile_variant(replace(FORWARD, config=drowning)).faults(MAX_SPILL)
    assert any("spills" in fault for fault in faults)


def test_what_the_compiler_raises_is_an_outcome() -> None:
    config = ForwardConfig(block_q=64, block_k=32, num_warps=4, num_stages=2)
    # Tiles are powers of two: a config refuses to hold another, and Triton to compile it.
    object.__setattr__(config, "block_k", 48)
    outcome = compile_variant(replace(FORWARD, config=config))
    assert "power of 2" in outcome.error
    assert outcome.faults(MAX_SPILL) == [outcome.error]


def test_what_leaves_nan_in_shared_memory_writes_all_that_it_takes() -> None:
    compiled = compile_call(fill_call(torch.empty(132, 3, device="meta"), float("nan")), "sm_90")
    assert compiled.shared_memory == BYTES
    # 16 bytes a thread, and none of them left out.
    assert compiled.assembly.count("st.shared.v4") * 16 * 32 * NUM_WARPS == BYTES


@gluon.jit
def writes_rows(values_ptr, rows_ptr, stride_row, n_rows, COLUMNS: gl.constexpr):
    product: gl.constexpr = product_layout(COLUMNS)
    rows = gl.arange(0, 64, gl.SliceLayout(1, product))[:, None]
    tile = gl.load(values_ptr + rows * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, product))[None, :])
    write_rows(rows_ptr, stride_row, tile, 0, n_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [64, 128])
def test_rows_of_gradients_leave_sixteen_bytes_a_thread_without_shared_memory(columns: int, dtype: torch.dtype) -> None:
    values = torch.empty(64, columns, device="meta")
    rows = torch.empty(640, 8, columns, dtype=dtype, device="meta")
    arguments = dict(values_ptr=values, rows_ptr=rows, stride_row=rows.stride(0), n_rows=60)
    compiled = compile_call(KernelCall(writes_rows, (1,), arguments, dict(COLUMNS=columns), num_warps=4, num_stages=1), "sm_90")
    assert compiled.shared_memory == 0
    assert compiled.assembly.count("st.global.v4") * 16 * 128 == 64 * columns * dtype.itemsize
    assert compiled.assembly.count("st.global") == compiled.assembly.count("st.global.v4")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_an_atomic_in_the_machine_code_is_counted(arch: str) -> None:
    call = KernelCall(
        adds_atomically, (1,), dict(x_ptr=torch.empty(64, device="meta"), n=60), dict(BLOCK=64), num_warps=4, num_stages=1
    )
    assert compile_call(call, arch).atomics > 0


def test_one_fault_makes_the_command_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    delta = replace(FORWARD, kernel="delta", config=DeltaConfig(num_warps=4, num_stages=1))
    outcomes = [Outcome(delta, registers=40), Outcome(delta, registers=40, atomics=1)]
    monkeypatch.setattr(matrix, "variants", lambda *args, **kwargs: [delta, delta])
    monkeypatch.setattr(matrix, "compile_all", lambda *args: iter(outcomes))
    with pytest.raises(SystemExit) as end:
        main(["compile", "--arch", "sm_80"])
    assert end.value.code == 1
    text = capsys.readouterr().out
    assert "holds 1 atomics" in text
    assert "1 of 2 variants compile and fit" in text


def test_bad_requests_are_refused() -> None:
    with pytest.raises(Unsupported, match="sm_99"):
        variants(["sm_90", "sm_99"])
    with pytest.raises(InvalidInput, match="backward_dv"):
        variants(["sm_90"], kernels=["backward_dv"])
    with pytest.raises(InvalidInput, match="multiple of 8"):
        variants(["sm_90"], head_dim=100)


def test_an_unknown_target_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["compile", "--arch", "sm_99"])
    assert end.value.code == 2
    assert "sm_99" in capsys.readouterr().err


def test_an_interpreting_triton_is_refused(weft: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = weft("compile", "--quick", "--arch", "sm_80", interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
