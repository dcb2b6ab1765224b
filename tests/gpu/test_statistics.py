"""Row statistics that products begin with (docs/adr/0036), alone: what the parts of a float32 are together, bit by bit."""

from __future__ import annotations

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from weft_attn.kernels.call import KernelCall
from weft_attn.kernels.hopper.compat import synchronize
from weft_attn.kernels.hopper.statistics import add_delta, add_lse, load_both, make_parts, store_parts
from weft_attn.kernels.hopper.tiles import ROWS, product_layout
from weft_attn.launch.device import device_of

DEVICE = torch.device("cuda")
QUERIES = 64
# So much a finite sum is at most (statistics.py: ENOUGH).
ENOUGH = torch.tensor(3e38)


@gluon.jit
def _add_kernel(scores_ptr, dp_ptr, lse_log2_ptr, delta_ptr, head, row, total_q, inverse_scale, QUERIES: gl.constexpr):
    parts = make_parts(QUERIES, 1).index(0)
    store_parts(parts, load_both(lse_log2_ptr, delta_ptr, head, row, total_q, inverse_scale, QUERIES, 4), QUERIES, 4)
    synchronize()
    scores, dp = warpgroup_mma_wait(0, deps=[add_lse(parts, QUERIES), add_delta(parts, QUERIES)])
    product: gl.constexpr = product_layout(QUERIES)
    keys = gl.arange(0, ROWS, gl.SliceLayout(1, product))[:, None]
    at = keys * QUERIES + gl.arange(0, QUERIES, gl.SliceLayout(0, product))[None, :]
    gl.store(scores_ptr + at, scores)
    gl.store(dp_ptr + at, dp)


def begun(
    lse_log2: torch.Tensor, delta: torch.Tensor, *, head: int, row: int, inverse_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the products of 64 keys with a tile of queries begin with, (keys, queries) each; statistics (Hq, total_q)."""
    results = [torch.full((ROWS.value, QUERIES), float("nan"), device=DEVICE) for _ in range(2)]
    call = KernelCall(
        kernel=_add_kernel,
        grid=(1,),
        arguments=dict(
            scores_ptr=results[0], dp_ptr=results[1], lse_log2_ptr=lse_log2, delta_ptr=delta,
            head=head, row=row, total_q=lse_log2.shape[1], inverse_scale=inverse_scale,
        ),
        constants=dict(QUERIES=QUERIES),
        num_warps=4,
        num_stages=1,
    )  # fmt: skip
    call.launch()
    return results[0], results[1]


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if not device_of(DEVICE).has_hopper_kernels:
        pytest.skip("Hopper's kernels run on sm_90")


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


@pytest.mark.parametrize("inverse_scale", [1.0, 5.5451774444795625, 2.0**64, 1e-3])
def test_three_parts_are_the_whole_float_for_every_key(inverse_scale: float) -> None:
    """Of every size; the scale is multiplied with one rounding."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    sizes = torch.exp2(torch.randint(-40, 8, (3, 200), device=DEVICE, generator=generator).float())
    lse_log2 = torch.randn(3, 200, device=DEVICE, generator=generator) * sizes
    delta = torch.randn(3, 200, device=DEVICE, generator=generator) * sizes
    scores, dp = begun(lse_log2, delta, head=1, row=7, inverse_scale=inverse_scale)
    added = lse_log2[1, 7 : 7 + QUERIES] * -inverse_scale
    assert torch.equal(bits(scores), bits(added.expand_as(scores)).contiguous())
    assert torch.equal(bits(dp), bits(-delta[1, 7 : 7 + QUERIES].expand_as(dp).contiguous()))


def test_what_is_infinite_is_as_large_as_it_may_be_and_a_nan_stays() -> None:
    """A row that sees nothing comes with lse_log2 +inf: scores begin at a finite number, of which exp2 is 0 whatever is added."""
    lse_log2 = torch.zeros(1, QUERIES, device=DEVICE)
    lse_log2[0, :4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.3e38])
    delta = torch.zeros(1, QUERIES, device=DEVICE)
    delta[0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    scores, dp = begun(lse_log2, delta, head=0, row=0, inverse_scale=1.0)
    expected = torch.tensor([-ENOUGH, ENOUGH, float("nan"), -ENOUGH], device=DEVICE)
    torch.testing.assert_close(scores[:, :4], expected.expand(ROWS.value, 4), rtol=0, atol=0, equal_nan=True)
    assert not scores[:, 4:].any()
    expected = torch.tensor([float("-inf"), float("inf"), float("nan")], device=DEVICE)
    torch.testing.assert_close(dp[:, :3], expected.expand(ROWS.value, 3), rtol=0, atol=0, equal_nan=True)
    assert not dp[:, 3:].any()


def test_behind_the_last_row_are_zeros() -> None:
    lse_log2, delta = torch.ones(2, 70, device=DEVICE), torch.ones(2, 70, device=DEVICE)
    for product in begun(lse_log2, delta, head=0, row=64, inverse_scale=1.0):
        assert torch.equal(product[:, :6], torch.full((ROWS.value, 6), -1.0, device=DEVICE))
        assert not product[:, 6:].any()
