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

from weft_attn.distributed import symmetric
from weft_attn.distributed.collectives import Ranks
from weft_attn.distributed.symmetric import ALIGNMENT, Windows, takes_multiprocessors, windows_of
from weft_attn.errors import Unsupported
from weft_attn.testing.parallel import OrdinaryWindows

CPU = torch.device("cpu")


def spans(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    start = min((x.data_ptr() for x in tensors), default=0)
    return [(x.data_ptr() - start, x.data_ptr() - start + x.nbytes) for x in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_of_a_window_lie_apart_each_aligned(dtype: torch.dtype) -> None:
    found = OrdinaryWindows().take([3, 0, 1000, 256], dtype, CPU)
    assert [(x.shape, x.dtype) for x in found] == [((n,), dtype) for n in (3, 0, 1000, 256)]
    ordered = sorted(spans([x for x in found if len(x)]))
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ordered))
    assert all(start % ALIGNMENT == 0 for start, _ in ordered)


def test_a_window_serves_until_more_is_asked_for_than_it_has() -> None:
    windows = OrdinaryWindows()
    first = windows.take([1000], torch.float32, CPU)[0]
    assert windows.take([10, 500], torch.float32, CPU)[0].data_ptr() == first.data_ptr()
    larger = windows.take([1100], torch.float32, CPU)[0]
    # The first one is held as well: other ranks may still write into it.
    assert larger.data_ptr() != first.data_ptr()
    assert [len(x) for held in windows._windows.values() for x in held] == [4096, 8192]
    assert windows.take([2048], torch.float32, CPU)[0].data_ptr() == larger.data_ptr()
    assert windows.take([9000], torch.float32, CPU)[0].nbytes == 36000


def test_every_stream_has_a_window_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = OrdinaryWindows()
    found = []
    for stream in (1, 2, 1):
        monkeypatch.setattr(windows, "_stream", lambda _device, stream=stream: stream)
        found.append(windows.take([64], torch.float16, CPU)[0].data_ptr())
    assert found[0] == found[2] != found[1]


def test_a_copy_shares_the_windows() -> None:
    windows = OrdinaryWindows()
    assert copy.deepcopy(windows) is windows


def test_a_graph_that_is_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = OrdinaryWindows()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(Unsupported, match=r"not captured: expected no CUDA graph, given one being captured"):
        Windows._stream(windows, CPU)


@pytest.mark.parametrize(("policy", "takes"), [(2, False), (0, True), (None, True)])
def test_the_groups_policy_says_whether_gathers_take_multiprocessors(
    policy: int | None, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", SimpleNamespace(NCCL_CTA_POLICY_ZERO=2), raising=False)
    options = SimpleNamespace(config=SimpleNamespace(cta_policy=policy))
    group: Any = SimpleNamespace(_get_backend=lambda _device: SimpleNamespace(options=options))
    assert takes_multiprocessors(group) is takes


class Group:
    """Of two ranks, over NCCL."""

    group_name = "two"


def test_all_that_use_a_group_share_its_windows_which_go_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric.dist, "get_backend", lambda _group: "nccl")
    monkeypatch.setattr(Ranks, "control_device", CPU)
    monkeypatch.setattr(symmetric, "takes_multiprocessors", lambda _group: True)
    monkeypatch.setattr(symmetric, "_enable", lambda: None)
    met = []
    monkeypatch.setattr(Ranks, "meet", lambda ranks, _device: met.append(ranks.group))
    group, other = Group(), Group()
    windows = windows_of(Ranks(group, 0, 2))
    assert windows_of(Ranks(group, 1, 2)) is windows
    assert windows_of(Ranks(other, 0, 2)) is not windows
    assert met == [group, other], "once each, before a window is registered"
    met.clear()
    still_there = weakref.ref(windows)
    del group, windows
    gc.collect()
    assert still_there() is None
