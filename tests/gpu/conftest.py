"""Tests that need a GPU: marked `gpu`, skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not has_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def _unwritten_is_nan(nan_memory: None) -> None:
    """Every GPU test runs with outputs that hold NaN until a kernel writes them."""


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """Several processes share the GPU, and what one of them keeps for its next test is missing in another's."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True, scope="session")
def _compiled_kernels_and_exact_baselines() -> Iterator[None]:
    from weft_attn.ops import kernels_interpreted

    assert not kernels_interpreted(), "GPU tests compile: expected TRITON_INTERPRET unset"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return
