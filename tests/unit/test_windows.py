"""Symmetric memory for gathers: where tensors lie in a window, how windows grow, and copies in words."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weft_attn.distributed.collectives import Ranks
from weft_attn.distributed.gathered import copy_rows
from weft_attn.distributed.symmetric import ALIGNMENT, Windows
from weft_attn.errors import Unsupported
from weft_attn.testing.parallel import OrdinaryWindows

CPU = torch.device("cpu")


def spans(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    start = min((x.data_ptr() for x in tensors), default=0)
    return [(x.data_ptr() - start, x.data_ptr() - start + x.nbytes) for x in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_of_a_window_lie_apart_each_aligned(dtype: torch.dtype) -> None:
    found = OrdinaryWindows(Ranks(None, 0, 2)).take([3, 0, 1000, 256], dtype, CPU)
    assert [(x.shape, x.dtype) for x in found] == [((n,), dtype) for n in (3, 0, 1000, 256)]
    ordered = sorted(spans([x for x in found if len(x)]))
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ordered))
    assert all(start % ALIGNMENT == 0 for start, _ in ordered)


def test_a_window_serves_until_more_is_asked_for_than_it_has() -> None:
    windows = OrdinaryWindows(Ranks(None, 0, 2))
    first = windows.take([1000], torch.float32, CPU)[0]
    assert windows.take([10, 500], torch.float32, CPU)[0].data_ptr() == first.data_ptr()
    larger = windows.take([1100], torch.float32, CPU)[0]
    # The first one is held as well: other ranks may still write into it.
    assert larger.data_ptr() != first.data_ptr()
    assert [len(x) for held in windows._windows.values() for x in held] == [4096, 8192]
    assert windows.take([2048], torch.float32, CPU)[0].data_ptr() == larger.data_ptr()
    assert windows.take([9000], torch.float32, CPU)[0].nbytes == 36000


def test_every_stream_has_a_window_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = OrdinaryWindows(Ranks(None, 0, 2))
    found = []
    for stream in (1, 2, 1):
        monkeypatch.setattr(windows, "_stream", lambda _device, stream=stream: stream)
        found.append(windows.take([64], torch.float16, CPU)[0].data_ptr())
    assert found[0] == found[2] != found[1]


def test_a_copy_shares_the_windows() -> None:
    windows = OrdinaryWindows(Ranks(None, 0, 2))
    assert copy.deepcopy(windows) is windows


def test_a_graph_that_is_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = OrdinaryWindows(Ranks(None, 0, 2))
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
    windows = OrdinaryWindows(Ranks(group, 0, 2))
    assert Windows.takes_multiprocessors.func(windows) is takes


# ---- copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("dims", "offset", "step"), [(8, 0, 1), (8, 4, 1), (8, 1, 1), (6, 0, 1), (5, 0, 1), (16, 0, 2)], ids=str
)
def test_rows_are_copied_bit_by_bit_wherever_they_lie(dtype: torch.dtype, dims: int, offset: int, step: int) -> None:
    """In words and, where dims, an offset or a stride allow none, in elements; NaNs of any bits too."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    memory = torch.randint(-(2**15), 2**15, (7 * 3 * dims * step + offset,), dtype=bits).view(dtype)
    source = memory[offset:].view(7, 3, dims * step)[..., ::step]
    target = torch.zeros(9, 5, dims, dtype=dtype)
    copy_rows(target[1:8, 2:], source)
    assert torch.equal(target[1:8, 2:].view(bits), source.view(bits) if step == 1 else source.contiguous().view(bits))
    assert not target[:, :2].any()
    assert not target[[0, 8]].any()
