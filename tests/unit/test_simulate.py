"""What the simulation promises: the ranks' work is the plans', the bytes are those that are sent, the schedule is the code's."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from weft_attn.bench import group_report, rates, simulate
from weft_attn.bench.cases import Model, log_normal_lengths
from weft_attn.bench.group_ways import BOTH, FORWARD, IDEAL, KERNELS, WEFT
from weft_attn.bench.measured_rates import rates_of
from weft_attn.bench.rates import ALL_GATHER, REDUCE_SCATTER, KernelRate, LinkRate, Rates
from weft_attn.bench.records import OK, RED, Environment, GroupRecord
from weft_attn.bench.workload import LONG_PER_GPU, PACKINGS_PER_GPU, Workload, document_lengths, workloads
from weft_attn.distributed.collectives import Ranks
from weft_attn.distributed.gathered import Call, gathered_attention
from weft_attn.distributed.groups import Groups, Pass
from weft_attn.distributed.shard import sharded_batch
from weft_attn.errors import InvalidInput, Unsupported
from weft_attn.plan.layouts import LAYOUTS

HOUSE = Model()
SMALL = Model(heads=4, kv_heads=2, head_dim=16, dtype_name="bf16")
ENVIRONMENT = Environment("a GPU", "2.11", "3.6.0", "0.1.0", None, "2026-01-02T03:04:05+00:00")
# Odd, even, shorter than the chunks, empty.
LENGTHS = (37, 0, 1, 64, 5, 0, 130)
BATCHES = {"mixed": LENGTHS, "one": (63,), "empty": (0, 0), "none": ()}


def measured(head_dim: int = 128, dtype_name: str = "bf16") -> Rates:
    """Rates that are easy to reckon with: 100 and 200 TFLOP/s, 100 GB/s of gathers and 50 GB/s of reductions."""
    kernels = tuple(KernelRate(p, 32 * 8192, 4096.0, t, "test") for p, t in (("forward", 100.0), ("backward", 200.0)))
    links = (LinkRate(ALL_GATHER, 2**20, 100.0, "test"), LinkRate(REDUCE_SCATTER, 2**20, 50.0, "test"))
    return Rates("a GPU", "2026-01-02", "torch", head_dim, dtype_name, kernels, links)


# ---- work -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_work_of_a_rank_is_its_plans(layout: str, world_size: int, lengths: tuple[int, ...]):
    workload = Workload(lengths, world_size, HOUSE, layout)
    tokens, pairs = simulate.work_by_rank(workload)
    cu_seqlens = workload.cu_seqlens.tobytes()
    for rank in range(world_size):
        batch = sharded_batch(layout, cu_seqlens, rank, world_size)
        assert (tokens[rank], pairs[rank]) == (batch.local, batch.plan(True, None).pairs)
        assert batch.pairs(True, (None, None)) == pairs.sum(), "the same on every rank"
    assert tokens.sum() == sum(lengths)
    assert pairs.sum() == sum(n * (n + 1) // 2 for n in lengths)


def test_documents_are_counted_whole_whatever_block_they_fall_into(monkeypatch: pytest.MonkeyPatch):
    workload = Workload(LENGTHS, 3, HOUSE)
    whole = simulate.work_by_rank(workload)
    monkeypatch.setattr(simulate, "BLOCK", 2)
    for one, other in zip(whole, simulate.work_by_rank(workload), strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize(("layout", "low", "high"), [("zigzag", 1.0, 1.01), ("striped", 1.0, 1.01), ("contiguous", 1.9, 2.0)])
def test_zigzag_balances_what_contiguous_does_not(layout: str, low: float, high: float):
    found = simulate.predict(Workload((65536, 32768, 3), 16, HOUSE, layout), simulate.Hardware(measured(), 50.0))
    assert low <= found.balance <= high


def test_a_thousand_ranks_and_thousands_of_documents_take_seconds():
    lengths = tuple(log_normal_lengths(4000, 2**20))
    begin = time.monotonic()
    for world_size in simulate.world_sizes("8..1024"):
        workload = Workload(lengths, world_size, HOUSE, max_gather_bytes=2**36)
        found = simulate.predict(workload, simulate.Hardware(measured(), 50.0))
        assert found.pairs == sum(n * (n + 1) // 2 for n in lengths)
    assert time.monotonic() - begin < 20


def test_one_rank_communicates_nothing_and_takes_its_kernels_time():
    found = simulate.predict(Workload(LENGTHS, 1, HOUSE), simulate.Hardware(measured()))
    assert (found.gathered_bytes, found.backward_bytes, found.memory_bytes, found.balance) == (0, 0, 0, 1.0)
    for time_of in (found.forward, found.backward):
        assert time_of.total_ms == time_of.kernels_ms == time_of.ideal_ms > 0
        assert time_of.communication_ms == time_of.exposed_ms == 0


def test_a_batch_without_tokens_has_no_time():
    found = simulate.predict(Workload((0, 0), 2, HOUSE), simulate.Hardware(measured()))
    assert (found.pairs, found.balance, found.forward.total_ms, found.forward.share_of_ideal) == (0, 1.0, 0.0, 1.0)


# ---- bytes ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CountingRanks(Ranks):
    """Ranks that send nothing, and count what they would receive from the others."""

    received: dict[str, int] = field(default_factory=lambda: {ALL_GATHER: 0, REDUCE_SCATTER: 0, "calls": 0})

    class Done:
        def wait(self) -> None:
            pass

    def all_gather(self, buffer: torch.Tensor) -> Done:
        assert buffer.is_contiguous()
        self.received[ALL_GATHER] += buffer.nbytes - self.own_rows(buffer).nbytes
        self.received["calls"] += 1
        buffer.zero_()
        return self.Done()

    def reduce_scatter(self, output: torch.Tensor, buffer: torch.Tensor) -> Done:
        assert buffer.nbytes == self.world_size * output.nbytes
        self.received[REDUCE_SCATTER] += output.nbytes * (self.world_size - 1)
        output.zero_()
        return self.Done()


def sliced(sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(map(slice, (0, *accumulate(sizes)), accumulate(sizes)))


@pytest.mark.parametrize("max_gather_bytes", [None, 200_000])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_predicted_bytes_and_groups_are_what_the_collectives_send(world_size: int, layout: str, max_gather_bytes: int | None):
    model = Model(heads=8, kv_heads=4, head_dim=16)
    workload = Workload(LENGTHS, world_size, model, layout, max_gather_bytes)
    found = simulate.predict(workload, simulate.Hardware(measured(head_dim=16)))
    batch = sharded_batch(layout, workload.cu_seqlens.tobytes(), 1, world_size)
    ranks = CountingRanks(None, 1, world_size)
    largest, in_turn = (4, None) if max_gather_bytes is None else (1, 2)
    call = Call(
        plan=batch.plan(True, None),
        ranks=ranks,
        rank_stride=batch.rank_stride,
        groups=Groups(
            Pass.each(sliced(found.forward_groups)),
            Pass(sliced(found.backward_groups), sliced(found.backward_gathers), sliced(found.backward_reduces)),
        ),
        largest=largest,
        in_turn=in_turn,
        softmax_scale=1.0,
        softcap=0.0,
        deterministic=False,
        keep_gathered=False,
        grad_reduce_dtype=torch.float32,
    )
    q = torch.randn(batch.local, 8, 16, dtype=model.dtype, requires_grad=True)
    k, v = (torch.randn(batch.local, 4, 16, dtype=model.dtype, requires_grad=True) for _ in range(2))
    out, _ = gathered_attention(q, k, v, None, call)
    assert ranks.received == {ALL_GATHER: found.gathered_bytes, REDUCE_SCATTER: 0, "calls": len(found.forward_groups)}
    out.sum().backward()
    received = ranks.received[ALL_GATHER] + ranks.received[REDUCE_SCATTER]
    assert received == found.gathered_bytes + found.backward_bytes
    assert len(found.backward_groups) == (2 if max_gather_bytes is None else 4)


# ---- time -----------------------------------------------------------------------------------------------------------------


def test_times_follow_from_rates():
    model = Model(heads=32, kv_heads=8, head_dim=128)
    workload = Workload((16384,), 2, model)
    found = simulate.predict(workload, simulate.Hardware(measured()))
    flops = 4 * 128 * 32 * found.pairs
    assert found.forward.kernels_ms == pytest.approx(flops / 2 / 100e9, rel=1e-3)
    assert found.backward.kernels_ms == pytest.approx(2.5 * flops / 2 / 200e9, rel=1e-3)
    assert found.forward.ideal_ms == pytest.approx(flops / 2 / 100e9)
    assert found.gathered_bytes == 8192 * 8 * 256 * 2
    assert found.forward.communication_ms == pytest.approx(found.gathered_bytes / 100e6)
    reduced = found.backward_bytes - found.gathered_bytes
    assert reduced == 2 * found.gathered_bytes
    assert found.backward.communication_ms == pytest.approx(found.gathered_bytes / 100e6 + reduced / 50e6)
    # Gathers of the other groups are hidden by the first, the reduce-scatters of all but the last by those that follow.
    assert found.forward.exposed_ms == pytest.approx(found.forward.communication_ms * found.forward_groups[0] / 8)
    gathered = found.backward_gathers[0] / 8 * found.gathered_bytes / 100e6
    assert found.backward.exposed_ms == pytest.approx(gathered + found.backward_reduces[-1] / 8 * reduced / 50e6)


def test_beyond_a_node_the_network_counts_and_without_one_every_link_is_as_measured():
    workload = Workload((65536,), 16, HOUSE)
    alike = simulate.Hardware(measured())
    assert alike.collective_ms(ALL_GATHER, 1e6, 16) == pytest.approx(15e6 / 100e6)
    assert simulate.predict(replace(workload, world_size=12), alike).forward.communication_ms > 0
    hardware = simulate.Hardware(measured(), network=5.0)
    # 15 shares over NVLink, or the other node's share of the rank's own place over the network.
    assert hardware.collective_ms(ALL_GATHER, 1e6, 16) == pytest.approx(max(15e6 / 100e6, 1e6 / 5e6))
    assert hardware.collective_ms(ALL_GATHER, 1e6, 8) == pytest.approx(7e6 / 100e6)
    with pytest.raises(Unsupported, match="whole nodes"):
        simulate.predict(replace(workload, world_size=12), hardware)


# ---- rates ----------------------------------------------------------------------------------------------------------------


def test_the_packages_rates_name_their_measurements():
    found = rates.packaged_rates()
    assert (found.device, found.head_dim, found.dtype_name) == ("NVIDIA H200", 128, "bf16")
    assert all(rate.source for rate in (*found.kernels, *found.links))
    assert {rate.pass_name for rate in found.kernels} == {"forward", "backward"}


def test_a_rate_is_the_measurement_where_there_is_one_and_between_them_elsewhere():
    found = rates.packaged_rates()
    for rate in found.kernels:
        at = np.array([float(rate.row_heads)]), np.array([rate.keys_per_row])
        assert found.kernel_tflops(rate.pass_name, *at) == pytest.approx(rate.tflops)
    slow, fast = (KernelRate("forward", 1000, keys, tflops, "test") for keys, tflops in ((100.0, 100.0), (10000.0, 500.0)))
    keys = np.array([200.0, 1000.0, 5000.0])
    between = replace(found, kernels=(slow, fast)).kernel_tflops("forward", np.full(3, 1000.0), keys)
    assert 100 < between[0] < between[1] < between[2] < 500


def test_links_are_interpolated_and_a_missing_reduction_counts_as_a_gather():
    links = (LinkRate(ALL_GATHER, 2**10, 10.0, "a"), LinkRate(ALL_GATHER, 2**20, 30.0, "b"))
    found = replace(measured(), links=links[::-1])
    assert [found.link_bytes_per_ms(ALL_GATHER, 2.0**power) / 1e6 for power in (5, 10, 15, 20, 25)] == pytest.approx(
        [10.0, 10.0, 20.0, 30.0, 30.0]
    )
    assert found.link_bytes_per_ms(REDUCE_SCATTER, 2.0**20) == pytest.approx(30e6)
    for lacking in (replace(found, links=()), replace(found, kernels=())):
        with pytest.raises(Unsupported, match="was measured"):
            simulate.predict(Workload((64,), 2, HOUSE), simulate.Hardware(lacking))


def test_rates_survive_their_file_and_other_files_are_refused(tmp_path: Path):
    rates.write_rates(measured(), tmp_path / "rates.json")
    assert rates.read_rates(tmp_path / "rates.json") == measured()
    (tmp_path / "other.json").write_text(json.dumps({"kernels": [], "links": []}))
    for name in ("other.json", "absent.json"):
        with pytest.raises(InvalidInput, match="expected"):
            rates.read_rates(tmp_path / name)


def test_rates_of_other_head_dims_and_dtypes_are_refused():
    for model in (replace(HOUSE, head_dim=64), replace(HOUSE, dtype_name="fp32")):
        with pytest.raises(Unsupported, match="write-rates"):
            simulate.predict(Workload((64,), 2, model), simulate.Hardware(measured()))


def test_a_cap_that_holds_no_head_is_refused():
    with pytest.raises(InvalidInput, match="on 2 ranks: max_gather_bytes"):
        simulate.predict(Workload((65536,), 2, HOUSE, max_gather_bytes=1000), simulate.Hardware(measured()))


# ---- against records ------------------------------------------------------------------------------------------------------


def record(peer: str, pass_name: str, milliseconds: float | None, workload: Workload | None, **rest: object) -> GroupRecord:
    status = OK if milliseconds else RED
    return GroupRecord("cp", "case", peer, pass_name, status, ENVIRONMENT, milliseconds=milliseconds, workload=workload, **rest)


def test_checking_compares_weft_with_its_prediction_and_nobody_else():
    workload = Workload((16384,), 2, HOUSE)
    hardware = simulate.Hardware(measured())
    found = simulate.predict(workload, hardware)
    records = [
        record(WEFT, FORWARD, 2 * found.forward.total_ms, workload),
        record(WEFT, BOTH, found.forward.total_ms + found.backward.total_ms, workload),
        record(KERNELS, FORWARD, found.forward.kernels_ms, workload),
        record(KERNELS, BOTH, None, workload),
        record("allgather-2calls-weft", FORWARD, 1.0, workload),
        record("nccl", ALL_GATHER, 1.0, None),
    ]
    checked = simulate.check_records(records, hardware)
    assert [one.record for one in checked] == records[:3]
    assert [one.error for one in checked] == pytest.approx([-0.5, 0.0, 0.0])


def test_rates_are_those_of_the_records():
    workload = Workload((16384,), 2, HOUSE)
    records = [
        record("nccl", REDUCE_SCATTER, 2.0, None, rate=64.0, bytes_received=2**20),
        record(KERNELS, FORWARD, 2.0, workload),
        record(KERNELS, BOTH, 7.0, workload),
        record(IDEAL, FORWARD, 2.0, workload),
        record(IDEAL, BOTH, 6.0, workload),
        record(WEFT, FORWARD, 1.0, workload),
    ]
    found = rates_of(records)
    flops = 4 * 128 * 32 * (16384 * 16385 // 2)
    by_key = {(k.pass_name, k.row_heads): k.tflops for k in found.kernels}
    assert by_key == {
        ("forward", 8192 * 32): pytest.approx(flops / 2 / 2e9, rel=1e-3),
        ("backward", 8192 * 32): pytest.approx(2.5 * flops / 2 / 5e9, rel=1e-3),
        ("forward", 16384 * 32): pytest.approx(flops / 4e9),
        ("backward", 16384 * 32): pytest.approx(2.5 * flops / 8e9),
    }
    assert found.links == (LinkRate(REDUCE_SCATTER, 2**20, 64.0, "nccl, case"),)
    assert (found.device, found.head_dim, found.dtype_name) == ("a GPU", 128, "bf16")
    with pytest.raises(Unsupported, match="expected kernels"):
        rates_of(records[:1])


# ---- workloads ------------------------------------------------------------------------------------------------------------


def test_the_house_workloads_are_the_packings_and_a_long_document_times_the_ranks():
    found = workloads(HOUSE, 2, quick=False, layout="zigzag", max_gather_bytes=None)
    assert [w.lengths for w in found] == [tuple(2 * n for n in lengths) for lengths in (*PACKINGS_PER_GPU, LONG_PER_GPU)]
    assert [w.tokens for w in found] == [16384] * 4 + [65536]
    assert found[1].name == "8K per GPU, [256, 7392, 544] x 2"
    assert Workload((3, 4), 2, HOUSE).name == "3 per GPU, [3, 4]"
    assert Workload((2,) * 9, 2, HOUSE).name == "9 per GPU, 9 documents"


def test_documents_are_described_in_words_or_in_a_file(tmp_path: Path):
    path = tmp_path / "lengths.txt"
    path.write_text("3, 4\n5\n")
    assert document_lengths("3,4,5", None) == document_lengths(str(path), 12) == (3, 4, 5)
    assert document_lengths("equal:5", 12) == (5, 5, 2)
    assert document_lengths("5", 12) == (2, 2, 3, 2, 3)
    assert document_lengths("12", 12) == (12,)
    assert document_lengths("lognormal:7:3", 100) == tuple(log_normal_lengths(7, 100, 3))
    assert document_lengths("lognormal:7", 100) == tuple(log_normal_lengths(7, 100))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("3,4", 8),
        ("9", 8),
        ("0", 8),
        ("a,b", None),
        ("lognormal:4", None),
        ("lognormal:x", 9),
        ("lognormal:1:2:3", 9),
        ("equal:0", 9),
        (",", None),
    ],
)
def test_documents_that_make_no_sense_are_refused(text: str, tokens: int | None):
    with pytest.raises(InvalidInput, match="expected"):
        document_lengths(text, tokens)


@pytest.mark.parametrize(
    ("text", "tokens", "words"),
    [
        ("20", 10, r"counts documents: expected 1 to 10 .* lengths separated by commas.* lognormal:N\[:SEED\], given 20"),
        ("0", 10, "counts documents: expected 1 to 10"),
        ("-2", 10, "counts documents: expected 1 to 10"),
        ("3,4", 8, "sum to --tokens: expected a sum of 8, given 7 from '3,4'"),
        ("3,-4,9", 8, "a length counts tokens: expected >= 0, given -4"),
        ("-4", None, "a length counts tokens: expected >= 0, given -4"),
        ("0", None, "counts documents only with --tokens: expected a sum >= 1 of lengths separated by commas.*, given 0"),
        ("0,0", None, "lengths hold tokens.* expected a sum >= 1 of .*, given 0"),
        ("3", 0, "--tokens counts tokens: expected >= 1, given 0"),
        ("lognormal:0", 10, "every document has a token"),
        ("lognormal:4:-1", 10, "seed"),
        ("", None, "lengths separated by commas"),
    ],
)
def test_what_documents_take_is_said_where_something_else_is_given(text: str, tokens: int | None, words: str):
    with pytest.raises(InvalidInput, match=words):
        document_lengths(text, tokens)


def test_a_document_may_be_empty_and_a_list_may_be_long(tmp_path: Path):
    assert document_lengths("3,0,4", None) == (3, 0, 4)
    assert document_lengths(",".join(["7"] * 2000), 14000) == (7,) * 2000
    (tmp_path / "one.txt").write_text("12")
    with pytest.raises(InvalidInput, match="expected a sum of 24, given"):
        document_lengths(str(tmp_path / "one.txt"), 24)


def test_negative_lengths_are_refused():
    with pytest.raises(InvalidInput, match="length counts tokens"):
        Workload((3, -1), 2, HOUSE)


def test_world_sizes_double_or_are_named():
    assert simulate.world_sizes("8..1024") == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert simulate.world_sizes("3..13") == [3, 6, 12]
    assert simulate.world_sizes("2,4,6") == [2, 4, 6]
    for text in ("", "8..4", "0..8", "a", "0", "2,-1"):
        with pytest.raises(InvalidInput, match="world sizes"):
            simulate.world_sizes(text)


def test_the_report_says_where_rates_come_from_and_what_is_missing():
    hardware = simulate.Hardware(replace(measured(), links=measured().links[:1]))
    lines = "\n".join(group_report.sources(hardware))
    assert "forward 100, backward 200 TFLOP/s at 4,096 keys a row: test" in lines
    assert "reduce_scatter: not measured, taken as all_gather's" in lines
    assert "--link-gbps" in lines
