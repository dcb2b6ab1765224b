"""Symmetric memory for gathers: where tensors lie in a window, how windows grow, and whose they are."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import weft_attn as weft
from weft_attn.distributed import context_parallel, symmetric
from weft_attn.distributed.collectives import Ranks
from weft_attn.distributed.symmetric import ALIGNMENT, Windows, takes_multiprocessors, windows_of
from weft_attn.errors import Unsupported
from weft_attn.testing.parallel import OrdinaryWindows, windows_of_nan

CPU = torch.device("cpu")
RANKS = Ranks(None, 0, 1)


def spans(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    start = min((x.data_ptr() for x in tensors), default=0)
    return [(x.data_ptr() - start, x.data_ptr() - start + x.nbytes) for x in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_of_a_window_lie_apart_each_aligned(dtype: torch.dtype) -> None:
    found = OrdinaryWindows().take([3, 0, 1000, 256], dtype, CPU, RANKS)
    assert [(x.shape, x.dtype) for x in found] == [((n,), dtype) for n in (3, 0, 1000, 256)]
    ordered = sorted(spans([x for x in found if len(x)]))
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ordered))
    assert all(start % ALIGNMENT == 0 for start, _ in ordered)


def test_a_window_serves_until_more_is_asked_for_than_it_has() -> None:
    windows = OrdinaryWindows()
    first = windows.take([1000], torch.float32, CPU, RANKS)[0]
    assert windows.take([10, 500], torch.float32, CPU, RANKS)[0].data_ptr() == first.data_ptr()
    larger = windows.take([1100], torch.float32, CPU, RANKS)[0]
    # The first one is held as well: other ranks may still write into it.
    assert larger.data_ptr() != first.data_ptr()
    assert [len(x) for held in windows._windows.values() for x in held] == [4096, 8192]
    assert windows.take([2048], torch.float32, CPU, RANKS)[0].data_ptr() == larger.data_ptr()
    assert windows.take([9000], torch.float32, CPU, RANKS)[0].nbytes == 36000


class Stream:
    """Of a GPU, with a log of what it waited for."""

    def __init__(self) -> None:
        self.awaited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.awaited.append(other)


def test_a_stream_waits_for_the_one_that_took_the_window_before(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, one, other = OrdinaryWindows(), Stream(), Stream()
    monkeypatch.setattr(windows, "_succeed", lambda device: Windows._succeed(windows, device))
    taken = []
    for stream in (one, one, other, one):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device, stream=stream: stream)
        taken.append(windows.take([64], torch.float16, CPU, RANKS)[0].data_ptr())
    assert (one.awaited, other.awaited) == ([other], [one])
    assert len(set(taken)) == 1


def test_a_copy_shares_the_windows() -> None:
    windows = OrdinaryWindows()
    assert copy.deepcopy(windows) is windows


@pytest.mark.parametrize(
    ("device", "captured", "rule"),
    [("cpu", False, r"a GPU's: expected CUDA tensors, given 'cpu'"), ("cuda", True, r"expected no CUDA graph, given one")],
)
def test_what_no_window_serves_gets_none(device: str, captured: bool, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    with pytest.raises(Unsupported, match=rule):
        Windows(takes_multiprocessors=True).take([1], torch.float16, torch.device(device), RANKS)


@pytest.mark.parametrize(("captured", "rule"), [(False, "expected CUDA tensors"), (True, "expected no CUDA graph")])
def test_a_call_is_refused_before_its_first_collective(captured: bool, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = weft.ContextParallel(debug=captured)
    parallel._ranks, parallel._windows = Ranks(Group(), 0, 2), Windows(takes_multiprocessors=True)
    monkeypatch.setattr(context_parallel, "gathered_attention", lambda *_: pytest.fail("gathered"))
    monkeypatch.setattr(context_parallel, "require_agreement", lambda *_: pytest.fail("compared"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    x = torch.zeros(2, 1, 16)
    with pytest.raises(Unsupported, match=rule):
        parallel.attention(x, x, x, [0, 4])


def test_what_a_failed_call_left_under_way_is_waited_for_before_a_window_is_taken_again() -> None:
    class Work:
        waited = 0

        def wait(self) -> None:
            self.waited += 1

    windows, left = OrdinaryWindows(), [Work(), Work()]
    windows.under_way += left
    windows.take([1], torch.float16, CPU, RANKS)
    windows.take([1], torch.float16, CPU, RANKS)
    assert [work.waited for work in left] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_windows_of_tests_hold_nan_each_time(dtype: torch.dtype) -> None:
    with windows_of_nan():
        windows = OrdinaryWindows()
        for _ in range(2):
            found = windows.take([5, 7], dtype, CPU, RANKS)
            assert all(x.isnan().all() for x in found)
            found[0].zero_()


def test_tensors_of_a_window_made_in_inference_mode_may_be_saved() -> None:
    with torch.inference_mode():
        found = OrdinaryWindows().take([8], torch.float32, CPU, RANKS)[0]
    assert not found.is_inference()


@pytest.mark.parametrize(("policy", "takes"), [(2, False), (3, False), (1, True), (0, True), (None, True)])
def test_the_groups_policy_says_whether_gathers_take_multiprocessors(
    policy: int | None, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", SimpleNamespace(NCCL_CTA_POLICY_ZERO=2), raising=False)
    options = SimpleNamespace(config=SimpleNamespace(cta_policy=policy))
    group: Any = SimpleNamespace(_get_backend=lambda _device: SimpleNamespace(options=options))
    assert takes_multiprocessors(group) is takes


class Group:
    """Of two ranks, whose GPUs use NCCL."""

    group_name = "two"


@pytest.fixture
def torchs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """PyTorch's symmetric memory, as far as a process without GPUs can have it, with a log of what was asked of it."""
    import torch.distributed._symmetric_memory as theirs

    state = SimpleNamespace(backend="CUDA", log=[], room=[True] * 9, others_can=True, config="cpu:gloo,cuda:nccl")

    def choose(backend: str) -> None:
        state.log.append("choose")
        state.backend = backend

    def empty(n_bytes: int, **_: Any) -> torch.Tensor:
        state.log.append("allocate")
        if not state.room.pop(0):
            raise RuntimeError("out of memory")
        return torch.empty(n_bytes, dtype=torch.uint8)

    def holds_everywhere(_ranks: Ranks, holds: bool, _device: torch.device) -> bool:
        state.log.append(f"meet: {holds}")
        return holds and state.others_can

    monkeypatch.setattr(theirs, "get_backend", lambda _device: state.backend)
    monkeypatch.setattr(theirs, "set_backend", choose)
    monkeypatch.setattr(theirs, "empty", empty)
    monkeypatch.setattr(theirs, "rendezvous", lambda window, group: state.log.append(f"register {len(window)} of {group}"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: state.log.append("give back"))
    monkeypatch.setattr(Ranks, "holds_everywhere", holds_everywhere)
    monkeypatch.setattr(symmetric.dist, "get_backend_config", lambda _group: state.config)
    monkeypatch.setattr(symmetric, "takes_multiprocessors", lambda _group: True)
    return state


def test_all_that_use_a_group_share_its_windows_which_go_with_it(torchs: SimpleNamespace) -> None:
    group, other = Group(), Group()
    windows = windows_of(Ranks(group, 0, 2))
    assert windows_of(Ranks(group, 1, 2)) is windows
    assert windows_of(Ranks(other, 0, 2)) is not windows
    assert torchs.log == ["choose"], "nothing that other ranks take part in"
    still_there = weakref.ref(windows)
    del group, windows
    gc.collect()
    assert still_there() is None


@pytest.mark.parametrize("config", ["cpu:gloo,cuda:gloo", "cpu:nccl", "cuda:nccl_of_mine"])
def test_a_group_whose_gpus_do_not_use_nccl_is_refused(config: str, torchs: SimpleNamespace) -> None:
    torchs.config = config
    with pytest.raises(Unsupported, match=f"whose GPUs use NCCL, given '{config}'"):
        windows_of(Ranks(Group(), 0, 2))


def test_ranks_meet_before_each_registration(torchs: SimpleNamespace) -> None:
    torchs.backend = "NCCL"
    windows, ranks = Windows(takes_multiprocessors=True), Ranks(Group(), 0, 2)
    assert len(windows._register(1024, CPU, ranks)) == 1024
    assert torchs.log == ["allocate", "meet: True", "register 1024 of two"]


def test_memory_that_runs_out_is_asked_for_again_once_pytorch_gave_back_what_it_kept(torchs: SimpleNamespace) -> None:
    torchs.backend, torchs.room = "NCCL", [False, True]
    Windows(takes_multiprocessors=True)._register(1024, CPU, Ranks(Group(), 0, 2))
    assert torchs.log == ["allocate", "give back", "allocate", "meet: True", "register 1024 of two"]


@pytest.mark.parametrize(
    ("room", "others_can", "told"),
    [([False, False], True, "none on this one: out of memory"), ([True], False, "none on another rank")],
)
def test_no_rank_registers_where_one_has_no_room(
    room: list[bool], others_can: bool, told: str, torchs: SimpleNamespace
) -> None:
    torchs.backend, torchs.room, torchs.others_can = "NCCL", room, others_can
    with pytest.raises(RuntimeError, match=f"symmetric memory: expected 1,024 bytes on every rank, given {told}"):
        Windows(takes_multiprocessors=True)._register(1024, CPU, Ranks(Group(), 0, 2))
    assert torchs.log[-1].startswith("meet")


def test_a_process_that_takes_symmetric_memory_from_elsewhere_is_refused(
    torchs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed._symmetric_memory as theirs

    def refuse(_backend: str) -> None:
        raise RuntimeError("already allocated")

    monkeypatch.setattr(theirs, "set_backend", refuse)
    with pytest.raises(Unsupported, match="from one place: expected NCCL, given CUDA, already allocated"):
        windows_of(Ranks(Group(), 0, 2))
    # Later than the choice of windows: the ranks still meet.
    with pytest.raises(RuntimeError, match=r"none on this one: .*already allocated"):
        Windows(takes_multiprocessors=True)._register(1024, CPU, Ranks(Group(), 0, 2))
    assert torchs.log == ["meet: False"]


def test_a_pytorch_without_symmetric_memory_is_refused(monkeypatch: pytest.MonkeyPatch, torchs: SimpleNamespace) -> None:
    import torch.distributed._symmetric_memory as theirs

    monkeypatch.delattr(theirs, "set_backend")
    with pytest.raises(Unsupported, match=r"expected PyTorch 2\.11 or newer, given"):
        windows_of(Ranks(Group(), 0, 2))
