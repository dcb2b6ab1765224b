"""Which config a kernel runs with: the order of the tables, overrides, and refusals."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from weft_attn import Unsupported, launch, ops
from weft_attn.launch import (
    BackwardDkdvConfig,
    BackwardDqConfig,
    DeltaConfig,
    ForwardConfig,
    HopperBackwardDqConfig,
    HopperForwardConfig,
    InvalidConfig,
    override,
)
from weft_attn.launch import select as select_module
from weft_attn.launch.config import CONFIGS, HopperConfig, PairedConfig, StreamConfig
from weft_attn.launch.device import INTERPRETER, TARGETS, Device, target
from weft_attn.launch.resources import shared_memory, shortfall
from weft_attn.launch.select import (
    DKDV_KERNELS,
    DQ_KERNELS,
    FORWARD_KERNELS,
    FUSED_KERNEL,
    MANY_ROWS,
    Choice,
    Problem,
    Row,
    Table,
    current_overrides,
    parse_table,
    programs_of,
    select,
    select_first,
    select_fused,
    tables,
    tma_usable,
)
from weft_attn.launch.splits import cut_forward, heads_per_wave, last_heads
from weft_attn.plan import Plan
from weft_attn.plan.stream import Tiling, device_stream

H200 = Device("NVIDIA H200", "sm_90", 132, 227 * 1024)
SMALL = Device("Tiny", "sm_99", 4, 16 * 1024)
PROBLEM = Problem(128, 128, 16)


def table(name: str, match: str, *forwards: str) -> Table:
    rows = "\n".join(f"[[forward]]\nhead_dim = 256\ndtype_bits = 16\nnum_warps = 4\nnum_stages = 1\n{f}" for f in forwards)
    return parse_table(name, f"[match]\n{match}\n{rows}")


ANY = table("any", 'arch = "any"', "block_q = 64\nblock_k = 32", "block_q = 128\nblock_k = 64", "block_q = 16\nblock_k = 16")
ARCH = table("sm_90", 'arch = "sm_90"', "block_q = 32\nblock_k = 16")
DEVICE = table("h200", 'arch = "sm_90"\ndevice = "H200"', "block_q = 64\nblock_k = 16")


def forget_searches() -> None:
    select_module._search_rows.cache_clear()
    select_module._key_numbers.cache_clear()


@pytest.fixture
def use_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    forget_searches()
    monkeypatch.setattr(select_module, "tables", lambda: (ANY, ARCH, DEVICE))
    yield monkeypatch
    monkeypatch.undo()
    forget_searches()


def forward(block_q: int = 64, block_k: int = 32, **more: object) -> ForwardConfig:
    return ForwardConfig(**{"block_q": block_q, "block_k": block_k, "num_warps": 4, "num_stages": 1, **more})  # type: ignore[arg-type]


def tile(problem: Problem, device: Device) -> tuple[int, int]:
    config = select("forward", problem, device).config
    assert isinstance(config, ForwardConfig)
    return config.block_q, config.block_k


def test_the_device_comes_before_its_architecture_and_that_before_the_default(use_tables: pytest.MonkeyPatch) -> None:
    assert tile(PROBLEM, H200) == (64, 16)
    assert "device table h200" in select("forward", PROBLEM, H200).source
    assert tile(PROBLEM, Device("NVIDIA H100", "sm_90", 132, 227 * 1024)) == (32, 16)
    with override(forward(16, 16)):
        assert select("forward", PROBLEM, H200).source == "override"
        assert tile(PROBLEM, H200) == (16, 16)


def test_an_unknown_gpu_gets_the_largest_default_that_fits(use_tables: pytest.MonkeyPatch) -> None:
    assert tile(PROBLEM, Device("Unknown", "sm_99", 100, 227 * 1024)) == (128, 64)
    assert tile(PROBLEM, Device("Unknown", "sm_99", 100, 64 * 1024)) == (64, 32)
    assert tile(PROBLEM, SMALL) == (16, 16)


def test_a_row_that_does_not_fit_is_passed_over(use_tables: pytest.MonkeyPatch) -> None:
    cramped = Device("NVIDIA H200 slice", "sm_90", 16, 24 * 1024)
    assert tile(PROBLEM, cramped) == (32, 16)


def test_nothing_that_fits_is_an_error_that_says_what_was_tried(use_tables: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match=r"forward config fits None .*128/128, 16-bit: expected .* given .*shared memory"):
        select("forward", PROBLEM, Device("None", "sm_99", 1, 1024))
    with pytest.raises(Unsupported, match="no row"):
        select("backward_dq", PROBLEM, H200)


def test_the_tightest_row_that_holds_the_head_dim_serves(use_tables: pytest.MonkeyPatch) -> None:
    text = "[match]\narch = 'sm_90'\n" + "\n".join(
        f"[[forward]]\nhead_dim = {d}\ndtype_bits = 16\nblock_q = {b}\nblock_k = 16\nnum_warps = 4\nnum_stages = 1"
        for d, b in ((256, 16), (64, 64), (128, 32))
    )
    use_tables.setattr(select_module, "tables", lambda: (ANY, parse_table("sm_90", text)))
    found = {d: tile(Problem(d, dv, 16), H200)[0] for d, dv in ((64, 64), (72, 64), (128, 8), (136, 16), (256, 256))}
    assert found == {64: 64, 72: 32, 128: 32, 136: 16, 256: 16}
    assert tile(Problem(8, 200, 16), H200)[0] == 16, "the wider of D and Dv counts"


def test_few_rows_have_rows_of_their_own(use_tables: pytest.MonkeyPatch) -> None:
    text = "[match]\narch = 'sm_90'\n" + "\n".join(
        f"[[forward]]\nfew_rows = {f}\nhead_dim = 256\ndtype_bits = 16\nblock_q = {b}\nblock_k = 16\nnum_warps = 4\nnum_stages = 1"
        for f, b in ((MANY_ROWS, 128), (16, 16), (64, 64))
    )
    use_tables.setattr(select_module, "tables", lambda: (ANY, parse_table("sm_90", text)))
    found = {n: tile(Problem(128, 128, 16, few_rows=n), H200)[0] for n in (MANY_ROWS, 1, 16, 17, 64, 500)}
    assert found == {MANY_ROWS: 128, 1: 16, 16: 16, 17: 64, 64: 64, 500: 64}


def test_a_table_that_names_what_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"expected .*forward.* given 'sideways'"):
        parse_table("x", "[match]\narch = 'sm_90'\n[[sideways]]\nnum_warps = 4")
    with pytest.raises(TypeError, match="blok_q"):
        table("x", "arch = 'any'", "block_q = 16\nblock_k = 16\nblok_q = 16")


# ---- overrides ------------------------------------------------------------------------------------------------------------


def test_an_override_ends_with_its_scope_and_scopes_nest() -> None:
    assert current_overrides() == ()
    dq = BackwardDqConfig(block_q=16, block_k=16, num_warps=4, num_stages=1)
    with override(forward(16, 16)):
        with override(forward(32, 16), dq):
            assert set(current_overrides()) == {forward(32, 16), dq}
            assert select("backward_dq", PROBLEM, INTERPRETER).config == dq
        assert current_overrides() == (forward(16, 16),)
        with pytest.raises(RuntimeError), override(forward(64, 16)):
            raise RuntimeError
        assert current_overrides() == (forward(16, 16),)
    assert current_overrides() == ()


def test_an_override_reaches_the_threads_that_autograd_runs_a_backward_on() -> None:
    seen = []
    dkdv = BackwardDkdvConfig(block_q=16, block_k=16, num_warps=4, num_stages=1)
    with override(dkdv):
        thread = threading.Thread(target=lambda: seen.append(select("backward_dkdv", PROBLEM, INTERPRETER)))
        thread.start()
        thread.join()
    assert [choice.config for choice in seen] == [dkdv]


def test_an_override_takes_one_config_per_kernel() -> None:
    for configs in ((forward(), forward()), ("forward",), (None,)):
        with pytest.raises(InvalidConfig, match=r"expected distinct configs, given"), override(*configs):  # type: ignore[arg-type]
            pass
    assert current_overrides() == ()


def test_an_override_that_does_not_fit_is_refused_and_not_replaced() -> None:
    with override(forward(512, 512)), pytest.raises(InvalidConfig, match=r"shared memory.*given ForwardConfig"):
        select("forward", PROBLEM, H200)
    with override(forward(128, 128, num_warps=1)), pytest.raises(InvalidConfig, match=r"registers.*given ForwardConfig"):
        select("forward", Problem(64, 64, 16), H200)


@pytest.mark.parametrize(
    ("problem", "device"),
    [
        (Problem(128, 128, 16), TARGETS["sm_80"]),
        (Problem(128, 128, 16), TARGETS["gfx942"]),
        (Problem(128, 128, 16), INTERPRETER),
        (Problem(80, 128, 16), H200),
        (Problem(128, 24, 16), H200),
        (Problem(8, 8, 16), H200),
        (Problem(128, 128, 16, tma_possible=False), H200),
    ],
)
def test_the_copy_engine_is_not_used_where_it_cannot_be(problem: Problem, device: Device) -> None:
    assert not tma_usable(problem, device)
    with override(forward(use_tma=True)), pytest.raises(InvalidConfig, match=r"use_tma=False.*given ForwardConfig"):
        select("forward", problem, device)


def test_a_table_row_falls_back_to_pointers_and_says_so(use_tables: pytest.MonkeyPatch) -> None:
    row = table("sm_90", 'arch = "sm_90"', "block_q = 64\nblock_k = 64\nuse_tma = true")
    use_tables.setattr(select_module, "tables", lambda: (ANY, row))
    described = select("forward", Problem(128, 128, 16), H200)
    assert isinstance(described.config, StreamConfig)
    assert described.config.use_tma
    plain = select("forward", Problem(80, 80, 16), H200)
    assert isinstance(plain.config, StreamConfig)
    assert not plain.config.use_tma
    assert "pointers" in plain.note


# ---- configs and the package's tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"block_q": 24}, {"block_q": 8}, {"block_k": 0}, {"block_k": 16.0}, {"num_warps": 3}, {"num_warps": 0}, {"num_stages": 0}]
    + [{"num_stages": 9}, {"cache_modifier": ".wb"}, {"cache_modifier": None}],
    ids=str,
)
def test_a_config_that_breaks_a_rule_of_its_own_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidConfig, match=r"expected .*given"):
        forward(**wrong)  # type: ignore[arg-type]


def test_a_config_is_frozen_and_a_dictionary_key() -> None:
    assert {forward(): 1}[forward()] == 1
    with pytest.raises(AttributeError):
        forward().block_q = 32  # type: ignore[misc]


def test_the_packages_tables_parse_and_name_their_match() -> None:
    assert "any" in {t.arch for t in tables()}
    for found in tables():
        assert found.arch == "any" or found.arch in TARGETS, found.name
        assert found.rows, found.name
        for row in found.rows:
            assert row.table == found.name
            assert row.config.kernel in CONFIGS


def test_the_names_of_the_launch_package_are_its_configs() -> None:
    assert {c.__name__ for c in CONFIGS.values()} <= set(launch.__all__)


def test_an_unknown_target_is_refused() -> None:
    assert target("sm_90").arch == "sm_90"
    with pytest.raises(Unsupported, match=r"expected one of .*sm_90.*given 'sm_70'"):
        target("sm_70")


# ---- Hopper's kernels -------------------------------------------------------------------------------------------------------

HOPPER = HopperForwardConfig(block_k=64, num_warps=4, num_stages=2)


@pytest.mark.parametrize("kernels", [FORWARD_KERNELS, DKDV_KERNELS, DQ_KERNELS])
def test_hopper_kernels_are_preferred_where_a_row_serves_and_only_there(kernels: tuple[str, ...]) -> None:
    hopper, portable = kernels
    assert select_first(kernels, PROBLEM, H200).config.kernel == hopper
    assert select_first(kernels, PROBLEM, Device("NVIDIA H100", "sm_90", 132, 227 * 1024)).config.kernel == hopper
    for problem in (
        Problem(128, 64, 16),
        Problem(96, 96, 16),
        Problem(128, 128, 32),
        Problem(128, 128, 16, tma_possible=False),
        Problem(32, 32, 16),
    ):
        assert select_first(kernels, problem, H200).config.kernel == portable, problem
    for other in (
        target("sm_80"),
        target("sm_100"),
        target("gfx942"),
        replace(INTERPRETER, arch="sm_90", shared_memory=227 * 1024),
    ):
        assert select_first(kernels, PROBLEM, other).config.kernel == portable, other


def test_an_override_of_either_forward_is_what_runs() -> None:
    with override(forward(16, 16)):
        assert select_first(FORWARD_KERNELS, PROBLEM, H200).config == forward(16, 16)
    with override(HOPPER):
        assert select_first(FORWARD_KERNELS, PROBLEM, H200).config == HOPPER


@pytest.mark.parametrize(
    ("problem", "device"),
    [(Problem(128, 128, 32), H200), (Problem(128, 64, 16), H200), (PROBLEM, target("sm_80")), (Problem(96, 96, 16), H200)],
)
def test_a_hopper_override_that_cannot_serve_is_refused(problem: Problem, device: Device) -> None:
    with override(HOPPER), pytest.raises(InvalidConfig, match=r"expected 16-bit tensors .*sm_90; given"):
        select_first(FORWARD_KERNELS, problem, device)


def test_the_hopper_forward_needs_a_machine_full_of_items() -> None:
    many, few = Plan.dense(1, 128 * 8, 1024), Plan.dense(1, 128, 65536)
    assert isinstance(cut_forward(many, 32, 8, PROBLEM, H200).config, HopperForwardConfig)
    cut = cut_forward(few, 32, 8, PROBLEM, H200)
    assert isinstance(cut.config, ForwardConfig)
    assert cut.tiling.max_tiles is not None


# ---- how a forward is cut -------------------------------------------------------------------------------------------------


def cut(plan: Plan, heads: int, kv_heads: int, device: Device = H200) -> tuple[int, int | None]:
    found = cut_forward(plan, heads, kv_heads, PROBLEM, device)
    assert found.tiling.block_cols == found.config.block_k
    assert found.tiling.rows_per_tile == found.config.block_q // found.pack
    return found.pack, found.tiling.max_tiles


def test_many_rows_are_neither_packed_nor_split() -> None:
    with override(forward(128, 64)):
        assert cut(Plan.dense(1, 8192, 8192, causal=True), 32, 8) == (1, None)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "pack"), [(32, 8, 4), (32, 4, 8), (16, 1, 16), (32, 1, 16), (12, 2, 6), (8, 8, 1)]
)
def test_few_rows_pack_the_query_heads_of_a_kv_head_and_split_the_keys(heads: int, kv_heads: int, pack: int) -> None:
    with override(forward(16, 64)):
        found, max_tiles = cut(Plan.dense(1, 1, 131072), heads, kv_heads)
        assert found == pack
        assert max_tiles is not None
        programs = -(-2048 // max_tiles) * heads // pack
        assert programs >= 0.5 * H200.multiprocessors


def test_a_pack_divides_the_group_and_fits_the_tile() -> None:
    with override(forward(16, 64)):
        assert cut(Plan.dense(1, 1, 4096), 24, 1)[0] == 12


def test_few_keys_are_not_split_into_crumbs() -> None:
    with override(forward(16, 64)):
        assert cut(Plan.dense(1, 1, 64 * 8), 8, 8)[1] == 4


def test_a_wave_holds_at_least_one_head_and_at_most_all() -> None:
    assert heads_per_wave(100, 10, 8) == 1
    assert heads_per_wave(10, 35, 8) == 3
    assert heads_per_wave(10, 1000, 8) == 8
    assert heads_per_wave(1, 100, 8) == 8
    assert heads_per_wave(0, 100, 8) == 8


def test_the_last_wave_lasts_as_long_as_its_longest_item() -> None:
    causal = device_stream(Plan.dense(1, 16384, 16384, causal=True), Tiling(128, 64, transposed=True), torch.device("cpu"))
    # The longest of 128 items is twice the mean: a head's items on 132 multiprocessors take half as long as that one.
    assert last_heads(causal, 132, 8) == 3
    assert last_heads(causal, 132, 2) == 2
    assert last_heads(device_stream(Plan([], 10, 0), Tiling(128, 64), torch.device("cpu")), 132, 8) == 0


def seen(problem: Problem, keys: float) -> Problem:
    return replace(problem, keys_per_query=keys)


def test_hoppers_rows_and_their_records_are_the_same_for_the_h200_and_for_any_hopper_gpu() -> None:
    found = {
        one.name: [(replace(row, table=""), row.measured) for row in one.rows if isinstance(row.config, HopperConfig)]
        for one in tables()
        if one.name in ("h200", "sm_90")
    }
    assert len(found["h200"]) > 10
    assert found["h200"] == found["sm_90"]


def rows_of(kernel: str) -> list[Row]:
    return [row for one in tables() if one.name == "h200" for row in one.rows if row.config.kernel == kernel]


def test_the_fused_backward_serves_long_rows_unless_another_kernel_is_asked_for() -> None:
    least = next(row.least_keys for row in rows_of(FUSED_KERNEL) if row.head_dim == 128)
    long, short = seen(PROBLEM, least), seen(PROBLEM, least - 0.1)
    fused = select_fused(long, H200)
    assert fused is not None
    assert fused.config.kernel == FUSED_KERNEL
    assert select_fused(short, H200) is None
    assert select_fused(long, target("sm_80")) is None
    assert select_fused(Problem(96, 96, 16), H200) is None
    for kernels in (DKDV_KERNELS, DQ_KERNELS):
        for kernel in kernels:
            with override(select(kernel, PROBLEM, H200).config):
                assert select_fused(long, H200) is None, kernel
    with override(fused.config):
        assert select_fused(short, H200) == Choice(fused.config, "override")
        with pytest.raises(InvalidConfig):
            select_fused(long, target("sm_80"))


def test_a_row_serves_queries_that_see_so_many_keys_and_the_one_of_most_keys_is_taken(use_tables: pytest.MonkeyPatch) -> None:
    rows = table(
        "sm_90", 'arch = "sm_90"', "block_q = 16\nblock_k = 16", "block_q = 64\nblock_k = 16\nleast_keys = 100",
        "block_q = 32\nblock_k = 16\nleast_keys = 10",
    )  # fmt: skip
    use_tables.setattr(select_module, "tables", lambda: (ANY, rows))
    found = [tile(seen(PROBLEM, keys), H200)[0] for keys in (0, 9.9, 10, 99.5, 100, 1e9, float("inf"))]
    assert found == [16, 16, 32, 32, 64, 64, 64]
    before = select_module._search_rows.cache_info().misses
    tile(seen(PROBLEM, 42.5), H200)
    assert select_module._search_rows.cache_info().misses == before, "no search for what no row tells apart"


def test_few_rows_too_are_served_by_the_keys_that_they_see(use_tables: pytest.MonkeyPatch) -> None:
    rows = table(
        "sm_90", 'arch = "sm_90"', "block_q = 64\nblock_k = 64", "few_rows = 16\nblock_q = 16\nblock_k = 16",
        "few_rows = 16\nblock_q = 16\nblock_k = 64\nleast_keys = 10000",
    )  # fmt: skip
    use_tables.setattr(select_module, "tables", lambda: (ANY, rows))
    for keys, block_k in ((5000, 16), (20000, 64)):
        plan = Plan.dense(1, 1, keys)
        assert cut_forward(plan, 8, 2, seen(PROBLEM, plan.keys_per_query), H200).config.block_k == block_k


def test_three_consumers_serve_long_rows_that_fill_their_items() -> None:
    problem = Problem(64, 64, 16)

    def consumers(plan: Plan, heads: int = 32) -> int:
        cut = cut_forward(plan, heads, heads // 4, seen(problem, plan.keys_per_query), H200)
        config = cut.config
        assert isinstance(config, HopperForwardConfig), "not the portable kernel for want of items"
        assert ("192 rows" in cut.choice.note) == (config.consumers == 2 and plan.keys_per_query >= 4096)
        assert config.cut[0] == 64 * config.consumers
        return config.consumers

    assert consumers(Plan.dense(1, 16384, 16384, causal=True)) == 3
    assert consumers(Plan.dense(4, 4096, 4096, causal=True)) == 2, "few keys"
    assert consumers(Plan.zigzag([0, 65536], 3, 8)) == 3, "chunks of 4,096 rows: 3% more"
    assert consumers(Plan.dense(1, 6400, 65536)) == 3, "nine rounds of 192 rows where 13 of 128 do: 3.8% more"
    assert consumers(Plan.dense(1, 4800, 65536)) == 2, "seven where ten do: 5% more"
    # One wave of 192 rows where narrow items are one of 128, or too few of them to fill the machine.
    for heads, plan in ((8, Plan.dense(1, 2048, 16384)), (4, Plan.dense(1, 4096, 32768)), (32, Plan.dense(1, 540, 16384))):
        assert consumers(plan, heads) == 2
    # Two waves of 128 rows against as many of 192.
    assert consumers(Plan.dense(1, 8192, 32768), 4) == 2
    # Chunks of 512 rows: three items of 192 each where four of 128 are full.
    assert consumers(Plan.zigzag([0, 16384], 3, 16)) == 2
    wide = select("hopper_forward", problem, H200).config
    assert isinstance(wide, HopperForwardConfig)
    with override(wide):
        assert consumers(Plan.zigzag([0, 16384], 3, 16)) == 3, "what is asked for runs"


@pytest.mark.parametrize("consumers", [1, 4])
def test_a_forward_has_two_consumers_or_three(consumers: int) -> None:
    with pytest.raises(InvalidConfig, match=f"expected 2 or 3, given {consumers}"):
        HopperForwardConfig(block_k=64, num_warps=4, num_stages=2, consumers=consumers)


def test_delta_is_overridable_like_the_others() -> None:
    with override(DeltaConfig(block_rows=16, num_warps=1, num_stages=1)):
        assert select("delta", PROBLEM, INTERPRETER).config == DeltaConfig(block_rows=16, num_warps=1, num_stages=1)


PAIR = HopperForwardConfig(block_k=128, num_warps=4, num_stages=2, value_stages=3, cluster=2)


@pytest.mark.parametrize("kernel", ["hopper_forward", "hopper_backward_dq"])
def test_pairs_serve_groups_that_can_be_divided_among_them(kernel: str) -> None:
    clusters = {group: programs_of(select(kernel, replace(PROBLEM, group=group), H200).config) for group in (1, 2, 3, 4, 7, 8)}
    assert clusters == {1: 1, 2: 2, 3: 1, 4: 2, 7: 1, 8: 2}


def test_pairs_at_head_dim_64_serve_long_rows_alone() -> None:
    problem = Problem(64, 64, 16, group=4)
    assert [programs_of(select("hopper_forward", seen(problem, keys), H200).config) for keys in (1000, 4096)] == [1, 2]


def test_a_pair_that_cannot_divide_a_group_is_refused() -> None:
    with override(PAIR), pytest.raises(InvalidConfig, match="even number of query heads"):
        select("hopper_forward", replace(PROBLEM, group=3), H200)
    with override(PAIR):
        assert select("hopper_forward", replace(PROBLEM, group=2), H200).config == PAIR


def test_a_call_says_how_many_query_heads_a_kv_head_has() -> None:
    q, kv = torch.empty(300, 12, 128, dtype=torch.bfloat16), torch.empty(300, 4, 128, dtype=torch.bfloat16)
    plan = Plan.dense(1, 300, 300)
    assert ops.problem_of(plan, q, kv, kv).group == 3
    assert ops.execute.backward_problem(plan, q, kv, kv, q, q).group == 3


@pytest.mark.parametrize("cluster", [-1, 0, 3, 4])
@pytest.mark.parametrize(
    "config", [PAIR, HopperBackwardDqConfig(block_k=64, num_warps=4, num_stages=4)], ids=lambda c: c.kernel
)
def test_a_cluster_is_one_program_or_two(config: PairedConfig, cluster: int) -> None:
    with pytest.raises(InvalidConfig, match="one program or two"):
        replace(config, cluster=cluster)


def test_stages_of_values_are_few() -> None:
    with pytest.raises(InvalidConfig, match="value_stages"):
        replace(PAIR, value_stages=9)


def test_stages_of_values_take_their_own_shared_memory() -> None:
    shape = PROBLEM.shape
    tile = 128 * 128 * 2
    more = shared_memory(PAIR, shape, "sm_90") - shared_memory(replace(PAIR, value_stages=0), shape, "sm_90")
    assert more == tile
    assert shared_memory(replace(PAIR, value_stages=2), shape, "sm_90") == shared_memory(
        replace(PAIR, value_stages=0), shape, "sm_90"
    )
    assert "shared memory" in shortfall(replace(PAIR, num_stages=3), shape, H200)
