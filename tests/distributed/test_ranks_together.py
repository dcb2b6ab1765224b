"""What several ranks do together: overlap, memory, repeatability, disagreement, compilation, meshes, checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

import weft_attn as weft
from weft_attn.distributed import context_parallel, gathered
from weft_attn.distributed.collectives import Ranks
from weft_attn.testing.cases import Case, make_inputs
from weft_attn.testing.parallel import OrdinaryWindows, ParallelCase
from weft_attn.testing.ranks import run_ranks

CU = [0, 9, 9, 10, 33]
CASE = ParallelCase(
    lengths=(9, 0, 1, 23), attention=Case(heads=8, kv_heads=4, head_dim_v=24, sinks=True), heads_per_group=1
)  # fmt: skip


def local_tensors(cp: weft.ContextParallel, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    x = make_inputs(CASE.attention, CASE.whole_plan)
    return [cp.shard(CU, t.to(dtype)).requires_grad_() for t in (x.q, x.k, x.v)]


def attention(cp: weft.ContextParallel, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    out = cp.attention(*tensors, CU, **options)
    assert isinstance(out, torch.Tensor)
    return out


def together(rank: int, world_size: int, names: list[str]) -> dict[str, Any]:
    """Most questions of this file in one spawn: what each function below finds on this rank."""
    return {name: QUESTIONS[name](rank, world_size) for name in names}


# ---- order and memory -----------------------------------------------------------------------------------------------------


def order_of_work(rank: int, world_size: int) -> list[list[str]]:
    """Starts and ends of collectives, and computations, as a call's forward and backward make them: in turn, uneven, merged, and
    where gathers take no multiprocessors.
    """
    uneven = replace(CASE, heads_per_group=None, group_sizes=((1, 3), (1, 2, 1)))
    merged = replace(uneven, merged=True)
    return [logged_work(case) for case in (CASE, uneven, merged, replace(merged, symmetric_memory=True))]


def logged_work(case: ParallelCase) -> list[str]:
    cp, log = case.parallel(), []

    class Logged:
        def __init__(self, pending: Any, name: str) -> None:
            self.pending, self.name = pending, name

        def wait(self) -> None:
            log.append(f"{self.name} done")
            self.pending.wait()

    def logged(name: str, original: Any, collective: bool) -> Any:
        def call(*args: Any) -> Any:
            log.append(name)
            found = original(*args)
            return Logged(found, name) if collective else found

        return call

    begin = gathered.begin_backward

    def begin_logged(*args: Any) -> Any:
        log.append("begin")
        begun = begin(*args)
        return type(begun)(logged("differentiate", begun.multiply, False), logged("finish", begun.finish, False))

    with (
        mock.patch.object(Ranks, "all_gather", logged("gather", Ranks.all_gather, True)),
        mock.patch.object(Ranks, "reduce_scatter", logged("reduce", Ranks.reduce_scatter, True)),
        mock.patch.object(Ranks, "let_start", logged("head start", Ranks.let_start, False)),
        mock.patch.object(gathered, "attention_into", logged("attend", gathered.attention_into, False)),
        mock.patch.object(gathered, "begin_backward", begin_logged),
        case.grouped(),
    ):
        attention(cp, *local_tensors(cp)).sum().backward()
    return log


def bytes_taken(rank: int, world_size: int) -> list[tuple[int, ...]]:
    """What buffers of a forward and a backward take, and what `memory` says of it."""
    of, found = CASE.attention, []
    uneven = (((1, 3), (1, 2, 1)), ((1, 3), (1, 3)))
    for keep, heads_per_group, sizes, merged in (
        *((keep, heads, None, False) for keep in (False, True) for heads in (None, 1, 2)),
        (False, None, uneven[0], False),
        (True, None, uneven[1], False),
        *((keep, None, uneven[0], True) for keep in (False, True)),
    ):
        case = replace(CASE, keep_gathered=keep, heads_per_group=heads_per_group, group_sizes=sizes, merged=merged)
        cp, made = case.parallel(), []
        build = gathered._Turns.__init__

        def logged(self: Any, *args: Any, build: Any = build, made: list[int] = made) -> None:
            build(self, *args)
            made.append(sum(m.numel() * m.element_size() for m in self.memory))

        with mock.patch.object(gathered._Turns, "__init__", logged), case.grouped():
            out = attention(cp, *local_tensors(cp))
            forward = sum(made)
            out.sum().backward()
        forward_and_backward = list(made)
        said = cp.memory(CU, heads=8, kv_heads=4, head_dim=of.head_dim, head_dim_v=of.dim_v, dtype=of.dtype)
        assert said.backward <= said.limit
        assert heads_per_group is None or said.backward == said.limit, "a cap that holds whole heads is used up"
        # What keeps nothing has to hold keys too, for which a cap of gradients alone may have no room.
        if not (keep and heads_per_group == 1):
            with mock.patch.object(gathered._Turns, "__init__", logged), torch.no_grad():
                before = sum(made)
                attention(cp, *local_tensors(cp))
            assert sum(made) - before <= said.limit, "nothing is kept where there will be no backward"
        found.append((forward, said.forward + said.kept, sum(forward_and_backward[1:]), said.backward))
    return found


# ---- results --------------------------------------------------------------------------------------------------------------


def repeated(rank: int, world_size: int) -> bool:
    """Two runs of forward and backward give the same bits."""
    runs = []
    for _ in range(2):
        cp = CASE.parallel()
        leaves = local_tensors(cp)
        out = attention(cp, *leaves)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    return all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def some_gradients(rank: int, world_size: int) -> bool:
    """Whichever of q, k and v ask for gradients, they get the same ones, and no reduction where neither k nor v does."""
    cp = CASE.parallel()
    leaves = local_tensors(cp)
    every = torch.autograd.grad(attention(cp, *leaves).square().sum(), leaves)
    for asked in ((0,), (1,), (2,), (0, 2)):
        some = [x if i in asked else x.detach() for i, x in enumerate(leaves)]
        out = attention(cp, *some)
        reduces = mock.patch.object(Ranks, "reduce_scatter", side_effect=AssertionError) if asked == (0,) else mock.MagicMock()
        with reduces:
            found = torch.autograd.grad(out.square().sum(), [some[i] for i in asked])
        if not all(torch.equal(one, every[i]) for i, one in zip(asked, found, strict=True)):
            return False
    with torch.no_grad():
        return not attention(cp, *leaves).requires_grad


def reduced_in_low_precision(rank: int, world_size: int) -> list[torch.dtype]:
    cp = weft.ContextParallel(grad_reduce_dtype=torch.bfloat16)
    seen: list[torch.dtype] = []
    original = Ranks.reduce_scatter

    def logged(self: Ranks, output: torch.Tensor, buffer: torch.Tensor) -> Any:
        seen.append(buffer.dtype)
        return original(self, output, buffer)

    leaves = local_tensors(cp)
    with mock.patch.object(Ranks, "reduce_scatter", logged):
        attention(cp, *leaves).sum().backward()
    assert leaves[1].grad is not None
    return [*seen, leaves[1].grad.dtype]


def gradient_through_unshard(rank: int, world_size: int) -> bool:
    """The sum of the ranks' losses, each of all rows: every rank's weight of a row adds up."""
    cp = weft.ContextParallel(layout="striped")
    local = cp.shard(CU, torch.randn(33, 3)).requires_grad_()
    whole = cp.unshard(CU, local)
    (whole * torch.arange(33.0)[:, None] * (rank + 1)).sum().backward()
    assert local.grad is not None
    weights = cp.shard(CU, torch.arange(33.0)) * sum(range(1, world_size + 1))
    return torch.equal(local.grad, weights[:, None].expand(-1, 3))


def checkpointed(rank: int, world_size: int) -> bool:
    # All of them, whatever a rank finds: the others wait for it.
    found = [same_where_checkpointed(replace(CASE, symmetric_memory=is_symmetric)) for is_symmetric in (False, True)]
    return all(found)


def same_where_checkpointed(case: ParallelCase) -> bool:
    cp = case.parallel()
    leaves = local_tensors(cp)
    found = []
    for run in (
        partial(attention, cp),
        partial(torch.utils.checkpoint.checkpoint, partial(attention, cp), use_reentrant=False),
    ):
        found.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Layer(torch.nn.Module):
    def __init__(self, cp: weft.ContextParallel) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(32, 4 * 16)
        self.cp = cp

    def forward(self, x: torch.Tensor, cu_seqlens: list[int]) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 4, 16).split([2, 1, 1], dim=1)
        out = self.cp.attention(q, k, v, cu_seqlens)
        assert isinstance(out, torch.Tensor)
        return out.flatten(1).sin()


def compiled(rank: int, world_size: int) -> float:
    """The largest difference between a compiled layer and itself, gradients included."""
    layer = Layer(weft.ContextParallel())
    fast = torch.compile(layer, backend="aot_eager")
    worst = 0.0
    for cu in (CU, [0, 4, 33], [0, 20]):
        x = layer.cp.shard(cu, torch.randn(cu[-1], 32))
        found = [torch.autograd.grad(run(x, cu).square().sum(), list(layer.parameters())) for run in (layer, fast)]
        worst = max(worst, *(float((one - other).abs().max()) for one, other in zip(*found, strict=True)))
    return worst


def of_every_dtype(rank: int, world_size: int) -> list[bool]:
    """Whether unshard gives the batch back, for dtypes that the backend itself does not know too."""
    cp = weft.ContextParallel()
    dtypes = (torch.int16, torch.uint8, torch.bool, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64)
    batches = [torch.arange(20).remainder(2).to(dtype).view(20, 1).expand(20, 3).contiguous() for dtype in dtypes]
    shards = [cp.shard(CU_OF_20, x.view(torch.uint8).view(20, -1)).view(x.dtype) for x in batches]
    return [
        torch.equal(cp.unshard(CU_OF_20, one).view(torch.uint8), x.view(torch.uint8).view(20, -1))
        for one, x in zip(shards, batches, strict=True)
    ]


CU_OF_20 = [0, 7, 8, 20]


def test_unshard_takes_every_dtype() -> None:
    for of_rank in run_ranks(of_every_dtype, 2):
        assert all(of_rank)


def copied(rank: int, world_size: int) -> tuple[list[int], str]:
    cp = copy.deepcopy(weft.ContextParallel())
    with pytest.raises(TypeError, match="make a ContextParallel in each process") as refused:
        pickle.dumps(cp)
    return cp.unshard(CU_OF_20, cp.shard(CU_OF_20, torch.arange(20))).tolist(), str(refused.value)


def test_a_copy_is_on_the_same_ranks_and_a_pickle_is_refused_in_words() -> None:
    for whole, _ in run_ranks(copied, 2):
        assert whole == list(range(20))


# In a rank's process this module is loaded before there is a process group.
EARLY = weft.ContextParallel()


def made_too_early(rank: int, world_size: int) -> list[str]:
    """What each use is told that would take this rank for the only one; a group of one rank is no such thing."""
    x = torch.randn(10, 2, 16)
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    weft.ContextParallel(alone).attention(x, x, x, [0, 10])
    uses: list[Callable[[], object]] = [
        lambda: EARLY.shard([0, 10], x),
        lambda: EARLY.attention(x, x, x, [0, 10]),
        lambda: EARLY.unshard([0, 10], x),
        lambda: EARLY.batch([0, 10]),
    ]
    told = []
    for use in uses:
        with pytest.raises(weft.InvalidInput) as raised:
            use()
        told.append(str(raised.value))
    return told


def test_one_that_was_made_before_the_group_does_not_take_its_rank_for_the_only_one() -> None:
    for told in run_ranks(made_too_early, 2):
        assert len(told) == 4
        assert all("made after init_process_group: expected one of the 2 ranks" in one for one in told)
    assert EARLY.shard([0, 10], torch.arange(10)).tolist() == list(range(10))


# ---- groups ---------------------------------------------------------------------------------------------------------------


def groups_of_ranks(rank: int, world_size: int) -> list[Any]:
    """A mesh dimension, its group, a mesh of two dimensions, a group of one rank, a group without this rank."""
    mesh = dist.init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "cp"))
    alone = [dist.new_group([r]) for r in range(world_size)]
    # Of the first two ranks; all take part in making it.
    smaller = dist.device_mesh.DeviceMesh("cpu", [0, 1])
    made = [weft.ContextParallel(g) for g in (mesh["cp"], mesh.get_group("cp"), mesh["dp"], alone[rank])]
    refused = []
    for group in (mesh, alone[rank - 1], *([smaller] if rank > 1 else [])):
        with pytest.raises(weft.InvalidInput) as raised:
            weft.ContextParallel(group)
        refused.append(str(raised.value))
    if rank < 2:
        assert weft.ContextParallel(smaller).world_size == 2
    else:
        assert "mesh's ranks" in refused.pop()
    x = torch.randn(10, 2, 16)
    assert torch.equal(attention_of(made[2], x), weft.varlen_attention(x, x, x, [0, 10], [0, 10], causal=True))  # type: ignore[arg-type]
    return [*((cp.rank, cp.world_size) for cp in made), *refused]


def attention_of(cp: weft.ContextParallel, x: torch.Tensor) -> torch.Tensor:
    out = cp.attention(x, x, x, [0, 10])
    assert isinstance(out, torch.Tensor)
    return out


def windows_without_nccl(rank: int, world_size: int) -> bool:
    """Symmetric memory over gloo is refused, and taken by a rank that is alone, which gathers nothing."""
    with pytest.raises(weft.Unsupported, match=r"expected a group whose GPUs use NCCL, given 'cpu:gloo,cuda:gloo"):
        weft.ContextParallel(symmetric_memory=True)
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    x = torch.randn(10, 2, 16)
    made = weft.ContextParallel(alone, symmetric_memory=True)
    return torch.equal(attention_of(made, x), weft.varlen_attention(x, x, x, [0, 10], [0, 10], causal=True))  # type: ignore[arg-type]


def held_everywhere(rank: int, world_size: int) -> bool:
    ranks = Ranks.of()
    found = [ranks.holds_everywhere(rank != odd, torch.device("cpu")) for odd in (0, 1, 2, 3)]
    return found == [False, False, False, True]


# ---- disagreement ---------------------------------------------------------------------------------------------------------


def disagreements(rank: int, world_size: int) -> dict[str, str]:
    """What a rank is told, in debug mode, where rank 1 does something else."""
    cp = weft.ContextParallel(debug=True)
    odd = rank == 1

    def call(
        cu: list[int] = CU,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        heads: int = 2,
        cp: Any = cp,
        grad: bool = False,
        **options: Any,
    ) -> object:
        x = cp.shard(cu, torch.randn(cu[-1], heads, 16, dtype=dtype)).requires_grad_(grad).to(device)
        return cp.attention(x, x[:, :2], x[:, :2], cu, **options)

    def forward_mode() -> object:
        x = cp.shard(CU, torch.randn(33, 2, 16))
        with forward_ad.dual_level():
            return cp.attention(forward_ad.make_dual(x, x), x, x, CU)

    other_layout = weft.ContextParallel(layout="contiguous", debug=True)
    with mock.patch.object(context_parallel, "windows_of", return_value=OrdinaryWindows()):
        with_windows = weft.ContextParallel(debug=True, symmetric_memory=True)
    cases: dict[str, Callable[[], object]] = {
        "none": call,
        "cu_seqlens": lambda: call([0, 10, 10, 19, 33] if odd else CU),
        "dtype": lambda: call(dtype=torch.bfloat16 if odd else torch.float32),
        "heads and dims": lambda: call(heads=4 if odd else 2),
        "kind of device": lambda: call(device="meta" if odd else "cpu"),
        "mask": lambda: call(window=(4, None) if odd else None),
        "same mask": lambda: call(causal=np.bool_(True) if odd else True),
        "scalars": lambda: call(softcap=3.0 if odd else 0.0),
        "gradients": lambda: call(grad=odd),
        "gradients of sinks": lambda: call(sinks=torch.zeros(2, requires_grad=odd)),
        "symmetric memory": lambda: call(cp=with_windows if odd else cp),
        "layout": lambda: call([0, 1], cp=other_layout if odd else cp),
        "call": lambda: cp.unshard(CU, cp.shard(CU, torch.zeros(33, 2, 16))) if odd else call(),
        "refusal": lambda: call(softcap=-1.0 if odd else 0.0),
        "tangents": forward_mode,
        "unshard": lambda: cp.unshard(CU, torch.zeros(3)) if odd else cp.unshard(CU, cp.shard(CU, torch.zeros(33))),
    }
    told = {}
    for name, make in cases.items():
        try:
            make()
            told[name] = ""
        except weft.WeftError as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def gathers_of_a_kept_backward(rank: int, world_size: int) -> int:
    """In the backward of a call that keeps what it gathered, where sinks alone train."""
    cp, sinks = weft.ContextParallel(keep_gathered=True), torch.zeros(2, requires_grad=True)
    x = cp.shard(CU, torch.randn(33, 2, 16))
    out = attention(cp, x, x, x, sinks=sinks)
    with mock.patch.object(Ranks, "all_gather", autospec=True, side_effect=Ranks.all_gather) as gather:
        out.sum().backward()
    return gather.call_count


def evaluated_under_a_cap(rank: int, world_size: int) -> list[bool]:
    """Under the least cap that training takes, a call without gradients too, kept or gathered again; the same values."""
    equal = []
    for keeps in (False, True):
        least = (
            weft.ContextParallel(keep_gathered=keeps).memory(CU, heads=1, kv_heads=1, head_dim=16, dtype=torch.float32).backward
        )
        cp = weft.ContextParallel(keep_gathered=keeps, max_gather_bytes=least)
        x = cp.shard(CU, torch.randn(33, 1, 16)).requires_grad_()
        trained = cp.attention(x, x, x, CU)
        trained.sum().backward()  # type: ignore[union-attr]
        with torch.no_grad():
            equal.append(torch.equal(cp.attention(x, x, x, CU), trained))  # type: ignore[arg-type]
    return equal


def left_alone(rank: int, world_size: int) -> str:
    """Without debug mode: the ranks that call wait for one that refused as long as their group's timeout says."""
    group = dist.new_group(timeout=timedelta(seconds=5))
    cp = weft.ContextParallel(group)
    x = cp.shard(CU, torch.randn(33, 2, 16))
    told = ""
    try:
        cp.attention(x, x, x, CU, softcap=-1.0 if rank == 1 else 0.0)
    except (RuntimeError, weft.WeftError) as error:
        told = type(error).__name__
    dist.barrier()
    return told


def second_derivatives(rank: int, world_size: int) -> list[str]:
    """What a penalty on a gradient is told, also where it is only a part of the loss; and that the first derivative is the same."""
    cp, told = CASE.parallel(), []
    leaves = local_tensors(cp)
    plain = torch.autograd.grad(attention(cp, *leaves).sum(), leaves)
    out = attention(cp, *leaves)
    first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(first, plain, strict=True))
    for loss in (first[0].square().sum(), out.sum() + first[1].square().sum()):
        try:
            loss.backward(retain_graph=True)
            told.append("nothing")
        except weft.Unsupported as error:
            told.append(str(error))
    return told


QUESTIONS: dict[str, Callable[[int, int], Any]] = {
    f.__name__: f
    for f in (
        order_of_work,
        bytes_taken,
        repeated,
        some_gradients,
        reduced_in_low_precision,
        gradient_through_unshard,
        checkpointed,
        groups_of_ranks,
        windows_without_nccl,
        held_everywhere,
        disagreements,
        gathers_of_a_kept_backward,
        evaluated_under_a_cap,
        second_derivatives,
        left_alone,
    )
}


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return run_ranks(together, 3, list(QUESTIONS))


def expected_work(groups: int, buffers: int, *, backward: bool) -> list[str]:
    """Every buffer is gathered into at once and again when its group is done with; sums come as late as their buffer is wanted.

    Where all have buffers, what is before keys comes before the first gather is waited for, and what dq needs after them beside the
    last reduce-scatter.
    """
    # The first before what is copied for the others.
    log, started, summed = ["gather", *(["head start"] if buffers > 1 else []), *["gather"] * (buffers - 1)], buffers, 0
    at_once = backward and groups == buffers
    if at_once:
        log += ["begin"] * groups
    for group in range(groups):
        if group > 0 and started < groups:
            log.append("gather")
            started += 1
        log.append("gather done")
        if group == 0 and started > 1:
            log.append("head start")
        if group >= buffers and backward:
            log.append("reduce done")
            summed += 1
        if backward and not at_once:
            log.append("begin")
        log += ["differentiate", "reduce", "head start"] if backward else ["attend"]
        if backward and not at_once:
            log.append("finish")
    if at_once:
        log += ["finish"] * groups
    return log + ["reduce done"] * (groups - summed if backward else 0)


def test_collectives_run_beside_other_groups_work(answers: list[dict[str, Any]]) -> None:
    in_turn = expected_work(4, 2, backward=False) + expected_work(4, 2, backward=True)
    uneven = expected_work(2, 2, backward=False) + expected_work(3, 3, backward=True)
    of_reduces = [
        "reduce",
        "head start",
        "differentiate",
        "reduce",
        "head start",
        *["finish"] * 3,
        "reduce done",
        "reduce done",
    ]
    merged = ["gather", "head start", "gather", "gather done", "head start", "attend", "gather done", "attend"]
    merged += ["gather", "head start", "gather", *["begin"] * 3, "gather done", "head start", "differentiate", "gather done"]
    merged += ["differentiate", *of_reduces]
    without = ["gather", "gather", "gather done", "attend", "gather done", "attend"]
    without += ["gather", "gather", *["begin"] * 3, "gather done", "differentiate", "gather done", "differentiate", *of_reduces]
    for answer in answers:
        assert answer["order_of_work"] == [in_turn, uneven, merged, without]


def test_memory_says_what_the_buffers_take(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        for forward, said_forward, backward, said_backward in answer["bytes_taken"]:
            assert (forward, backward) == (said_forward, said_backward)


@pytest.mark.parametrize(
    "question",
    ["repeated", "some_gradients", "gradient_through_unshard", "checkpointed", "windows_without_nccl", "held_everywhere"],
)
def test_on_every_rank_it_holds_that(question: str, answers: list[dict[str, Any]]) -> None:
    assert [answer[question] for answer in answers] == [True] * 3, QUESTIONS[question].__doc__


def test_gradients_are_reduced_in_the_dtype_asked_for(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        *reduced, own = answer["reduced_in_low_precision"]
        assert set(reduced) == {torch.bfloat16}
        assert own == torch.float32


def test_a_compiled_module_may_hold_it() -> None:
    assert max(run_ranks(compiled, 2)) < 1e-5


def test_a_group_may_be_a_mesh_dimension_or_a_part_of_the_world(answers: list[dict[str, Any]]) -> None:
    for rank, answer in enumerate(answers):
        *made, of_two, foreign = answer["groups_of_ranks"]
        assert made == [(rank, 3), (rank, 3), (0, 1), (0, 1)]
        assert 'mesh["cp"]' in of_two
        assert "given 2 dimensions" in of_two
        assert "part of" in foreign


def test_in_debug_mode_all_ranks_are_told_who_differs_in_what(answers: list[dict[str, Any]]) -> None:
    told = [answer["disagreements"] for answer in answers]
    assert {each[same] for each in told for same in ("none", "same mask")} == {""}
    for fact in (
        "cu_seqlens",
        "dtype",
        "heads and dims",
        "kind of device",
        "mask",
        "scalars",
        "gradients",
        "layout",
        "call",
        "symmetric memory",
    ):
        messages = {each[fact] for each in told}
        assert len(messages) == 1, "all ranks raise the same"
        message = messages.pop()
        assert message.startswith("InvalidInput: all ranks make the same call")
        assert f"{fact} on rank 1" in message
    assert all("gradients on rank 1" in each["gradients of sinks"] for each in told)


def test_what_is_kept_serves_the_gradient_of_sinks_alone(answers: list[dict[str, Any]]) -> None:
    assert [answer["gathers_of_a_kept_backward"] for answer in answers] == [0, 0, 0]


def test_forward_mode_derivatives_are_refused_over_ranks_too(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert "Unsupported: attention has reverse-mode derivatives" in answer["disagreements"]["tangents"]


@pytest.mark.parametrize(("case", "rule"), [("refusal", "softcap is finite"), ("unshard", "local has the rows")])
def test_in_debug_mode_all_ranks_are_told_that_one_refuses(case: str, rule: str, answers: list[dict[str, Any]]) -> None:
    first, refusing, last = (answer["disagreements"][case] for answer in answers)
    assert rule in refusing
    assert first == last
    assert "given one by rank 1" in first


def test_without_debug_mode_no_rank_waits_longer_than_the_groups_timeout(answers: list[dict[str, Any]]) -> None:
    assert [answer["left_alone"] for answer in answers] == ["RuntimeError", "InvalidInput", "RuntimeError"]


def test_a_second_derivative_is_refused_and_not_left_out(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert (
            answer["second_derivatives"]
            == ["attention is differentiated once: expected a first derivative, given a second one"] * 2
        )


def test_what_training_takes_is_enough_for_a_call_without_gradients(answers: list[dict[str, Any]]) -> None:
    assert [answer["evaluated_under_a_cap"] for answer in answers] == [[True, True]] * 3
