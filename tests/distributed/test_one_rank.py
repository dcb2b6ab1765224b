"""A world of one rank, in this process: no process group, no collective, the same results as without; and what is refused."""

from __future__ import annotations

import copy
import doctest
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import weft_attn as weft
from weft_attn import InvalidInput, WeftError
from weft_attn.distributed import context_parallel
from weft_attn.distributed.collectives import Ranks
from weft_attn.distributed.context_parallel import current_batch
from weft_attn.distributed.shard import ShardedBatch
from weft_attn.plan.layouts import LAYOUTS

CU = [0, 5, 5, 16]


def tensors(requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, h, 16, generator=generator).to(dtype).requires_grad_(requires_grad) for h in (4, 2, 2)]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("options", [{}, dict(causal=False), dict(window=(3, None), softcap=2.0, softmax_scale=0.2)])
def test_one_rank_is_bitwise_varlen_attention(layout: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("one rank makes no collective call")

    for name in ("all_gather", "reduce_scatter"):
        monkeypatch.setattr(Ranks, name, refuse)
    cp = weft.ContextParallel(layout=layout, debug=True)
    assert (cp.rank, cp.world_size) == (0, 1)
    sinks = torch.randn(4, requires_grad=True)
    results = []
    for attend in (
        lambda q, k, v: cp.attention(q, k, v, CU, sinks=sinks, return_lse=True, **options),
        lambda q, k, v: weft.varlen_attention(q, k, v, CU, CU, sinks=sinks, return_lse=True, **{"causal": True, **options}),
    ):
        leaves = [cp.shard(CU, x).detach().requires_grad_() for x in tensors()]
        out, lse = attend(*leaves)
        out = cp.unshard(CU, out)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), [*leaves, sinks])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_shard_takes_any_host_integers_and_dicts() -> None:
    cp = weft.ContextParallel()
    x = torch.arange(16)
    for cu in (CU, tuple(CU), np.array(CU, np.int32), torch.tensor(CU)):
        assert torch.equal(cp.shard(cu, x), x)
    found = cp.shard(CU, dict(ids=x, mask=x > 3))
    assert list(found) == ["ids", "mask"]
    assert torch.equal(found["mask"], x > 3)
    assert cp.position_ids(CU).tolist() == [*range(5), *range(11)]
    assert cp.shift_labels(CU, x).tolist() == [1, 2, 3, 4, -100, *range(6, 16), -100]
    assert cp.shift_labels([0], x[:0]).tolist() == []


def test_what_a_caller_does_to_a_result_does_not_come_back() -> None:
    cp = weft.ContextParallel()
    cp.position_ids(CU).fill_(7)
    assert cp.position_ids(CU).tolist() == [*range(5), *range(11)]


def test_a_batchs_plan_is_built_once() -> None:
    cp = weft.ContextParallel()
    plan = cp.plan(CU)
    assert cp.plan(list(CU)) is plan
    assert cp.plan(CU, window=(None, None)) is plan
    assert cp.plan(CU, window=(2, None)) is not plan
    assert cp.plan(CU, causal=False) == weft.Plan.from_cu_seqlens(CU, CU)


def test_the_batch_that_models_attend_under_is_the_innermost() -> None:
    cp = weft.ContextParallel()
    assert current_batch() is None
    q, k, v = tensors(requires_grad=False)
    with cp.batch(CU) as outer:
        assert current_batch() is outer
        assert outer.parallel is cp
        with cp.batch([0, 4]) as inner:
            assert current_batch() is inner
            inner.attention(*(x[:4] for x in (q, k, v)))
        active = current_batch()
        assert active is outer
        expected = weft.varlen_attention(q, k, v, CU, CU, causal=True, window=(2, None))
        assert torch.equal(active.attention(q, k, v, window=(2, None)), expected)  # type: ignore[arg-type]
    assert current_batch() is None


def test_an_error_ends_the_batch() -> None:
    def fail() -> None:
        with weft.ContextParallel().batch(CU):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert current_batch() is None


def test_a_block_in_which_nothing_attends_says_so() -> None:
    """A model under another attention would have seen its rank's rows alone."""
    cp = weft.ContextParallel()
    q, k, v = tensors(requires_grad=False)

    def block(*calls: Callable[[], object]) -> None:
        with cp.batch(CU):
            for call in calls:
                call()

    def block_within() -> None:
        block(lambda: cp.attention(q, k, v, CU))

    for calls in ((), (lambda: cp.shard(CU, q),), (lambda: weft.attention(q[None], k[None], v[None]),), (block_within,)):
        with pytest.raises(weft.InvalidInput, match="nothing attended over the ranks"):
            block(*calls)
        assert current_batch() is None
    block(lambda: cp.attention(q, k, v, CU))
    block(lambda: weft.ContextParallel(layout="striped").attention(q, k, v, CU))
    leaf = q.clone().requires_grad_()
    out = checkpoint(lambda x: cp.attention(x, k, v, CU), leaf, use_reentrant=False)
    block(lambda: out.sum().backward())  # attends again


def test_each_use_of_a_block_is_looked_at() -> None:
    cp = weft.ContextParallel()
    q, k, v = tensors(requires_grad=False)

    @cp.batch(CU)
    def step(attends: bool) -> None:
        if attends:
            cp.attention(q, k, v, CU)

    step(True)
    with pytest.raises(weft.InvalidInput, match="nothing attended"):
        step(False)


def test_what_inference_or_tracing_built_serves_training() -> None:
    cp, cu = weft.ContextParallel(), [0, 3, 9]
    x = torch.randn(9, 2)
    with torch.inference_mode():
        expected = cp.shard(cu, x)
    leaf = x.clone().requires_grad_()
    cp.shard(cu, leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.ones(9, 2))
    assert torch.equal(cp.shard(cu, x), expected)
    with FakeTensorMode():
        cp.shard([0, 4, 9], torch.empty(9, 2))
    assert torch.equal(cp.shard([0, 4, 9], x), x)


def test_what_unshard_gives_is_a_copy_as_it_is_over_more_ranks() -> None:
    cp, leaf = weft.ContextParallel(), torch.randn(16, 2, requires_grad=True)
    whole = cp.unshard(CU, leaf)
    assert torch.equal(whole, leaf)
    assert whole.data_ptr() != leaf.data_ptr()
    whole.sum().backward()
    assert torch.equal(leaf.grad, torch.ones(16, 2))


def test_a_batch_is_the_cu_seqlens_that_were_given_whatever_becomes_of_them() -> None:
    cu = torch.tensor(CU)
    q, k, v = tensors(requires_grad=False)
    with weft.ContextParallel().batch(cu) as active:
        expected = active.attention(q, k, v)
        cu[1:-1] = 9
        assert torch.equal(active.attention(q, k, v), expected)  # type: ignore[arg-type]


def test_positions_lie_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(ShardedBatch, "on", lambda self, device, name: asked.append(device) or torch.zeros(1))
    cp = weft.ContextParallel()
    for device in (None, "cpu", torch.device("meta"), "cuda:1"):
        cp.position_ids(CU, device=device)
    assert asked == [torch.device("cpu"), torch.device("cpu"), torch.device("meta"), torch.device("cuda:1")]
    if torch.accelerator.is_available():
        cp.position_ids(CU, device=0)
        assert asked[-1] == torch.device(0)
    else:
        # The first GPU, not a falsy number that means the CPU.
        with pytest.raises(RuntimeError, match="accelerator"):
            cp.position_ids(CU, device=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_everything_may_be_called_from_a_compiled_function() -> None:
    torch._dynamo.reset()
    cp, x, ids = weft.ContextParallel(), torch.randn(16, 2, 16), torch.arange(16)

    def all_of_it(x: torch.Tensor, cu: list[int]) -> list[torch.Tensor]:
        with cp.batch(cu):
            rows = cp.shard(cu, x * 2)
            found = [rows.sin(), cp.unshard(cu, rows) + 1, cp.position_ids(cu) * 2, cp.shift_labels(cu, ids) - 1]
            return [*found, cp.attention(rows, rows, rows, cu).cos()]  # type: ignore[union-attr]

    compiled = torch.compile(all_of_it, backend="aot_eager")
    # The second has been seen before by the caches that the first call fills.
    for cu in ([0, 3, 16], [0, 3, 16], [0, 16]):
        for one, other in zip(compiled(x, cu), all_of_it(x, cu), strict=True):
            assert torch.equal(one, other)


def test_a_copy_is_on_the_same_ranks() -> None:
    cp = weft.ContextParallel(layout="striped", debug=True)
    for other in (copy.deepcopy(cp), copy.copy(cp), pickle.loads(pickle.dumps(cp))):
        assert repr(other) == repr(cp) == "ContextParallel(rank 0 of 1, layout='striped')"
        assert vars(other).keys() == vars(cp).keys()
        assert other.position_ids(CU).tolist() == cp.position_ids(CU).tolist()


def test_one_rank_takes_no_memory() -> None:
    found = weft.ContextParallel().memory(CU, heads=4, kv_heads=2, head_dim=16, dtype=torch.bfloat16)
    assert (found.forward, found.backward, found.kept) == (0, 0, 0)


def attend(cp: Any = None, *, rows: int = 16, cu: Any = CU, **options: Any) -> Callable[[], object]:
    x = torch.randn(rows, 2, 16)
    return lambda: (cp or weft.ContextParallel()).attention(x, x, x, cu, **options)


REFUSED: dict[str, Callable[[], object]] = {
    "unknown layout": lambda: weft.ContextParallel(layout="ring"),
    "a number as the group": lambda: weft.ContextParallel(4),
    "cap of zero": lambda: weft.ContextParallel(max_gather_bytes=0),
    "cap as a float": lambda: weft.ContextParallel(max_gather_bytes=1e9),  # type: ignore[arg-type]
    "keep_gathered as a number": lambda: weft.ContextParallel(keep_gathered=1),  # type: ignore[arg-type]
    "symmetric memory as a number": lambda: weft.ContextParallel(symmetric_memory=1),  # type: ignore[arg-type]
    "symmetric memory that is kept": lambda: weft.ContextParallel(symmetric_memory=True, keep_gathered=True),
    "debug as None": lambda: weft.ContextParallel(debug=None),  # type: ignore[arg-type]
    "gradients in integers": lambda: weft.ContextParallel(grad_reduce_dtype=torch.int32),
    "gradients in a word": lambda: weft.ContextParallel(grad_reduce_dtype="float32"),  # type: ignore[arg-type]
    "cu_seqlens on a device": attend(cu=torch.tensor(CU, device="meta")),
    "cu_seqlens of floats": attend(cu=[0.0, 16.0]),
    "cu_seqlens that decrease": attend(cu=[0, 9, 5, 16]),
    "other rows than cu_seqlens": attend(rows=15),
    "window of one": attend(window=(3,)),
    "causal as a number": attend(causal=1),
    "softcap negative": attend(softcap=-1.0),
    "scale as a word": attend(softmax_scale="1"),
    "sinks of another count": attend(sinks=torch.zeros(3)),
    "return_lse as a number": attend(return_lse=1),
    "deterministic as a number": attend(deterministic=1),
    "shard of other rows": lambda: weft.ContextParallel().shard(CU, torch.zeros(15)),
    "shard of a scalar": lambda: weft.ContextParallel().shard(CU, torch.zeros(())),
    "shard of a list": lambda: weft.ContextParallel().shard(CU, [1] * 16),  # type: ignore[call-overload]
    "shard of a dict of lists": lambda: weft.ContextParallel().shard(CU, {"ids": [1] * 16}),  # type: ignore[dict-item]
    "unshard of other rows": lambda: weft.ContextParallel().unshard(CU, torch.zeros(15)),
    "labels of bytes": lambda: weft.ContextParallel().shift_labels(CU, torch.zeros(16, dtype=torch.uint8)),
    "labels of floats": lambda: weft.ContextParallel().shift_labels(CU, torch.zeros(16)),
    "labels of two dimensions": lambda: weft.ContextParallel().shift_labels(CU, torch.zeros(16, 1, dtype=torch.int64)),
    "plan of a bad window": lambda: weft.ContextParallel().plan(CU, window=3),  # type: ignore[arg-type]
    "memory of uneven heads": lambda: weft.ContextParallel().memory(CU, heads=3, kv_heads=2, head_dim=16, dtype=torch.float16),
    "memory of no head": lambda: weft.ContextParallel().memory(CU, heads=1, kv_heads=0, head_dim=16, dtype=torch.float16),
    "memory of integers": lambda: weft.ContextParallel().memory(CU, heads=1, kv_heads=1, head_dim=16, dtype=torch.int8),
    "memory of a head dim that attention refuses": lambda: weft.ContextParallel().memory(
        CU, heads=1, kv_heads=1, head_dim=16, head_dim_v=9, dtype=torch.half
    ),
    "memory of a wide head": lambda: weft.ContextParallel().memory(CU, heads=1, kv_heads=1, head_dim=512, dtype=torch.half),
    "batch of bad cu_seqlens": lambda: weft.ContextParallel().batch([3]).__enter__(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_words(name: str) -> None:
    with pytest.raises(WeftError) as raised:
        REFUSED[name]()
    assert "expected" in str(raised.value)
    assert "given" in str(raised.value)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("name", ["cap of zero", "cap as a float", "unknown layout", "keep_gathered as a number"])
def test_a_bad_option_is_bad_input(name: str) -> None:
    with pytest.raises(InvalidInput):
        REFUSED[name]()


def test_a_wrong_number_of_rows_names_the_rule() -> None:
    with pytest.raises(InvalidInput, match=r"q has the rows of this rank's part of cu_seqlens: expected 16, given 15"):
        attend(rows=15)()


def test_the_example_runs() -> None:
    found = doctest.testmod(context_parallel)
    assert found.attempted >= 5
    assert found.failed == 0


def test_the_package_is_imported_without_torch_distributeds_users() -> None:
    code = (
        "import sys, weft_attn\n"
        "print('ContextParallel' in weft_attn.__all__, 'torch._dynamo' in sys.modules, 'weft_attn.distributed' in sys.modules)\n"
        "weft_attn.ContextParallel()\n"
        "import torch.distributed\n"
        "print(torch.distributed.is_initialized())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "False", "False", "False"]


def test_the_package_has_no_other_late_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'RingAttention'"):
        weft.RingAttention  # noqa: B018
