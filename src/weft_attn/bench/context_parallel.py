"""Context parallelism measured on the ranks of a group: whole, in parts, beside its peers, each checked on every rank.

Every rank runs everything and ends up with the same records, of which one rank prints and writes. A figure is the slowest rank's
time; a result that is wrong on any rank takes the figure away on all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

import weft_attn as weft
from weft_attn.bench import links
from weft_attn.bench.cases import Case, Model, PackedDocuments, Tensors, chosen_device, make_tensors
from weft_attn.bench.group_peers import TWO_CALLS, GroupPeer
from weft_attn.bench.group_ring import ZigzagRing
from weft_attn.bench.group_timing import GroupClock, GroupSamples, interleave_over_ranks, milliseconds_between, now
from weft_attn.bench.group_ways import FORWARD, IDEAL, OWN_PASSES, WEFT, Grouping, Way, watched_launches, weft_ways
from weft_attn.bench.oracle import Oracle, build_oracle, wrong_tensors
from weft_attn.bench.records import ABSENT, OK, RED, UNCHECKED, Environment, GroupRecord, environment_of, first_line
from weft_attn.bench.report import share_of_bound
from weft_attn.bench.timing import Notify, Pace, Samples, clock_of, silent
from weft_attn.bench.workload import WORK, Workload, workloads
from weft_attn.distributed.collectives import Ranks
from weft_attn.distributed.memory import Memory
from weft_attn.distributed.process_group import own_device
from weft_attn.distributed.shard import ShardedBatch, sharded_batch
from weft_attn.errors import InvalidInput, Unsupported, require
from weft_attn.plan.slices import Plan
from weft_attn.testing.compare import Budget

SUITE = "cp"
ITERATIONS = "it/s"
# The name, beside those of workloads, of the collectives alone.
LINKS = "links"

PEERS: tuple[GroupPeer, ...] = (*TWO_CALLS, ZigzagRing())

Batches = Iterator[list[GroupRecord]]


def chosen_peers(wanted: Sequence[str] | None) -> list[GroupPeer]:
    """The peers of these names, None: all.

    Raises:
        InvalidInput: a name that is no peer's.
    """
    known = {peer.name: peer for peer in PEERS}
    for name in wanted or ():
        if name not in known:
            raise InvalidInput(f"the peer is known: expected one of {sorted(known)}, given {name!r}")
    return [peer for name, peer in known.items() if wanted is None or name in wanted]


def chosen_groupings(wanted: Sequence[str] | None) -> list[Grouping]:
    """Groupings in order, each once; none for None.

    Raises:
        InvalidInput: none of them, or what is none.
    """
    require(wanted is None or bool(wanted), "groups of heads are given", expected="such as 4 or 1+6+1", given="none")
    return sorted({Grouping.named(text) for text in wanted or ()})


def chosen_work(name: str | None) -> str | None:
    """Raises InvalidInput: neither LINKS nor a name of workloads."""
    known = (LINKS, *WORK)
    require(name in (None, *known), "what is measured has a name", expected=f"one of {list(known)}", given=repr(name))
    return name


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        peers: who is measured beside Weft.
        device_name: "cuda" (each rank its own GPU) or "cpu".
        layout, max_gather_bytes: as `ContextParallel` takes them.
        copy_engines: gather into symmetric memory; the default group asks NCCL for no multiprocessors.
        groupings: groups of KV heads to try beside what Weft chooses; a case whose cap or heads do not allow one leaves it out.
        work: LINKS: only the collectives; "packings" or "long": only these workloads; None: all of it.
        check: whether results are checked before they are timed.
        quick: tiny workloads.
    """

    model: Model
    peers: Sequence[GroupPeer]
    device_name: str
    pace: Pace
    layout: str = "zigzag"
    max_gather_bytes: int | None = None
    copy_engines: bool = False
    groupings: Sequence[Grouping] = ()
    work: str | None = None
    check: bool = True
    quick: bool = False


def rank_device(device_name: str) -> torch.device:
    """The device of this process of a `torchrun` job.

    Raises:
        InvalidInput: a device of one number, for all ranks.
        Unsupported: this process was not started as a rank; there is no such device.
    """
    require(device_name in ("cuda", "cpu"), "ranks have devices of their own", expected="cuda or cpu", given=repr(device_name))
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise Unsupported(
            "each rank is a process: expected a start by `torchrun --nproc-per-node N -m weft_attn.cli.main bench cp`, "
            f"given an environment without {', '.join(missing)}"
        )
    return own_device(chosen_device(device_name).type == "cuda")


def run_group(request: Request, device: torch.device, notify: Notify = silent) -> Batches:
    """The records of the collectives, then of one workload after the other, as far as they are asked for; collective.

    Raises:
        Unsupported: the collectives alone, or copy engines, of one rank.
    """
    environment = environment_of(device)
    parallel = weft.ContextParallel(
        layout=request.layout, max_gather_bytes=request.max_gather_bytes, symmetric_memory=request.copy_engines
    )
    chosen = workloads(
        request.model,
        parallel.world_size,
        quick=request.quick,
        layout=request.layout,
        max_gather_bytes=request.max_gather_bytes,
        work=request.work,
    )
    if parallel.world_size == 1 and request.work == LINKS:
        raise Unsupported("one rank has no collectives: expected two ranks or more with --work links, given one")
    if parallel.world_size == 1 and request.copy_engines:
        raise Unsupported("one rank gathers nothing: expected two ranks or more with --copy-engines, given one")
    # They use ordinary memory.
    if parallel.world_size > 1 and request.work in (None, LINKS) and not request.copy_engines:
        notify("collectives alone")
        yield link_records(request, device, environment)
    for workload in chosen:
        yield run_workload(workload, request, parallel, device, environment, notify)


@dataclass(frozen=True)
class RankWork:
    """A workload as one rank sees it.

    Attributes:
        own, own_oracle: tensors of this rank's tokens, in its order, and what they must come out as.
        whole, whole_oracle: of the whole batch; the samples are this rank's tokens too.
    """

    workload: Workload
    case: Case
    batch: ShardedBatch
    own: Tensors
    whole: Tensors
    own_oracle: Oracle | None
    whole_oracle: Oracle | None


def rank_work(workload: Workload, rank: int, device: torch.device, *, check: bool) -> RankWork:
    """Draw the whole batch, the same on every rank, and take this rank's part."""
    cu_seqlens = workload.cu_seqlens
    plan = Plan.from_cu_seqlens(cu_seqlens, cu_seqlens, causal=True)
    layout = PackedDocuments(tuple(cu_seqlens.tolist()))
    case = Case(suite=SUITE, name=workload.name, plan=plan, layout=layout, model=workload.model, causal=True)
    whole = make_tensors(case, device)
    batch = sharded_batch(workload.layout, cu_seqlens.tobytes(), rank, workload.world_size)
    q, k, v, dout = (x.index_select(0, batch.on(device, "tokens")) for x in (whole.q, whole.k, whole.v, whole.dout))
    own_oracle = whole_oracle = None
    if check:
        # A rank's tokens rise: documents come in order, and so do the chunks inside them.
        whole_oracle = build_oracle(case, whole, among=batch.tokens)
        rows, keys = (
            torch.from_numpy(np.searchsorted(batch.tokens, x.cpu().numpy())).to(device)
            for x in (whole_oracle.rows, whole_oracle.keys)
        )
        own_oracle = replace(whole_oracle, rows=rows, keys=keys)
    return RankWork(workload, case, batch, Tensors(q, ((k, v),), dout), whole, own_oracle, whole_oracle)


def run_workload(
    workload: Workload,
    request: Request,
    parallel: weft.ContextParallel,
    device: torch.device,
    environment: Environment,
    notify: Notify = silent,
) -> list[GroupRecord]:
    """Records of every way and pass of a workload, the same on every rank; collective.

    What goes wrong inside a peer makes it absent; what goes wrong inside Weft is raised.
    """
    notify(f"{workload.name}: exact answer")
    work = rank_work(workload, parallel.rank, device, check=request.check)
    template = partial(
        GroupRecord,
        suite=SUITE,
        case=workload.name,
        environment=environment,
        workload=workload,
        plan_digest=work.case.plan_digest,
        pairs=work.case.plan.pairs,
        heads=workload.model.name,
    )
    ways, absent = _ways(work, parallel, request, device)
    records = [
        template(peer=name, pass_name=one, status=ABSENT, note=why) for name, why in absent.items() for one in OWN_PASSES
    ]
    ready: list[Way] = []
    found: dict[str, dict[str, dict[str, Budget]]] = {}
    for way in ways:
        notify(f"{workload.name}: {way.name}")
        budgets, reason = _first_run(way)
        wrong = wrong_tensors({name: one for of_pass in budgets.values() for name, one in of_pass.items()})
        if reason or wrong:
            status = ABSENT if reason else RED
            records += [
                template(peer=way.name, pass_name=one, status=status, note=reason or wrong, budgets=budgets.get(one, {}))
                for one in OWN_PASSES
            ]
            continue
        ready.append(way)
        found[way.name] = budgets

    clock = GroupClock(clock_of(device), Ranks.of(), device)
    for pass_name in OWN_PASSES:
        notify(f"{workload.name}: timing {pass_name}")
        peaks = {way.name: _peak_bytes(way, pass_name, device) for way in ready}
        samples = interleave_over_ranks({way.name: way.call(pass_name) for way in ready}, clock, request.pace)
        outside = {way.name: outside_ms(way, pass_name, device, request.pace.rounds) for way in ready if way.is_whole}
        for way in ready:
            record = template(
                peer=way.name,
                pass_name=pass_name,
                outside_ms=outside.get(way.name),
                status=OK if request.check else UNCHECKED,
                note=way.note,
                budgets=found[way.name][pass_name],
                peak_bytes=peaks[way.name],
                formula_bytes=_formula_bytes(workload, parallel, pass_name) if way.name == WEFT else None,
            )
            records.append(with_figure(record, samples, workload.world_size))
    return sorted(records, key=lambda record: OWN_PASSES.index(record.pass_name))


def with_figure(record: GroupRecord, samples: Mapping[str, GroupSamples], world_size: int) -> GroupRecord:
    """The record with what the samples of its way say, beside the ideal's and Weft's in the same rounds."""
    times = {name: _over(one.mean, world_size) if name == IDEAL else one.slowest for name, one in samples.items()}
    own, ideal, ours = times[record.peer], times.get(IDEAL), times.get(WEFT)
    slowest = None if ideal is None else _over(samples[IDEAL].of_slowest_rank, world_size)
    return replace(
        record,
        milliseconds=own.median,
        quartiles=own.quartiles,
        rate=1e3 / own.median,
        unit=ITERATIONS,
        ratio_to_weft=None if ours is None else own.speed_over(ours),
        share_of_ideal=None if ideal is None else own.speed_over(ideal),
        share_of_slowest_ideal=None if slowest is None or record.peer == IDEAL else own.speed_over(slowest),
        spread_ms=samples[record.peer].spread_ms,
    )


def _over(samples: Samples, world_size: int) -> Samples:
    """Times divided by the ranks: of work that each rank does whole."""
    return Samples(tuple(ms / world_size for ms in samples.milliseconds))


def _ways(
    work: RankWork, parallel: weft.ContextParallel, request: Request, device: torch.device
) -> tuple[list[Way], dict[str, str]]:
    """Weft's ways and the peers' that can, and why the others cannot."""
    heads, largest = work.workload.model.kv_heads, _memory(work.workload, parallel).largest
    obstacles = {grouping: grouping.obstacle(heads, largest) for grouping in request.groupings}
    absent = {grouping.way: why for grouping, why in obstacles.items() if why}
    groupings = [grouping for grouping, why in obstacles.items() if not why]
    ways = weft_ways(work.workload, parallel, work.batch, work.own, work.whole, work.own_oracle, work.whole_oracle, groupings)
    for peer in request.peers:
        reason = peer.supports(work.workload, device)
        if reason is None:
            attend = peer.prepare(work.batch, device)
            ways.append(Way(peer.name, attend, work.own, work.own_oracle, is_peer=True, note=peer.note))
        else:
            absent[peer.name] = reason
    return ways, absent


def _first_run(way: Way) -> tuple[dict[str, dict[str, Budget]], str]:
    """Run every pass once, on all ranks; the worst budget of any rank by pass and tensor, and why a peer failed."""
    found, reason = {}, ""
    try:
        found = {pass_name: way.check(pass_name) for pass_name in OWN_PASSES}
    except Exception as error:
        if not way.is_peer:
            raise
        reason = f"failed with {first_line(error)}"
    everyone: list[tuple[dict[str, dict[str, Budget]], str]] = [({}, "")] * dist.get_world_size()
    dist.all_gather_object(everyone, (found, reason))
    reasons = [why for _, why in everyone if why]
    if reasons:
        return {}, reasons[0]
    return {
        pass_name: {name: max((b[pass_name][name] for b, _ in everyone), key=share_of_bound) for name in budgets}
        for pass_name, budgets in found.items()
    }, ""


def outside_ms(way: Way, pass_name: str, device: torch.device, calls: int) -> float:
    """Milliseconds of a call outside its attention launches, on the rank where that is least, the median of `calls`; collective.

    The rank whose launches take longest is the one that waits for nobody.
    """
    call = way.call(pass_name)
    # Runs while the host enqueues the first measured call; nothing is waited for before the last one.
    call(0)
    seen = []
    for turn in range(calls):
        with watched_launches(device) as launches:
            first = now(device)
            call(turn)
            seen.append((first, now(device), launches))
    found = [
        milliseconds_between(first, last) - sum(milliseconds_between(*launch) for launch in launches)
        for first, last, launches in seen
    ]
    least = torch.tensor(found, dtype=torch.float64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(np.median(least.tolist()))


def _peak_bytes(way: Way, pass_name: str, device: torch.device) -> int | None:
    """Most bytes that a call of the pass holds beyond what was held before it, on the rank with most."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    way.call(pass_name)(0)
    torch.cuda.synchronize()
    most = torch.tensor([torch.cuda.max_memory_allocated(device) - before], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())


def _memory(workload: Workload, parallel: weft.ContextParallel) -> Memory:
    model = workload.model
    return parallel.memory(
        workload.cu_seqlens, heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim, dtype=model.dtype
    )


def _formula_bytes(workload: Workload, parallel: weft.ContextParallel, pass_name: str) -> int:
    memory = _memory(workload, parallel)
    return memory.forward if pass_name == FORWARD else memory.backward


def link_records(request: Request, device: torch.device, environment: Environment) -> list[GroupRecord]:
    """The collectives alone, by size; collective."""
    ranks = Ranks.of()
    clock = GroupClock(clock_of(device), ranks, device)
    sizes = links.QUICK_SIZES if request.quick else links.SIZES
    records = []
    for link in links.measure_links(ranks, device, clock, request.pace, sizes):
        time = link.samples.slowest
        figures = {
            "milliseconds": time.median,
            "quartiles": time.quartiles,
            "rate": link.bytes_received / time.median / 1e6,
            "unit": links.GIGABYTES,
            "spread_ms": link.samples.spread_ms,
        }
        records.append(
            GroupRecord(
                suite=SUITE,
                case=f"{link.bytes_received / 2**20:.3g} MiB received",
                peer=str(dist.get_backend()),
                pass_name=link.operation,
                status=OK if link.right else RED,
                note=_backend() if link.right else "a rank holds other values than the ranks sent",
                environment=environment,
                bytes_received=link.bytes_received,
                **(figures if link.right else {}),  # type: ignore[arg-type]
            )
        )
    return records


def _backend() -> str:
    """What the collectives run with, as far as their speed depends on it."""
    if dist.get_backend() != "nccl":
        return "gloo"
    version = ".".join(map(str, torch.cuda.nccl.version()))
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")]
    return ", ".join([f"NCCL {version}", *settings])
