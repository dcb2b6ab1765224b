"""What the benchmark of context parallelism promises: figures of the whole group, none for a result that is wrong on any rank."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from unittest import mock

import pytest
import torch

import weft_attn as weft
from weft_attn.bench import (
    context_parallel,
    group_peers,
    group_report,
    group_ring,
    group_ways,
    links,
    peers,
    records,
    report,
    timing,
)
from weft_attn.bench.cases import Model
from weft_attn.bench.group_timing import GroupClock, GroupSamples, interleave_over_ranks, milliseconds_between
from weft_attn.bench.group_ways import BOTH, COMMUNICATION, FORWARD, IDEAL, IN_STEP, KERNELS, OWN_PASSES, WEFT, Grouping
from weft_attn.bench.measured_rates import rates_of
from weft_attn.bench.rates import ALL_GATHER, REDUCE_SCATTER
from weft_attn.bench.records import ABSENT, OK, RED, GroupRecord
from weft_attn.bench.workload import Workload, workloads
from weft_attn.distributed import context_parallel as distributed_context_parallel
from weft_attn.distributed import gathered
from weft_attn.distributed.collectives import Ranks
from weft_attn.distributed.groups import Groups, Pass
from weft_attn.errors import InvalidInput, Unsupported
from weft_attn.ops import Backward
from weft_attn.reference import reference_attention
from weft_attn.testing.parallel import OrdinaryWindows
from weft_attn.testing.ranks import run_ranks

CPU = torch.device("cpu")
SMALL = Model(heads=4, kv_heads=2, head_dim=16, dtype_name="fp32")
PACE = timing.Pace(rounds=2, warm_up_ms=0.0, round_ms=0.0)
ENVIRONMENT = records.Environment("a GPU", "2.11", "3.6.0", "0.1.0", None, "2026-01-02T03:04:05+00:00")
TWO_CALLS = "allgather-2calls-weft"
DIVISIBLE, ODD = (24, 0, 8, 40), (37, 0, 1, 20)


def request(**options) -> context_parallel.Request:
    chosen = context_parallel.chosen_peers(["allgather-2calls-weft"])
    return context_parallel.Request(model=SMALL, peers=chosen, device_name="cpu", pace=PACE, quick=True, **options)


def measured(lengths: tuple[int, ...], layout: str = "zigzag") -> list[GroupRecord]:
    """Records of one workload in the process group that this process is in."""
    parallel = weft.ContextParallel(layout=layout)
    workload = Workload(lengths, parallel.world_size, SMALL, layout)
    return context_parallel.run_workload(workload, request(), parallel, CPU, ENVIRONMENT)


# ---- timing over ranks ----------------------------------------------------------------------------------------------------


def test_the_slowest_rank_is_what_a_call_costs():
    samples = GroupSamples(((1.0, 3.0), (2.0, 2.5), (5.0, 1.0)))
    assert samples.slowest.milliseconds == (3.0, 2.5, 5.0)
    assert samples.mean.milliseconds == (2.0, 2.25, 3.0)
    assert samples.spread_ms == 2.0


class RankClock:
    """A call takes as many milliseconds as it says, plus the rank."""

    def __init__(self, rank: int):
        self.rank = rank
        self.repeats: list[int] = []

    def measure(self, call, repeats: int) -> float:
        self.repeats.append(repeats)
        return float(call()) + self.rank


def times_over_ranks(rank: int, world_size: int) -> tuple[dict[str, GroupSamples], list[int]]:
    clock = RankClock(rank)
    calls = {"short": lambda _turn: 1.0, "long": lambda _turn: 9.0}
    pace = timing.Pace(rounds=3, warm_up_ms=15.0, round_ms=20.0)
    return interleave_over_ranks(calls, GroupClock(clock, Ranks.of(), CPU), pace), clock.repeats


def test_all_ranks_measure_the_same_calls_as_often_and_know_each_others_times():
    (first, repeats), (second, same) = run_ranks(times_over_ranks, 2)
    assert first == second == {"short": GroupSamples(((1.0, 2.0),) * 3), "long": GroupSamples(((9.0, 10.0),) * 3)}
    # The slower rank's 2 and 10 ms decide: 10 and 2 calls fill a round of 20 ms. The warm-up begins with one call of
    # each, 12 ms, and goes on as a round.
    assert repeats == same == [1, 1, 10, 2] + [10, 2, 2, 10, 10, 2]


def outside_of(rank: int, world_size: int) -> tuple[float, int]:
    """A call of 90 ms, of which two launches take 60 on rank 0 and 30 on rank 1."""
    call = types.SimpleNamespace(call=lambda _pass: lambda _turn: attend())

    def attend() -> None:
        for _ in range(2):
            gathered.attention_into(0.030 if rank == 0 else 0.015)
        time.sleep(0.030 if rank == 0 else 0.060)

    with mock.patch.object(gathered, "attention_into", time.sleep):
        with group_ways.watched_launches(CPU) as launches:
            attend()
        assert gathered.attention_into is time.sleep
        return context_parallel.outside_ms(call, FORWARD, CPU, 3), len(launches)


def test_what_no_launch_hides_is_that_of_the_rank_that_waits_for_nobody():
    (first, launches), (second, _) = run_ranks(outside_of, 2)
    assert first == second
    assert 29.9 < first < 59
    assert launches == 2


def test_a_backwards_launches_are_seen_in_all_of_their_parts():
    with (
        mock.patch.object(gathered, "begin_backward", return_value=Backward(lambda: time.sleep(0.2), lambda: "dsinks")),
        group_ways.watched_launches(CPU) as launches,
    ):
        begun = gathered.begin_backward()
        begun.multiply()
        assert begun.finish() == "dsinks"
    lengths = [milliseconds_between(*launch) for launch in launches]
    assert len(lengths) == 3
    assert lengths[1] > 199 > max(lengths[0], lengths[2])


# ---- a workload -----------------------------------------------------------------------------------------------------------


def both_workloads(rank: int, world_size: int) -> list[list[GroupRecord]]:
    return [measured(DIVISIBLE), measured(ODD), measured(ODD, "striped")]


@pytest.fixture(scope="module")
def of_two_ranks() -> list[list[list[GroupRecord]]]:
    return run_ranks(both_workloads, 2)


def test_every_way_is_checked_and_timed_and_all_ranks_hold_the_same_records(of_two_ranks):
    first, second = of_two_ranks
    assert first == second
    by_name = {(r.peer, r.pass_name): r for r in first[0]}
    assert set(by_name) == {(name, p) for name in (WEFT, KERNELS, IN_STEP, COMMUNICATION, IDEAL, TWO_CALLS) for p in OWN_PASSES}
    for (name, pass_name), record in by_name.items():
        assert record.status == OK
        assert record.milliseconds > 0
        assert record.rate == pytest.approx(1e3 / record.milliseconds)
        assert record.spread_ms >= 0
        assert (record.outside_ms is not None) == (name == WEFT)
        assert record.pairs == sum(n * (n + 1) // 2 for n in DIVISIBLE)
        compared = {FORWARD: {"out"}, BOTH: {"out", "dq"} if name in (KERNELS, IN_STEP) else {"out", "dq", "dk", "dv"}}[
            pass_name
        ]
        assert set(record.budgets) == (set() if name == COMMUNICATION else compared)
        assert all(budget.passed for budget in record.budgets.values())
    assert {by_name[IDEAL, p].share_of_ideal for p in OWN_PASSES} == {1.0}
    assert {by_name[WEFT, p].ratio_to_weft for p in OWN_PASSES} == {1.0}


def of_one_rank(rank: int, world_size: int) -> list[GroupRecord]:
    return measured(ODD)


def test_one_rank_gathers_nothing_so_nothing_lies_outside_its_launches():
    (found,) = run_ranks(of_one_rank, 1)
    assert {record.outside_ms for record in found} == {None}
    assert all(record.milliseconds > 0 for record in found if record.peer == WEFT)


def in_other_groups(rank: int, world_size: int) -> tuple[list[GroupRecord], list[list[int]]]:
    parallel = weft.ContextParallel()
    records_of = context_parallel.run_workload(
        Workload(DIVISIBLE, world_size, SMALL, "zigzag"),
        request(groupings=tuple(map(Grouping.named, ("1", "2", "3", "1+1+0", "0+1+1", "1+2+1")))),
        parallel,
        CPU,
        ENVIRONMENT,
    )
    x = torch.ones(36, 2, 16, requires_grad=True)
    widths: list[list[int]] = []
    for grouping in map(Grouping.named, ("1", "2", "0+1+1")):
        with group_ways.in_groups(grouping.groups(2)), patched_gathers() as gathers:
            parallel.attention(x.repeat(1, 2, 1), x, x, [0, *accumulate(DIVISIBLE)]).sum().backward()
        widths.append([buffer.shape[1] for buffer in gathers])
    return records_of, widths


@contextlib.contextmanager
def patched_gathers() -> Iterator[list[torch.Tensor]]:
    """What is gathered inside."""
    seen: list[torch.Tensor] = []
    gather = Ranks.all_gather

    def watched(self: Ranks, buffer: torch.Tensor) -> object:
        seen.append(buffer)
        return gather(self, buffer)

    with mock.patch.object(Ranks, "all_gather", watched):
        yield seen


def test_other_groups_of_heads_are_timed_and_checked_as_the_chosen_are():
    (found, widths), (same, _) = run_ranks(in_other_groups, 2)
    assert found == same
    by_name = {(r.peer, r.pass_name): r for r in found}
    for name in ("1 group", "2 groups", "1+1+0 heads", "0+1+1 heads"):
        for pass_name in OWN_PASSES:
            record = by_name[f"weft: {name}", pass_name]
            assert record.status == OK
            assert record.budgets == by_name[WEFT, pass_name].budgets
            assert record.milliseconds > 0
            assert record.ratio_to_weft > 0
            assert record.outside_ms > 0
    absent = by_name["weft: 3 groups", FORWARD]
    assert (absent.status, absent.note) == (ABSENT, "2 KV heads, of which 2 may be gathered together, make 1 to 2 groups")
    absent = by_name["weft: 1+2+1 heads", BOTH]
    assert (absent.status, absent.note) == (
        ABSENT,
        "of 2 KV heads, 2 may be gathered together: expected all 4 of the groups",
    )
    # A head has 2 x 16 columns; two launches of a backward may have one gather.
    assert widths == [[64, 64], [32, 32, 32, 32], [64, 64]]


def test_groups_are_a_number_or_the_heads_of_three_launches():
    named = Grouping.named
    assert context_parallel.chosen_groupings(None) == []
    assert context_parallel.chosen_groupings(["4", "1+6+1", "1", "4"]) == [named("1"), named("1+6+1"), named("4")]
    with pytest.raises(InvalidInput, match="given none"):
        context_parallel.chosen_groupings([])
    for wrong in ("0", "-1", "two", "1.5", "1+7", "1+0+7", "1+6+", "+", "1+2+3+2"):
        with pytest.raises(InvalidInput, match="groups of heads"):
            context_parallel.chosen_groupings([wrong])
    assert (str(named("1")), str(named("2")), str(named("1+6+1"))) == ("1 group", "2 groups", "1+6+1 heads")
    # A cap that holds fewer than all heads, whose buffers take turns.
    assert not named("4").obstacle(8, 2)
    assert named("3").obstacle(8, 2)
    assert named("1+6+1").obstacle(8, 2)
    assert not named("1+6+1").obstacle(8, 8)
    assert named("1+6+1").groups(8) == Groups(Pass.between(1, 7, 0), Pass.between(1, 6, 1))


def test_workloads_are_chosen_by_name():
    def lengths(work: str | None, *, quick: bool = False) -> list[tuple[int, ...]]:
        return [w.lengths for w in workloads(SMALL, 1, quick=quick, layout="zigzag", max_gather_bytes=None, work=work)]

    for quick in (False, True):
        parts = [lengths(name, quick=quick) for name in ("packings", "long")]
        assert all(parts)
        assert sorted(parts[0] + parts[1]) == sorted(lengths(None, quick=quick))
    assert lengths("long") == [(32768,)]
    assert context_parallel.chosen_work("long") == "long"
    assert lengths(context_parallel.LINKS) == []
    with pytest.raises(InvalidInput, match="has a name"):
        context_parallel.chosen_work("short")


def parts_of_a_run(rank: int, world_size: int) -> dict[str | None, list[tuple[bool, str]]]:
    """For each name of work the records' cases, and whether they are of the collectives; "windows": all of it by copy engines."""

    def parts(work: str | None, **options: bool) -> list[tuple[bool, str]]:
        batches = context_parallel.run_group(request(work=work, check=False, **options), CPU)
        records = [r for batch in batches for r in batch]
        assert {r.peer for r in records if "symmetric memory" in r.note} == ({WEFT} if options else set())
        return sorted({(r.bytes_received is not None, r.case) for r in records})

    found = {work: parts(work) for work in (None, context_parallel.LINKS, "long", "packings")}
    with mock.patch.object(distributed_context_parallel, "windows_of", return_value=OrdinaryWindows()):
        found["windows"] = parts(None, copy_engines=True)
    return found


def test_the_collectives_are_measured_alone_or_left_out():
    found, _ = run_ranks(parts_of_a_run, 2)
    links, long, packings = found[context_parallel.LINKS], found["long"], found["packings"]
    assert links and all(of_link for of_link, _ in links)  # noqa: PT018
    assert long and packings and not any(of_link for of_link, _ in long + packings)  # noqa: PT018
    assert found[None] == sorted(links + long + packings)
    assert found["windows"] == sorted(long + packings)


def what_takes_two_ranks(rank: int, world_size: int) -> None:
    for options, rule in (
        (dict(work=context_parallel.LINKS), "one rank has no collectives"),
        (dict(copy_engines=True), "one rank gathers nothing"),
    ):
        with pytest.raises(Unsupported, match=rule):
            list(context_parallel.run_group(request(**options), CPU))


def test_one_rank_has_no_collectives_to_measure():
    run_ranks(what_takes_two_ranks, 1)


@pytest.mark.parametrize(("batch", "why"), [(1, "2 x ranks divides"), (2, "zigzag layout")])
def test_a_peer_without_a_form_for_the_work_says_why(of_two_ranks, batch: int, why: str):
    found = of_two_ranks[0][batch]
    assert {(r.peer, r.status) for r in found if r.peer == TWO_CALLS} == {(TWO_CALLS, ABSENT)}
    assert all(why in r.note for r in found if r.peer == TWO_CALLS)
    assert {r.status for r in found if r.peer != TWO_CALLS} == {OK}


def test_the_formulas_memory_stands_beside_the_measured(of_two_ranks):
    by_name = {(r.peer, r.pass_name): r for r in of_two_ranks[0][0]}
    # 36 rows a rank, one head of 2 x 16 dims a group, two buffers: keys in fp32, gradients and their sum in fp32.
    assert by_name[WEFT, FORWARD].formula_bytes == 2 * 2 * 36 * 32 * 4
    assert by_name[WEFT, BOTH].formula_bytes == 2 * 2 * 36 * 32 * 4 + 2 * 3 * 36 * 32 * 4
    assert by_name[KERNELS, FORWARD].formula_bytes is None
    assert by_name[WEFT, FORWARD].peak_bytes is None  # not counted on a CPU


def test_group_records_survive_their_json_form_and_give_rates(of_two_ranks, tmp_path: Path):
    found = [r for batch in of_two_ranks[0] for r in batch]
    records.write_json(found, tmp_path / "records.json")
    assert records.read_json(tmp_path / "records.json", GroupRecord) == found
    rates = rates_of(found)
    assert (rates.head_dim, rates.dtype_name, rates.device) == (16, "fp32", "a GPU")
    assert {rate.pass_name for rate in rates.kernels} >= {"forward"}


def test_the_table_names_every_way_and_hides_no_red(of_two_ranks, capsys: pytest.CaptureFixture[str]):
    found = of_two_ranks[0][0]
    wrong = replace(found[0], status=RED, milliseconds=None, quartiles=None, rate=None, note="dk off")
    assert report.show(lambda notify: [[*found, wrong]], figures=group_report.group_figures) == 1
    text = capsys.readouterr().out
    for name in (WEFT, KERNELS, COMMUNICATION, IDEAL, TWO_CALLS, "WRONG weft", "forward+backward"):
        assert name in text
    whole = next(one for one in found if one.peer == WEFT and one.share_of_ideal is not None)
    shares = next(column for column in group_report.group_figures([whole]).columns if "share of ideal" in str(column.header))
    assert list(shares.cells) == [f"{whole.share_of_ideal:.1%} / {whole.share_of_slowest_ideal:.1%}"]


def test_the_ideal_is_the_whole_work_on_one_gpu_over_the_ranks():
    samples = {
        WEFT: GroupSamples(((5.0, 4.0), (10.0, 8.0))),
        # The second rank is the slower one, though not in every round.
        IDEAL: GroupSamples(((6.0, 10.0), (17.0, 15.0))),
        "other": GroupSamples(((10.0, 1.0), (20.0, 1.0))),
    }
    empty = GroupRecord("cp", "case", "", FORWARD, OK, ENVIRONMENT)
    found = {name: context_parallel.with_figure(replace(empty, peer=name), samples, 2) for name in samples}
    assert [found[name].milliseconds for name in samples] == [7.5, 6.0, 15.0]
    # The clocks fell by half after the first round: the shares did not.
    assert [found[name].share_of_ideal for name in samples] == [0.8, 1.0, 0.4]
    assert [found[name].share_of_slowest_ideal for name in samples] == [0.875, None, 0.4375]
    assert [found[name].ratio_to_weft for name in samples] == [1.0, 1.25, 0.5]
    assert [found[name].spread_ms for name in samples] == [1.5, 3.0, 14.0]
    assert context_parallel.with_figure(replace(empty, peer="other"), {"other": samples["other"]}, 2).share_of_ideal is None


# ---- wrong results --------------------------------------------------------------------------------------------------------


def wrong_on_one_rank(rank: int, world_size: int, tensor: str) -> list[GroupRecord]:
    honest = weft.ContextParallel.attention

    def planted(self, q, k, v, cu_seqlens, **options):
        if rank == 1 and tensor in ("dk", "dv"):
            # Forward as it is, one gradient off.
            scaled = {"dk": k, "dv": v}[tensor]
            scaled = scaled + (scaled - scaled.detach()) * 0.01
            k, v = (scaled, v) if tensor == "dk" else (k, scaled)
        out = honest(self, q, k, v, cu_seqlens, **options)
        return out * 1.01 if rank == 1 and tensor == "out" else out

    weft.ContextParallel.attention = planted
    return measured(ODD)


@pytest.mark.parametrize("tensor", ["out", "dk", "dv"])
def test_a_result_that_is_wrong_on_one_rank_gets_no_figure_on_any(tensor: str):
    for found in run_ranks(wrong_on_one_rank, 2, tensor):
        of_weft = [r for r in found if r.peer == WEFT]
        assert [(r.status, r.milliseconds, r.rate) for r in of_weft] == [(RED, None, None)] * 2
        assert tensor in of_weft[0].note
        assert {r.status for r in found if r.peer in (KERNELS, IDEAL)} == {OK}
        assert report.failures(found)


def failing_peer(rank: int, world_size: int) -> list[GroupRecord]:
    class Broken:
        name = note = "broken"

        def supports(self, workload, device):
            return None

        def prepare(self, batch, device):
            def attend(q, k, v):
                raise RuntimeError(f"no kernel for rank {rank}\nsecond line")

            return attend

    parallel = weft.ContextParallel()
    workload = Workload(ODD, world_size, SMALL)
    return context_parallel.run_workload(workload, replace(request(), peers=[Broken()]), parallel, CPU, ENVIRONMENT)


def test_a_peer_that_fails_is_absent_with_its_reason():
    for found in run_ranks(failing_peer, 2):
        broken = [r for r in found if r.peer == "broken"]
        assert {(r.status, r.note) for r in broken} == {(ABSENT, "failed with RuntimeError: no kernel for rank 0")}


# ---- parts ----------------------------------------------------------------------------------------------------------------


def counted_collectives(rank: int, world_size: int) -> tuple[list[int], list[int]]:
    """Bytes of each collective that a whole pass starts, and that its communication alone starts."""
    sent: list[int] = []
    gather, reduce = Ranks.all_gather, Ranks.reduce_scatter
    Ranks.all_gather = lambda self, buffer: (sent.append(buffer.nbytes), gather(self, buffer))[1]
    Ranks.reduce_scatter = lambda self, output, buffer: (sent.append(-buffer.nbytes), reduce(self, output, buffer))[1]
    parallel = weft.ContextParallel()
    workload = Workload(ODD, world_size, SMALL)
    work = context_parallel.rank_work(workload, rank, CPU, check=False)
    ways = group_ways.weft_ways(workload, parallel, work.batch, work.own, work.whole, None, None)
    found = []
    for name in (WEFT, COMMUNICATION):
        way = next(way for way in ways if way.name == name)
        way.forward()
        way.both()
        found.append(list(sent))
        sent.clear()
    return found[0], found[1]


def test_communication_alone_sends_what_the_whole_sends_in_the_same_order():
    for whole, alone in run_ranks(counted_collectives, 2):
        assert whole == alone
        # Two groups of heads: gathered in a forward; in a forward, a backward, and reduced.
        assert len(whole) == 2 + 2 + 2 + 2
        assert sum(bytes_ < 0 for bytes_ in whole) == 2


def met_before_calls(rank: int, world_size: int) -> dict[str, int]:
    """How often the ranks meet in a forward and in both passes, by way."""
    met: list[torch.device] = []
    honest = Ranks.meet
    Ranks.meet = lambda self, device: (met.append(device), honest(self, device))[1]
    workload = Workload(ODD, world_size, SMALL)
    work = context_parallel.rank_work(workload, rank, CPU, check=False)
    ways = group_ways.weft_ways(workload, weft.ContextParallel(), work.batch, work.own, work.whole, None, None)
    found = {}
    for way in ways:
        met.clear()
        way.forward()
        way.both()
        found[way.name] = len(met)
    return found


def test_only_kernels_in_step_wait_for_all_ranks_and_once_a_call():
    for found in run_ranks(met_before_calls, 2):
        assert found[IN_STEP] == 2
        assert sum(found.values()) == 2


def test_kernels_come_back_after_communication_alone():
    own = (gathered.attention_into, gathered.begin_backward)
    with group_ways.without_kernels():
        assert gathered.attention_into is not own[0]
        assert gathered.begin_backward is not own[1]
    assert (gathered.attention_into, gathered.begin_backward) == own


def measured_links(rank: int, world_size: int) -> list[tuple[str, int, bool, bool]]:
    ranks = Ranks.of()
    honest = links.measure_links(ranks, CPU, GroupClock(timing.HostClock(), ranks, CPU), PACE, (4096,))
    if rank == 1:
        gather = Ranks.all_gather

        def loses_everything(self: Ranks, buffer: torch.Tensor) -> types.SimpleNamespace:
            gather(self, buffer).wait()
            return types.SimpleNamespace(wait=buffer.zero_)

        Ranks.all_gather = loses_everything
    wrong = links._gather(ranks, CPU, 4096)
    wrong[0](0)
    is_right = wrong[1]()
    return [(link.operation, link.bytes_received, link.right, is_right) for link in honest]


def test_collectives_are_checked_and_counted_by_what_a_rank_receives():
    first, second = run_ranks(measured_links, 2)
    assert [found[:3] for found in first] == [(ALL_GATHER, 4096, True), (REDUCE_SCATTER, 4096, True)]
    assert [found[3] for found in (*first, *second)] == [True, True, False, False]


# ---- peers ----------------------------------------------------------------------------------------------------------------


def flash_on_the_reference(rank: int, world_size: int) -> list[GroupRecord]:
    def flash(q, k, v, cu_rows, cu_keys, longest_q, longest_k, causal):
        assert (longest_q, longest_k) == (int(cu_rows.diff().max()), int(cu_keys.diff().max()))
        return reference_attention(q, k, v, weft.Plan.from_cu_seqlens(cu_rows, cu_keys, causal=causal))[0]

    peers.flash_varlen = flash
    peer = group_peers.AllGatherTwoCalls("flash", group_peers.flash_half, needs_flash=False)
    parallel = weft.ContextParallel()
    workload = Workload(tuple(3 * n for n in DIVISIBLE), world_size, SMALL)
    return context_parallel.run_workload(workload, replace(request(), peers=[peer]), parallel, CPU, ENVIRONMENT)


def test_the_two_calls_peer_is_right_with_other_kernels_and_on_three_ranks():
    found = run_ranks(flash_on_the_reference, 3)[0]
    assert {r.status for r in found if r.peer == "flash"} == {OK}


def ring_on_formulas(rank: int, world_size: int, lengths: tuple[int, ...]) -> list[GroupRecord]:
    def probabilities(q, k, step, lse=None):
        """(H, rows, keys), and lse (H, rows): a document's last row is aligned with its last key."""
        plan = weft.Plan.from_cu_seqlens(step.cu_rows, step.cu_keys, causal=step.causal)
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("rhd,khd->hrk", q, keys) * q.shape[2] ** -0.5
        scores = scores.masked_fill(~plan.to_mask(), float("-inf"))
        lse = scores.logsumexp(dim=-1) if lse is None else lse
        return torch.exp(scores - lse[..., None]).nan_to_num(0.0), lse

    def forward(q, k, v, step):
        probs, lse = probabilities(q, k, step)
        return torch.einsum("hrk,khd->rhd", probs, v.repeat_interleave(2, dim=1)), lse, [lse.new_zeros(1)]

    def backward(dout, q, k, v, out, lse, step, rest):
        assert len(rest) == 1
        probs, _ = probabilities(q, k, step, lse)
        scale = q.shape[2] ** -0.5
        delta = (dout * out).sum(dim=-1).T[..., None]
        dscores = probs * (torch.einsum("rhd,khd->hrk", dout, v.repeat_interleave(2, dim=1)) - delta) * scale
        dq = torch.einsum("hrk,khd->rhd", dscores, k.repeat_interleave(2, dim=1))
        dk, dv = torch.einsum("hrk,rhd->khd", dscores, q), torch.einsum("hrk,rhd->khd", probs, dout)
        return dq, *(x.unflatten(1, (-1, 2)).sum(dim=2) for x in (dk, dv))

    group_ring.flash_forward, group_ring.flash_backward = forward, backward
    peer = group_ring.ZigzagRing()
    peer.supports = lambda workload, device: None
    parallel = weft.ContextParallel()
    workload = Workload(lengths, world_size, SMALL)
    return context_parallel.run_workload(workload, replace(request(), peers=[peer]), parallel, CPU, ENVIRONMENT)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ring_peer_is_right_whatever_kernels_it_runs(world_size: int):
    found = run_ranks(ring_on_formulas, world_size, tuple(2 * world_size * n for n in (3, 0, 1, 5)))[0]
    assert [(r.status, r.note) for r in found if r.peer == group_ring.ZigzagRing.name] == [(OK, group_ring.ZigzagRing.note)] * 2


@pytest.mark.parametrize("name", ["allgather-2calls-flash", "zigzag-ring-flash"])
def test_flash_needs_a_gpu_and_16_bits(name: str):
    peer = next(peer for peer in context_parallel.PEERS if peer.name == name)
    workload = Workload(DIVISIBLE, 2, SMALL)
    assert "CUDA" in str(peer.supports(workload, CPU))
    assert "16-bit" in str(peer.supports(workload, torch.device("cuda")))
    house = replace(workload, model=Model())
    assert peer.supports(house, torch.device("cuda")) is None
    assert "divides" in str(peer.supports(replace(house, lengths=ODD), torch.device("cuda")))


def test_unknown_peers_are_refused():
    assert len(context_parallel.chosen_peers(None)) == 3
    with pytest.raises(InvalidInput, match="expected one of"):
        context_parallel.chosen_peers(["spiral"])


def test_a_process_that_is_no_rank_is_told_how_to_start(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Unsupported, match="torchrun"):
        context_parallel.rank_device("cpu")
