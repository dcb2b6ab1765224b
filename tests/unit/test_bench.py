"""What the benchmark promises: honest work counts, fair interleaving, and no figure for a wrong result."""

from __future__ import annotations

import itertools
import math
import sys
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import weft_attn as weft
from weft_attn import ops
from weft_attn.bench import ablation, cases, one_kernel, peers, records, report, run, timing, tune
from weft_attn.bench.oracle import build_oracle, sample, visible
from weft_attn.errors import InvalidInput, Unsupported
from weft_attn.launch.config import ForwardConfig
from weft_attn.launch.device import INTERPRETER, target
from weft_attn.launch.resources import shortfall
from weft_attn.launch.select import Problem, current_overrides, override, parse_table, tables
from weft_attn.plan.slices import transpose
from weft_attn.reference import reference_attention

CPU = torch.device("cpu")
SMALL = cases.Model(heads=2, kv_heads=1, head_dim=16, dtype_name="fp32")
PACE = timing.Pace(rounds=3, warm_up_ms=0.0, round_ms=0.0)
ENVIRONMENT = records.Environment("a GPU", "2.11", "3.6.0", "0.1.0", None, "2026-01-02T03:04:05+00:00")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_cases() -> list[cases.Case]:
    """One case of each layout, sizes that no tile divides."""
    return [
        cases.square_cases(SMALL, 39)[0],
        cases.square_cases(SMALL, 39)[1],
        cases.square_cases(SMALL, 68)[2],
        cases.zigzag_case(SMALL, 75, 1, 3),
        cases.packed_case(SMALL, "unequal", [1, 17, 33]),
        cases.decode_case(SMALL, 3, 41),
    ]


def named(case: cases.Case) -> str:
    return f"{case.suite}: {case.name}"


# ---- cases ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("documents", "total"), [(38, 65536), (1, 7), (5, 5), (1000, 1725000)])
def test_log_normal_lengths_sum_exactly_and_leave_no_document_empty(documents: int, total: int):
    lengths = cases.log_normal_lengths(documents, total)
    assert (len(lengths), sum(lengths)) == (documents, total)
    assert min(lengths) >= 1
    assert lengths == cases.log_normal_lengths(documents, total)


def test_the_packed_house_case_has_38_documents_of_median_1500_give_or_take():
    lengths = sorted(cases.log_normal_lengths(38, 65536))
    assert 1350 < (lengths[18] + lengths[19]) / 2 < 1650


@pytest.mark.parametrize(("length", "total"), [(256, 65536), (64, 100), (64, 64), (100, 7)])
def test_equal_lengths_fill_the_total(length: int, total: int):
    lengths = cases.equal_lengths(length, total)
    assert sum(lengths) == total
    assert set(lengths[:-1]) <= {length}
    assert 1 <= lengths[-1] <= length


@pytest.mark.parametrize("case", small_cases(), ids=named)
def test_rates_count_visible_pairs_only(case: cases.Case):
    pairs = int(case.plan.to_mask().sum())
    assert case.plan.pairs == pairs
    if case.unit == cases.TERABYTES:
        assert case.rate("forward", 1.0) == pytest.approx(41 * 2 * 16 * 4 * 1e-9)
    else:
        forward = 4 * pairs * 2 * 16 * 1e-9
        assert case.rate("forward", 1.0) == pytest.approx(forward)
        assert case.rate("backward", 1.0) == pytest.approx(2.5 * forward)


def test_the_house_suites_are_the_house_figures():
    model = cases.HOUSE_MODEL

    def names(suite: str) -> list[str]:
        return [case.name for case in cases.suite_cases(suite, cases.HOUSE, model)]

    assert (model.heads, model.kv_heads, model.head_dim, model.dtype) == (32, 8, 128, torch.bfloat16)
    assert names("square") == ["causal 16K", "full 16K", "causal 4 x 4K"]
    assert names("zigzag") == ["64K, rank 0 of 8", "64K, rank 3 of 8", "64K, rank 7 of 8", "8K, rank 3 of 8"]
    assert names("packed") == ["64K tokens, 38 log-normal documents", "64K tokens, documents of 256"]
    assert names("decode") == ["1 x 128K keys", "16 x 128K keys"]


def test_rank_all_is_every_rank():
    found = cases.suite_cases("zigzag", cases.QUICK, SMALL, seqlen=50, world=3, rank="all")
    assert [case.name for case in found] == ["50, rank 0 of 3", "50, rank 1 of 3", "50, rank 2 of 3"]


@pytest.mark.parametrize(
    "asked",
    [
        {"suite": "round"},
        {"suite": "zigzag", "rank": "some"},
        {"suite": "decode", "passes": ("backward",)},
        {"suite": "square", "seqlen": 0},
        {"suite": "zigzag", "world": 0},
        {"suite": "square", "world": 0},
    ],
)
def test_what_a_suite_does_not_have_is_refused(asked: dict):
    with pytest.raises(InvalidInput, match="expected"):
        cases.suite_cases(sizes=cases.QUICK, model=SMALL, **asked)


@pytest.mark.parametrize("option", ["heads", "kv_heads", "head_dim", "dtype_name"])
def test_an_option_of_0_or_nothing_is_refused_and_not_taken_for_none(option: str):
    asked = dict.fromkeys(("heads", "kv_heads", "head_dim", "dtype_name"))
    assert cases.chosen_model(quick=True, **asked) == cases.QUICK_MODEL
    with pytest.raises(InvalidInput, match="expected"):
        cases.chosen_model(quick=True, **{**asked, option: "" if option == "dtype_name" else 0})


def test_a_model_has_a_head_dim_that_attention_takes():
    for wrong in (-8, 0, 4, 100, 264):
        with pytest.raises(InvalidInput, match="multiple of 8"):
            cases.Model(head_dim=wrong)


@pytest.mark.parametrize("rank", range(3))
def test_prefixes_of_reordered_keys_are_the_zigzag_plan(rank: int):
    case = cases.zigzag_case(SMALL, 50, rank, 3)
    layout = case.layout
    mask = case.plan.to_mask()
    q_position, k_position = torch.from_numpy(layout.q_position), torch.from_numpy(layout.k_position)
    assert torch.equal(mask, q_position[:, None] >= k_position[None, :])
    in_sequence = mask[:, torch.from_numpy(layout.key_rows)]
    assert sorted(part.k_stop for part in layout.prefixes) == [part.k_stop for part in layout.prefixes]
    for part in layout.prefixes:
        rows = part.q_stop - part.q_start
        seen = torch.ones(rows, part.k_stop, dtype=torch.bool).tril(part.k_stop - rows)
        assert torch.equal(in_sequence[part.q_start : part.q_stop, : part.k_stop], seen)
        assert not in_sequence[part.q_start : part.q_stop, part.k_stop :].any()


def test_decoding_takes_another_copy_of_the_keys_at_each_call():
    tensors = cases.make_tensors(cases.decode_case(SMALL, 1, 40), CPU)
    assert tensors.turn(0)[0] is not tensors.turn(1)[0]
    assert torch.equal(tensors.turn(0)[1], tensors.turn(1)[1])


@pytest.mark.parametrize("bytes_each", [1, 10, 60, 500])
def test_copies_push_twice_the_cache_between_two_uses_of_one(bytes_each: int):
    copies = cases.kv_copies(bytes_each, cache_bytes=60)
    assert copies >= 2
    assert (copies - 1) * bytes_each >= 120


# ---- timing ---------------------------------------------------------------------------------------------------------------


class FakeClock:
    """Costs by the name that a call returns; remembers what was measured, and how often in a row."""

    def __init__(self, **costs: float):
        self.costs = costs
        self.log: list[tuple[str, int]] = []

    def measure(self, call: Callable[[], object], repeats: int) -> float:
        name = str(call())
        self.log.append((name, repeats))
        return self.costs[name]


def test_every_round_runs_every_variant_and_begins_with_another():
    clock = FakeClock(a=1.0, b=4.0, c=100.0)
    calls = {name: (lambda _turn, name=name: name) for name in "abc"}
    samples = timing.interleave(calls, clock, timing.Pace(rounds=3, warm_up_ms=150.0, round_ms=20.0))
    names = [name for name, _ in clock.log]
    warm_up, rounds = names[:-9], names[-9:]
    assert warm_up == list("abc") * 2  # 105 ms a time
    assert rounds == list("acb") + list("cba") + list("bac")
    assert dict(clock.log[-9:]) == {"a": 20, "b": 5, "c": timing.MIN_REPEATS}
    assert samples["b"].milliseconds == (4.0, 4.0, 4.0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 12])
def test_every_variant_is_at_every_place_and_behind_every_other_one_equally_often(n):
    rounds = n if n % 2 == 0 else 2 * n
    orders = list(timing.rounds_of(range(n), rounds))
    assert all(sorted(order) == list(range(n)) for order in orders)
    places = Counter((place, name) for order in orders for place, name in enumerate(order))
    assert set(places.values()) == {rounds // n}
    assert len(places) == n * n
    behind = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(behind.values()) <= {rounds // n}
    assert len(behind) == n * (n - 1)


def test_a_call_is_told_its_number():
    seen: list[int] = []
    timing.interleave({"only": seen.append}, FakeClock(**{"None": 1.0}), PACE)
    assert seen == list(range(len(seen)))


def test_speeds_compare_within_a_round():
    """The clocks fell by half after the first round: the ratio does not."""
    slow, fast = timing.Samples((4.0, 8.0, 8.0)), timing.Samples((2.0, 4.0, 4.0))
    assert fast.speed_over(slow) == 2.0
    assert timing.Samples((1.0, 2.0, 3.0, 4.0, 5.0)).median == 3.0
    assert timing.Samples((1.0, 2.0, 3.0, 4.0, 5.0)).quartiles == (2.0, 4.0)


def test_the_host_clock_counts_milliseconds_of_one_call():
    calls: list[int] = []
    assert 0 <= timing.HostClock().measure(lambda: calls.append(0), 5) < 100
    assert len(calls) == 5


def test_the_hosts_share_of_a_call_is_timed_without_the_wait_for_what_it_gave(monkeypatch: pytest.MonkeyPatch):
    now, log = [0.0], []

    def passes(seconds: float, what: str) -> None:
        now[0] += seconds
        log.append(what)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: passes(7.0, "wait"))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    repeats = timing.HandoverClock.AT_A_TIME + 2
    assert timing.HandoverClock().measure(lambda: passes(0.5, "call"), repeats) == pytest.approx(500.0)
    assert log == ["wait", *["call"] * (repeats - 2), "wait", "call", "call"]


def test_the_host_suite_is_of_calls_and_timed_by_the_host():
    (case,) = cases.suite_cases("host", cases.HOUSE, cases.Model())
    assert (case.unit, case.plan.total_q, case.rate("forward", 0.05)) == (cases.CALLS, 2048, pytest.approx(20_000))
    assert isinstance(run._clock_of(case, torch.device("cuda")), timing.HandoverClock)
    assert isinstance(run._clock_of(replace(case, suite="packed"), torch.device("cuda")), timing.CudaClock)


# ---- the exact answer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", small_cases(), ids=named)
def test_sampled_rows_and_keys_see_what_the_plan_says(case: cases.Case):
    mask = case.plan.to_mask()
    rows, keys = sample(case.plan.total_q, 7, 0), sample(case.plan.total_k, 7, 1)
    assert torch.equal(torch.from_numpy(visible(case.plan.rows, rows, case.plan.total_k)), mask[rows])
    assert torch.equal(torch.from_numpy(visible(transpose(case.plan.rows), keys, case.plan.total_q)), mask[:, keys].T)


def test_a_sample_holds_the_first_and_the_last():
    found = sample(1000, 16, 0)
    assert (found[0], found[-1]) == (0, 999)
    assert len(set(found.tolist())) == len(found) <= 16


@pytest.mark.parametrize("case", small_cases(), ids=named)
def test_the_sampled_answer_is_the_references_own(case: cases.Case):
    tensors = cases.make_tensors(case, CPU)
    oracle = build_oracle(case, tensors, samples=9)
    leaves = [x.double().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    out, lse = reference_attention(*leaves, case.plan)
    dq, dk, dv = torch.autograd.grad(out, leaves, tensors.dout.double())

    def same(found: torch.Tensor, expected: torch.Tensor):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)

    same(oracle.row_tensors["out"].exact, out[oracle.rows])
    same(oracle.row_tensors["lse"].exact[..., 0], lse[:, oracle.rows])
    same(oracle.row_tensors["dq"].exact, dq[oracle.rows])
    if "backward" in case.passes:
        same(oracle.key_tensors["dk"].exact, dk[oracle.keys])
        same(oracle.key_tensors["dv"].exact, dv[oracle.keys])


# ---- peers ----------------------------------------------------------------------------------------------------------------


def aligned_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """(B, S, H, D), the last row aligned with the last key, as flash-attn has it."""
    plan = weft.Plan.dense(q.shape[0], q.shape[1], k.shape[1], causal=causal)
    out, _ = reference_attention(*(x.flatten(0, 1) for x in (q, k, v)), plan)
    return out.unflatten(0, (q.shape[0], -1))


def packed_attention(q, k, v, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, causal: bool) -> torch.Tensor:
    return reference_attention(q, k, v, weft.Plan.from_cu_seqlens(cu_seqlens_q, cu_seqlens_k, causal=causal))[0]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch):
    """Kernels that need a GPU, replaced by the reference: what remains is what the peers do around them."""
    module = types.ModuleType(peers.Flash4.module)

    def flash_attn_func(q, k, v, *, causal, deterministic):
        return aligned_attention(q, k, v, causal), None

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, deterministic):
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        return packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)

    def flash(q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, causal):
        assert (longest_q, longest_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
        return packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, peers.Flash4.module, module)
    monkeypatch.setattr(peers, "flash_varlen", flash)
    monkeypatch.setattr(
        peers, "sdpa_kernel", lambda backend: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    )
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def peers_and_cases() -> list:
    """Every peer with every case that it has a form for."""
    found = []
    for peer in peers.PEERS:
        for case in small_cases():
            for deterministic in (False, True):
                asked = replace(case, deterministic=deterministic)
                if peer.name == "flex":
                    asked = replace(asked, passes=("forward",))  # it has no backward on a CPU
                if peer.name != "cudnn" or not peer.supports(replace(asked, model=cases.HOUSE_MODEL), torch.device("cuda")):
                    found.append(pytest.param(peer, asked, id=f"{peer.name}, {named(case)}, {deterministic=}"))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("peer", "case"), peers_and_cases())
def test_every_peer_computes_the_plans_attention_in_the_plans_order(peer: peers.Peer, case: cases.Case, stand_ins):
    tensors = cases.make_tensors(case, CPU)
    prepared = peer.prepare(case, tensors)
    out, lse = reference_attention(
        *(leaves := [x.clone().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]), case.plan
    )
    torch.testing.assert_close(prepared.packed_forward(), out.detach())
    if prepared.lse is not None:
        torch.testing.assert_close(prepared.lse(), lse.detach())
    if "backward" not in case.passes:
        assert prepared.backward is None
        return
    expected = torch.autograd.grad(out, leaves, tensors.dout)
    for _ in range(2):  # timing runs a backward many times
        (dq,), dk, dv = prepared.packed_backward(case.plan.total_k)
        for found, want in zip((dq, dk, dv), expected, strict=True):
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize("case", small_cases(), ids=named)
def test_the_flex_mask_has_the_plans_cells(case: cases.Case):
    mask_mod = peers.flex_mask(case, CPU)
    batch = case.layout.batch if isinstance(case.layout, cases.DenseBatch) else 1
    rows, keys = case.plan.total_q // batch, case.plan.total_k // batch
    zero = torch.zeros((), dtype=torch.int64)
    row, key = torch.arange(rows)[:, None], torch.arange(keys)[None, :]
    one = torch.ones(rows, keys, dtype=torch.bool) if mask_mod is None else mask_mod(zero, zero, row, key)
    assert torch.equal(torch.block_diag(*[one.int()] * batch).bool(), case.plan.to_mask())


def test_absent_peers_say_why():
    gpu, house = torch.device("cuda"), cases.HOUSE_MODEL
    for peer in peers.PEERS[1:]:
        assert peer.supports(small_cases()[0], CPU)
    cudnn = peers.CudnnSdpa()
    assert "equal length" in str(cudnn.supports(cases.packed_case(house, "two", [3, 5]), gpu))
    assert "aligns" in str(cudnn.supports(cases.zigzag_case(house, 64, 0, 2), gpu))
    assert "deterministic" in str(cudnn.supports(replace(cases.square_cases(house, 64)[0], deterministic=True), gpu))
    assert cudnn.supports(cases.square_cases(house, 64)[0], gpu) is None
    assert "16-bit" in str(peers.FlashSdpa().supports(small_cases()[0], gpu))


def test_weft_always_runs_and_unknown_peers_are_refused():
    assert [p.name for p in peers.chosen_peers(["flex"])] == ["weft", "flex"]
    assert [p.name for p in peers.chosen_peers(None, ["flash4", "weft"])] == ["weft", "cudnn", "flash", "flex"]
    with pytest.raises(InvalidInput, match="expected one of"):
        peers.chosen_peers(["fastest"])


# ---- running a case -------------------------------------------------------------------------------------------------------


class Twin(peers.Weft):
    """A peer that runs here: Weft under another name, its results changed on the way."""

    name = "twin"

    def __init__(self, forward: float = 1.0, dv: float = 1.0):
        self.forward, self.dv = forward, dv

    def prepare(self, case: cases.Case, tensors: cases.Tensors) -> peers.Prepared:
        honest = super().prepare(case, tensors)

        def backward(turn: int) -> peers.Gradients:
            dq, dk, dv = honest.backward(turn)
            return dq, dk, dv * self.dv

        return replace(honest, forward=lambda turn: tuple(x * self.forward for x in honest.forward(turn)), backward=backward)


class Broken(peers.Weft):
    name = "broken"

    def prepare(self, case: cases.Case, tensors: cases.Tensors) -> peers.Prepared:
        raise RuntimeError("no kernel for you\nsecond line")


def records_of(*others: peers.Peer, case: cases.Case | None = None, **options) -> dict[tuple[str, str], records.Record]:
    found = run.run_case(case or small_cases()[0], [peers.WEFT, *others], CPU, PACE, ENVIRONMENT, **options)
    return {(r.peer, r.pass_name): r for r in found}


def test_a_right_peer_gets_a_figure_with_everything_needed_to_judge_it():
    found = records_of(Twin())
    for record in found.values():
        assert record.status == records.OK
        assert record.milliseconds > 0
        assert record.quartiles[0] <= record.milliseconds <= record.quartiles[1]
        assert record.rate == pytest.approx(small_cases()[0].rate(record.pass_name, record.milliseconds))
        assert record.environment == ENVIRONMENT
        assert (record.pairs, len(record.plan_digest)) == (39 * 40 // 2, 12)
        assert all(budget.passed for budget in record.budgets.values())
    assert set(found["weft", "forward"].budgets) == {"out", "lse"}
    assert set(found["weft", "backward"].budgets) == {"dq", "dk", "dv"}
    assert found["weft", "forward"].ratio_to_weft == 1.0
    assert found["weft", "forward"].config == "reference"


@pytest.mark.parametrize("wrong", [Twin(forward=1.01), Twin(dv=0.99), Twin(forward=math.nan)], ids=["out", "dv", "nan"])
def test_a_wrong_result_gets_no_figure_in_any_pass(wrong: Twin):
    found = records_of(wrong)
    for pass_name in cases.PASSES:
        record = found["twin", pass_name]
        assert record.status == records.RED
        assert (record.milliseconds, record.quartiles, record.rate, record.ratio_to_weft) == (None, None, None, None)
        assert found["weft", pass_name].status == records.OK
    assert report.failures(found.values())
    assert "dv" in found["twin", "backward"].note or "out" in found["twin", "forward"].note


def test_one_wrong_key_gradient_among_many_is_found():
    case = cases.packed_case(SMALL, "one", [300])

    class OffByOne(Twin):
        def prepare(self, case, tensors):
            honest = super().prepare(case, tensors)

            def backward(turn):
                dq, dk, dv = honest.backward(turn)
                dk[-1] += dk[0]
                return dq, dk, dv

            return replace(honest, backward=backward)

    found = records_of(OffByOne(), case=case)
    assert found["twin", "backward"].status == records.RED
    assert "dk" in found["twin", "backward"].note


def test_unchecked_figures_say_so():
    found = records_of(Twin(forward=2.0), check=False)
    assert {record.status for record in found.values()} == {records.UNCHECKED}
    assert all(record.milliseconds for record in found.values())


def test_a_peer_that_fails_is_listed_with_its_reason():
    record = records_of(Broken())["broken", "backward"]
    assert record.status == records.ABSENT
    assert "RuntimeError: no kernel for you" in record.note
    assert "second line" not in record.note


def test_what_goes_wrong_inside_weft_is_raised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers.Weft, "prepare", Broken.prepare)
    with pytest.raises(RuntimeError, match="no kernel"):
        records_of()


def test_ratios_are_speed_over_weft_in_the_same_run():
    class Clock:
        """Weft takes 2 ms, its twin, which is told apart by its scaled output, 1 ms."""

        def measure(self, call, repeats):
            return 2.0 if isinstance(call(), tuple) and self.turns() else 1.0

        def __init__(self):
            self.calls = 0

        def turns(self) -> bool:
            self.calls += 1
            # Warm-up: weft, twin. Rounds: weft twin, twin weft, weft twin; and so on for each pass.
            return (self.calls - 1) % 8 in (0, 2, 5, 6)

    found = records_of(Twin(), clock=Clock())
    assert [found[name, "forward"].ratio_to_weft for name in ("weft", "twin")] == [1.0, 2.0]
    assert found["twin", "backward"].ratio_to_weft == 2.0


def test_plans_are_timed_without_a_device():
    found = run.run_plan_suite(run.plan_cases(cases.QUICK, 4), PACE, ENVIRONMENT)
    assert {record.pass_name for record in found} == {"build", *run.CUTS}
    assert all(record.milliseconds > 0 and record.rate is None for record in found)


def test_a_device_that_is_not_here_is_an_error():
    with pytest.raises(InvalidInput, match="expected cuda"):
        cases.chosen_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(Unsupported, match="given none"):
            cases.chosen_device("cuda")


# ---- records --------------------------------------------------------------------------------------------------------------


def test_records_survive_their_json_form(tmp_path: Path):
    found = [
        *records_of(Twin(dv=0.9), Broken()).values(),
        *run.run_plan_suite(run.plan_cases(cases.QUICK, 4), PACE, ENVIRONMENT),
    ]
    records.write_json(found, tmp_path / "records.json")
    assert records.read_json(tmp_path / "records.json") == found


@pytest.mark.parametrize("text", ["", "{}", '[{"suite": "square"}]', "[1]"])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path):
    (tmp_path / "other.json").write_text(text, encoding="utf-8")
    if text == "{}":
        assert records.read_json(tmp_path / "other.json") == []
    else:
        with pytest.raises(InvalidInput, match="benchmark records"):
            records.read_json(tmp_path / "other.json")


def test_the_environment_names_versions_and_date():
    found = records.environment_of(CPU)
    assert found.torch == torch.__version__
    assert found.weft == weft.__version__
    assert found.date.endswith("+00:00")


def test_the_report_shows_red_without_a_figure_and_lists_the_absent(capsys: pytest.CaptureFixture[str]):
    found = list(records_of(Twin(dv=0.9), Broken()).values())
    assert report.show(lambda notify: [found]) == 1
    text = capsys.readouterr().out
    assert "WRONG twin" in text
    assert "absent broken: failed with RuntimeError: no kernel for you (causal 39)" in text
    assert next(line for line in text.splitlines() if " twin " in line).count("red") == 1
    assert "a GPU" in text


def test_a_record_names_the_kernels_that_ran(monkeypatch: pytest.MonkeyPatch):
    h100 = replace(target("sm_90"), multiprocessors=132)
    monkeypatch.setattr(one_kernel, "device_of", lambda _device: h100)
    monkeypatch.setattr(ops, "runs_reference", lambda _device: False)
    model = cases.Model(heads=2, kv_heads=1, head_dim=128, dtype_name="bf16")
    long, short = cases.square_cases(model, 4096)[0], cases.square_cases(model, 256)[0]
    for case, kernels in (
        (long, ["hopper_backward"]),
        (replace(long, deterministic=True), ["hopper_backward_dkdv", "hopper_backward_dq"]),
        (short, ["hopper_backward_dkdv", "hopper_backward_dq"]),
    ):
        text = one_kernel.describe_choice("backward", case, cases.make_tensors(case, CPU))
        assert [part.split("(")[0] for part in text.split("; ")] == kernels


# ---- ablation -------------------------------------------------------------------------------------------------------------


def kernel_runs(case: cases.Case) -> one_kernel.KernelRuns:
    return one_kernel.KernelRuns(case, cases.make_tensors(case, CPU))


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_an_ablation_switches_one_field_of_the_chosen_config(kernel: str):
    runs = kernel_runs(small_cases()[0])
    settings = ablation.settings_of(kernel, runs, ablation.TECHNIQUES)
    chosen = settings.pop(ablation.CHOSEN)
    assert chosen == one_kernel.base_choice(kernel, runs.case, runs.tensors).config
    techniques = {label.split(":")[0] for label in settings}
    assert techniques >= {"cache_modifier", "use_tma", "l2_order", "tiles"}
    assert ("identity_dot" in techniques) == (kernel != one_kernel.DKDV)
    assert "split_kv" not in techniques
    for label, config in settings.items():
        changed = {name for name, value in vars(config).items() if value != getattr(chosen, name)}
        allowed = {
            "cache_modifier": {"cache_modifier", "use_tma"},
            "l2_order": {"wave_bytes"},
            "tiles": {"block_q", "block_k", "num_warps", "num_stages"},
        }
        technique = label.split(":")[0]
        assert changed <= allowed.get(technique, {technique})


def test_the_split_kv_setting_switches_the_split_off():
    runs = kernel_runs(cases.decode_case(SMALL, 1, 3000))
    assert runs.splits_keys()
    settings = ablation.settings_of(one_kernel.FORWARD, runs, ablation.chosen_techniques(["split_kv"]))
    assert list(settings) == [ablation.CHOSEN, "split_kv: off"]
    with override(settings["split_kv: off"]):
        assert not runs.splits_keys()


def test_settings_that_cannot_run_are_listed_with_the_reason():
    techniques = ablation.chosen_techniques(["use_tma", "identity_dot"])
    found = ablation.ablate_case(small_cases()[0], techniques, CPU, PACE, ENVIRONMENT)
    by_label = {(r.pass_name, r.peer): r for r in found}
    assert by_label["forward", "use_tma: on"].status == records.ABSENT
    assert "use_tma=False" in by_label["forward", "use_tma: on"].note
    assert by_label["forward", "identity_dot: on"].status == records.OK
    assert by_label["backward_dq", ablation.CHOSEN].ratio_to_weft == 1.0
    assert set(by_label["backward_dkdv", ablation.CHOSEN].budgets) == {"dk", "dv"}


def test_unknown_techniques_are_refused():
    with pytest.raises(InvalidInput, match="expected one of"):
        ablation.chosen_techniques(["magic"])


def test_configs_are_not_measured_where_the_reference_runs():
    if ops.runs_reference(CPU):
        with pytest.raises(Unsupported, match="runs the reference"):
            one_kernel.needs_kernels(CPU)


# ---- tuning ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "gfx942"])
@pytest.mark.parametrize(("kernel", "few_rows"), [*((kernel, 0) for kernel in tune.KERNELS), ("forward", 16)])
def test_the_grid_offers_only_what_the_device_holds(kernel: str, few_rows: int, arch: str):
    device, problem = target(arch), Problem(128, 128, 16)
    search = tune.Search(kernel, cases.HOUSE_MODEL, 1024, few_rows)
    found = tune.candidates(search, problem, device)
    assert found
    for config in (*found, *tune.flipped(found[0], problem, device)):
        assert not shortfall(config, problem.shape, device)
        assert device.has_tma or not config.use_tma


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.name)
def test_written_tables_read_back_the_same(table):
    again = parse_table(table.name, tune.format_table(table))
    assert (again.arch, again.device) == (table.arch, table.device)
    assert set(again.rows) == set(table.rows)


def a_row(block_q: int, head_dim: int = 128) -> tune.Row:
    config = ForwardConfig(num_warps=4, num_stages=2, block_q=block_q, block_k=64, cache_modifier=".cg")
    measured = {"tflops": 512.0, "torch": "2.11", "triton": "3.6.0", "date": "2026-01-02"}
    return tune.Row("", head_dim, 16, 0, config, measured, 'causal, "quoted"')


def test_writing_replaces_the_row_for_the_same_work_and_keeps_the_others(tmp_path: Path):
    path, device = tmp_path / "gpu.toml", target("sm_90")
    long = replace(a_row(32), least_keys=1000)
    tune.write_rows(path, [a_row(64), a_row(64, head_dim=64), long], device)
    path.write_text("# A heading.\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    tune.write_rows(path, [a_row(128)], device)
    text = path.read_text(encoding="utf-8")
    table = parse_table("gpu", text)
    assert text.startswith("# A heading.\n[match]")
    assert (table.arch, table.device) == ("sm_90", "sm_90")
    found = {(row.head_dim, row.least_keys): row.config.block_q for row in table.rows}
    assert found == {(64, 0): 64, (128, 0): 128, (128, 1000): 32}
    assert table.rows[0].measured == a_row(64).measured
    assert table.rows[0].note == a_row(64).note
    with pytest.raises(InvalidInput, match="this device's"):
        tune.write_rows(path, [a_row(32)], target("sm_80"))


@pytest.fixture
def tiny_grid(monkeypatch: pytest.MonkeyPatch):
    grid = {"block_q": (16, 32), "block_k": (16,), "num_warps": (4,), "num_stages": (1,)}
    monkeypatch.setattr(tune, "GRIDS", dict.fromkeys(tune.GRIDS, grid))


@pytest.mark.parametrize(("kernel", "few_rows"), [*((kernel, 0) for kernel in tune.KERNELS), ("forward", 2)])
def test_tuning_gives_the_row_of_the_fastest_right_config(kernel: str, few_rows: int, tiny_grid):
    search = tune.Search(kernel, SMALL, 300 if few_rows else 40, few_rows)
    tuned = tune.tune(search, CPU, PACE, ENVIRONMENT)
    assert tuned.row is not None
    assert tuned.row.config.kernel == kernel
    assert (tuned.row.head_dim, tuned.row.dtype_bits, tuned.row.few_rows) == (16, 32, few_rows)
    assert {"torch": "2.11", "triton": "3.6.0", "date": "2026-01-02"}.items() <= tuned.row.measured.items()
    timed = [record for record in tuned.records if record.milliseconds is not None]
    assert {record.peer for record in timed} >= {tune.CHOSEN, "forward(num_warps=4, num_stages=1, block_q=16, block_k=16)"} or (
        kernel != "forward"
    )


def test_a_wrong_config_is_neither_timed_nor_written(tiny_grid, monkeypatch: pytest.MonkeyPatch):
    honest = one_kernel.KernelRuns._forward

    def planted(self, turn):
        out, lse = honest(self, turn)
        overridden = [c for c in current_overrides() if getattr(c, "block_q", 0) == 16]
        return (out * 1.05 if overridden else out), lse

    monkeypatch.setattr(one_kernel.KernelRuns, "_forward", planted)
    tuned = tune.tune(tune.Search("forward", SMALL, 40), CPU, PACE, ENVIRONMENT)
    wrong = [record for record in tuned.records if "block_q=16" in record.config]
    assert wrong
    assert all(
        record.status == records.RED and record.milliseconds is None for record in wrong if "block_q=16" in record.config
    )
    assert tuned.row.config.block_q != 16
    assert report.failures(tuned.records)


@pytest.mark.parametrize("search", [{"kernel": "delta"}, {"kernel": "backward_dq", "few_rows": 16}])
def test_searches_that_make_no_sense_are_refused(search: dict):
    with pytest.raises(InvalidInput, match="expected"):
        tune.Search(model=SMALL, seqlen=64, **search)


def test_few_rows_that_fill_the_device_are_refused():
    busy = replace(SMALL, heads=INTERPRETER.multiprocessors * 2, kv_heads=1)
    with pytest.raises(InvalidInput, match="keys are split"):
        tune.tune(tune.Search("forward", busy, 300, few_rows=8), CPU, PACE, ENVIRONMENT)


def test_a_sustained_pace_heats_the_card_and_gives_each_variant_a_swing_of_its_clocks():
    clock = FakeClock(a=0.5, b=1000.0)
    calls = {name: (lambda _turn, name=name: name) for name in "ab"}
    pace = timing.chosen_pace(quick=False, rounds=2, sustained=True)
    timing.interleave(calls, clock, pace)
    assert clock.log[:-4] == [("a", 1), ("b", 1), ("a", 2000), ("b", timing.MIN_REPEATS)], "two seconds of load"
    assert dict(clock.log[-4:]) == {"a": 2000, "b": timing.MIN_REPEATS}
    assert pace.rounds == 2
    # Of 0.95 s: docs/notes/2026-11-27-clocks-that-swing.md.
    assert pace.round_ms >= 950
    assert timing.repeats_of(pace.round_ms, 1e-3, pace.most_repeats) == pace.most_repeats
    assert timing.chosen_pace(quick=False, rounds=None) == timing.HOUSE_PACE
    with pytest.raises(InvalidInput, match="quick or sustained"):
        timing.chosen_pace(quick=True, rounds=None, sustained=True)
