"""What a batch costs on any number of ranks, from the layout's own formula and measured rates.

A pass goes through groups of KV heads as `ContextParallel` does; `distributed/groups.py` says which, and when their launches and collectives
run beside each other (`overlapped_ms`). Here with the slowest rank's kernels and collectives as long as they were measured. Ranks work at the rate that one GPU was measured at for as many rows and keys a row, links at that of a collective of the size.
Ranks in nodes of 8: a collective passes every byte from other nodes over the network once for each of the node's GPUs, and every
byte from other ranks over NVLink; both run at once, so the slower counts. Nothing else is modelled: no latency, no host time, no
slowing of kernels by collectives that run beside them. `check_records` says by how much that is off where it was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft_attn.bench.cases import PASSES
from weft_attn.bench.group_ways import BOTH, COMMUNICATION, KERNELS, WEFT
from weft_attn.bench.rates import ALL_GATHER, GPUS_PER_NODE, REDUCE_SCATTER, Rates
from weft_attn.bench.records import GroupRecord
from weft_attn.bench.workload import Workload
from weft_attn.distributed.groups import Groups, counts, head_groups, head_times, overlapped_ms
from weft_attn.distributed.memory import Memory, plan_memory
from weft_attn.errors import InvalidInput, Unsupported, require
from weft_attn.plan.build import concat_lengths
from weft_attn.plan.cost import BACKWARD_OVER_FORWARD, causal_pairs_by_rank
from weft_attn.plan.layouts import layout_named

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MOST_DOUBLINGS = 32
# Documents whose chunks are laid out at a time: tables of 2 W columns for each.
BLOCK = 256
# Gradients are reduced in float32, as `ContextParallel` does unless told otherwise.
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Hardware:
    """Rates of the GPUs and of NVLink, and the network between nodes.

    Attributes:
        network: GB/s per GPU and direction between nodes of 8 GPUs; None: every link is taken to be as fast as the measured ones.
    """

    rates: Rates
    network: float | None = None

    def __post_init__(self) -> None:
        require(self.network is None or self.network > 0, "the network's rate is a rate", expected="> 0", given=self.network)

    def collective_ms(self, operation: str, share_bytes: float, world_size: int) -> float:
        """Milliseconds of a collective in which every rank receives `share_bytes` from each other rank."""
        if world_size == 1:
            return 0.0
        received = share_bytes * (world_size - 1)
        inside = received / self.rates.link_bytes_per_ms(operation, received)
        if world_size <= GPUS_PER_NODE or self.network is None:
            return inside
        nodes = world_size // GPUS_PER_NODE
        return max(inside, share_bytes * (nodes - 1) / (self.network * 1e6))


@dataclass(frozen=True)
class PassTime:
    """Milliseconds of a pass.

    Attributes:
        kernels_ms: of the slowest rank; communication_ms: of all collectives alone; total_ms: overlapped.
        ideal_ms: the whole work on one GPU, over the ranks.
    """

    kernels_ms: float
    communication_ms: float
    total_ms: float
    ideal_ms: float

    @property
    def exposed_ms(self) -> float:
        """Communication that no kernel hides."""
        return self.total_ms - self.kernels_ms

    @property
    def share_of_ideal(self) -> float:
        return self.ideal_ms / self.total_ms if self.total_ms else 1.0


@dataclass(frozen=True)
class Prediction:
    """What a workload does to its ranks.

    Attributes:
        rank_tokens, pairs: most rows of a rank; visible pairs of all.
        balance: most pairs of a rank over the mean.
        gathered_bytes: received by a rank in the forward; backward_bytes: received in the backward, gathers and reductions.
        memory_bytes: extra memory of the worst moment.
        forward_groups, backward_groups: KV heads of each launch, in order of work; each of the forward's is gathered by itself.
        backward_gathers, backward_reduces: KV heads of each of the backward's collectives.
        forward, backward: times of the passes.
    """

    workload: Workload
    rank_tokens: int
    pairs: int
    balance: float
    gathered_bytes: int
    backward_bytes: int
    memory_bytes: int
    forward_groups: tuple[int, ...]
    backward_groups: tuple[int, ...]
    backward_gathers: tuple[int, ...]
    backward_reduces: tuple[int, ...]
    forward: PassTime
    backward: PassTime


# ---- a workload -----------------------------------------------------------------------------------------------------------


def predict(workload: Workload, hardware: Hardware) -> Prediction:
    """What a workload costs on its ranks.

    Raises:
        Unsupported: the rates are of another head dim or dtype, or the ranks fill no whole nodes.
        InvalidInput: the cap of the gathered bytes holds not one KV head.
    """
    model, world_size = workload.model, workload.world_size
    _require_rates(workload, hardware)
    tokens, pairs = work_by_rank(workload)
    memory = _memory(workload, int(tokens.max()))
    groups = _groups(workload, int(tokens.max()), int(pairs.sum()), memory)
    row_bytes = int(tokens.max()) * model.kv_heads * 2 * model.head_dim
    shares = row_bytes * model.dtype.itemsize, row_bytes * GRADIENT_BYTES
    forward, backward = _times(workload, hardware, tokens, pairs, groups, memory.in_turn, *shares)
    return Prediction(
        workload=workload,
        rank_tokens=int(tokens.max()),
        pairs=int(pairs.sum()),
        balance=float(pairs.max() / pairs.mean()) if pairs.any() else 1.0,
        gathered_bytes=shares[0] * (world_size - 1),
        backward_bytes=sum(shares) * (world_size - 1),
        memory_bytes=memory.backward,
        forward_groups=tuple(counts(groups.forward.attention)),
        backward_groups=tuple(counts(groups.backward.attention)),
        backward_gathers=tuple(counts(groups.backward.gathers)),
        backward_reduces=tuple(counts(groups.backward.reduces)),
        forward=forward,
        backward=backward,
    )


def _memory(workload: Workload, rank_stride: int) -> Memory:
    model = workload.model
    try:
        return plan_memory(
            world_size=workload.world_size,
            rank_stride=rank_stride,
            kv_heads=model.kv_heads,
            head_dims=2 * model.head_dim,
            element_bytes=model.dtype.itemsize,
            gradient_bytes=GRADIENT_BYTES,
            limit=workload.max_gather_bytes,
            keep_gathered=False,
        )
    except InvalidInput as error:
        raise InvalidInput(f"on {workload.world_size} ranks: {error}") from None


def _groups(workload: Workload, rank_stride: int, pairs: int, memory: Memory) -> Groups:
    """What `ContextParallel` chooses."""
    model = workload.model
    times = head_times(
        world_size=workload.world_size,
        rank_stride=rank_stride,
        pairs=pairs,
        heads_each=model.heads // model.kv_heads,
        head_dims=2 * model.head_dim,
        element_bytes=model.dtype.itemsize,
        gradient_bytes=GRADIENT_BYTES,
    )
    return head_groups(model.kv_heads, memory.largest, memory.in_turn, False, *times)


def work_by_rank(workload: Workload) -> tuple[IntArray, IntArray]:
    """(W,) rows and (W,) visible pairs of every rank."""
    layout = layout_named(workload.layout)
    tokens = pairs = np.zeros(workload.world_size, dtype=np.int64)
    # By blocks of documents: a layout's tables have a column for every chunk of a document.
    lengths = np.array(workload.lengths, dtype=np.int64)
    for block in np.split(lengths, range(BLOCK, len(lengths), BLOCK)):
        placed = layout.of(concat_lengths(block.tolist()), workload.world_size)
        tokens, pairs = tokens + placed.rank_tokens, pairs + causal_pairs_by_rank(placed)
    return tokens, pairs


def _times(
    workload: Workload,
    hardware: Hardware,
    tokens: IntArray,
    pairs: IntArray,
    groups: Groups,
    in_turn: int | None,
    gather_bytes: int,
    reduce_bytes: int,
) -> tuple[PassTime, PassTime]:
    """Of a forward and a backward; `gather_bytes` and `reduce_bytes` are a rank's of all heads."""
    world_size, kv_heads = workload.world_size, workload.model.kv_heads
    found = []
    for pass_name, of_pass, reduced in zip(PASSES, (groups.forward, groups.backward), (0, reduce_bytes), strict=True):
        kernels = [
            float(kernels_ms(workload, hardware.rates, pass_name, tokens, pairs, n).max()) for n in counts(of_pass.attention)
        ]
        gathers, reduces = (
            [hardware.collective_ms(operation, n / kv_heads * share, world_size) if share else 0.0 for n in counts(heads)]
            for operation, heads, share in (
                (ALL_GATHER, of_pass.gathers, gather_bytes),
                (REDUCE_SCATTER, of_pass.reduces, reduced),
            )
        )
        whole = kernels_ms(workload, hardware.rates, pass_name, tokens.sum(keepdims=True), pairs.sum(keepdims=True), kv_heads)
        total = overlapped_ms(of_pass, kernels, gathers, reduces, in_turn)
        found.append(PassTime(sum(kernels), sum(gathers) + sum(reduces), total, float(whole[0]) / world_size))
    return found[0], found[1]


def kernels_ms(
    workload: Workload, rates: Rates, pass_name: str, tokens: IntArray, pairs: IntArray, kv_heads: int
) -> FloatArray:
    """Milliseconds of the kernels of so many KV heads for each entry of tokens and pairs, one rank each."""
    model = workload.model
    heads = model.heads // model.kv_heads * kv_heads
    flops = 4.0 * model.head_dim * heads * pairs * (1 if pass_name == "forward" else BACKWARD_OVER_FORWARD)
    tflops = rates.kernel_tflops(pass_name, np.float64(heads) * tokens, np.float64(1) * pairs / np.maximum(tokens, 1))
    return flops / tflops * 1e-9


def _require_rates(workload: Workload, hardware: Hardware) -> None:
    rates = hardware.rates
    model, world_size = workload.model, workload.world_size
    require(
        (model.head_dim, model.dtype_name) == (rates.head_dim, rates.dtype_name),
        "the rates are of this head dim and dtype (others: `weft bench cp --write-rates`)",
        expected=f"head dim {rates.head_dim}, {rates.dtype_name}",
        given=f"head dim {model.head_dim}, {model.dtype_name}",
        error=Unsupported,
    )
    require(
        hardware.network is None or world_size <= GPUS_PER_NODE or world_size % GPUS_PER_NODE == 0,
        "ranks fill whole nodes",
        expected=f"at most {GPUS_PER_NODE} ranks or a multiple of it",
        given=world_size,
        error=Unsupported,
    )


def world_sizes(text: str) -> list[int]:
    """ "8..1024" doubles from 8 to 1024; "2,4,6" and "16" are themselves.

    Raises:
        InvalidInput: none of these.
    """
    try:
        if ".." in text:
            first, last = (int(part) for part in text.split(".."))
            found = [first << step for step in range(MOST_DOUBLINGS) if 1 <= first << step <= last]
        else:
            found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise InvalidInput(f"world sizes are given: expected FIRST..LAST, or sizes separated by commas, given {text!r}")
    return found


# ---- against what was measured --------------------------------------------------------------------------------------------


# What a record's time is predicted from.
PREDICTED: dict[str, Callable[[PassTime], float]] = {
    WEFT: lambda time: time.total_ms,
    KERNELS: lambda time: time.kernels_ms,
    COMMUNICATION: lambda time: time.communication_ms,
}


@dataclass(frozen=True)
class Checked:
    """A record and what was predicted for it."""

    record: GroupRecord
    predicted_ms: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        assert self.record.milliseconds is not None
        return self.predicted_ms / self.record.milliseconds - 1


def check_records(records: Sequence[GroupRecord], hardware: Hardware) -> list[Checked]:
    """Predictions for the records of `weft bench cp` that Weft's own passes have a prediction for: whole passes, kernels alone
    and communication alone.
    """
    found = []
    for record in records:
        if record.workload is None or record.milliseconds is None or record.peer not in PREDICTED:
            continue
        prediction = predict(record.workload, hardware)
        part = PREDICTED[record.peer]
        milliseconds = part(prediction.forward) + (part(prediction.backward) if record.pass_name == BOTH else 0.0)
        found.append(Checked(record, milliseconds))
    return found
