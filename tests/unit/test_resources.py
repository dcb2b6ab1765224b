"""What a config needs is computed before it is launched."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weft_attn.launch.config import (
    BackwardDkdvConfig,
    BackwardDqConfig,
    CombineConfig,
    ForwardConfig,
    HopperBackwardConfig,
    HopperForwardConfig,
    InvalidConfig,
    LaunchConfig,
    StreamConfig,
)
from weft_attn.launch.device import INTERPRETER, TARGETS, Device
from weft_attn.launch.resources import Shape, accumulator_registers, padded, shared_memory, shortfall
from weft_attn.launch.select import DKDV_KERNELS, DQ_KERNELS, FORWARD_KERNELS, MANY_ROWS, Problem, select_first

STREAMS: list[type[StreamConfig]] = [ForwardConfig, BackwardDkdvConfig, BackwardDqConfig]
UNKNOWN = Device("unknown", "sm_99", 10, 99 * 1024)


def config(kind: type[StreamConfig], **numbers: int) -> StreamConfig:
    return kind(**{"block_q": 64, "block_k": 32, "num_warps": 4, "num_stages": 2, **numbers})  # type: ignore[arg-type]


@pytest.mark.parametrize("device", [*TARGETS.values(), INTERPRETER, UNKNOWN], ids=lambda d: d.name)
@pytest.mark.parametrize("kernels", [FORWARD_KERNELS, DKDV_KERNELS, DQ_KERNELS, ("combine",), ("delta",)], ids="-".join)
def test_every_device_has_a_config_for_every_problem(kernels: tuple[str, ...], device: Device) -> None:
    for bits in (16, 32):
        for dim in range(8, 257, 8):
            for dim_v in {8, dim, 128, 256}:
                for rows in (MANY_ROWS, 1, 16, 400):
                    choice = select_first(kernels, Problem(dim, dim_v, bits, few_rows=rows), device)
                    assert shortfall(choice.config, Shape(dim, dim_v, bits), device) == ""


@pytest.mark.parametrize("kind", STREAMS)
def test_larger_tiles_more_stages_and_wider_heads_need_more(kind: type[StreamConfig]) -> None:
    plain, shape = config(kind), Shape(64, 64, 16)
    for arch in ("sm_80", "sm_90", "sm_100"):
        needed = shared_memory(plain, shape, arch)
        for more in ({"block_q": 128}, {"block_k": 64}, {"num_stages": 3}):
            assert shared_memory(replace(plain, **more), shape, arch) > needed, more  # type: ignore[arg-type]
        for wider in (Shape(128, 64, 16), Shape(64, 128, 16), Shape(64, 64, 32)):
            assert shared_memory(plain, wider, arch) > needed, wider
    assert accumulator_registers(plain, shape, 32) == 2 * accumulator_registers(plain, shape, 64)
    assert accumulator_registers(replace(plain, num_warps=8), shape, 32) == accumulator_registers(plain, shape, 32) // 2


@pytest.mark.parametrize("kind", STREAMS)
def test_what_is_kept_and_streamed_is_counted(kind: type[StreamConfig]) -> None:
    # Two-byte elements, D = Dv = 64: a kept tile, two stages of two streamed tiles.
    kept = 64 * 64 * 2 if kind is ForwardConfig else 2 * (32 if kind is BackwardDkdvConfig else 64) * 64 * 2
    streamed = 2 * 2 * (64 if kind is BackwardDkdvConfig else 32) * 64 * 2
    assert shared_memory(config(kind), Shape(64, 64, 16), "sm_90") >= kept + streamed
    assert shared_memory(config(kind), Shape(64, 64, 16), "gfx942") >= streamed


def test_a_head_is_padded_to_a_power_of_two_of_at_least_16() -> None:
    assert [padded(d) for d in (8, 16, 24, 64, 72, 128, 192, 256)] == [16, 16, 32, 64, 128, 128, 256, 256]


def test_the_threads_of_a_hopper_kernel_share_its_registers() -> None:
    hopper = TARGETS["sm_90"]
    two = HopperForwardConfig(block_k=128, num_warps=4, num_stages=2)
    assert shortfall(two, Shape(64, 64, 16), hopper) == ""
    three = replace(two, consumers=3, consumer_registers=160)
    assert shortfall(three, Shape(64, 64, 16), hopper) == "expected at most 128 max_registers for 512 threads, given 168"
    assert shortfall(replace(three, max_registers=128), Shape(64, 64, 16), hopper) == ""
    for dim, block_k, threads in ((64, 128, 512), (128, 128, 384), (256, 64, 512)):
        of_dim = HopperBackwardConfig(block_q=64, block_k=block_k, num_warps=4, num_stages=2, max_registers=176)
        assert f"max_registers for {threads} threads" in shortfall(of_dim, Shape(dim, dim, 16), hopper)


def test_what_is_lacking_is_said_in_words() -> None:
    shape = Shape(128, 128, 16)
    assert shortfall(config(ForwardConfig), shape, TARGETS["sm_90"]) == ""
    large = config(ForwardConfig, block_q=256, block_k=256, num_warps=16)
    assert "expected at most 232448 bytes of shared memory, needs" in shortfall(large, shape, TARGETS["sm_90"])
    thin = config(ForwardConfig, block_q=128, block_k=64, num_warps=1)
    assert "registers a thread" in shortfall(thin, shape, TARGETS["sm_90"])
    small: LaunchConfig = CombineConfig(num_warps=4, num_stages=1)
    assert shortfall(small, shape, TARGETS["gfx942"]) == ""


@pytest.mark.parametrize(
    ("arch", "has_tma"),
    [("sm_80", False), ("sm_86", False), ("sm_90", True), ("sm_100", True), ("sm_120", True), ("gfx942", False)],
)
def test_the_copy_engine_came_with_hopper(arch: str, has_tma: bool) -> None:
    assert TARGETS[arch].has_tma is has_tma


def test_the_fused_backward_needs_two_stages_and_the_items_of_its_head_dim() -> None:
    h200 = Device("NVIDIA H200", "sm_90", 132, 227 * 1024)
    for dim, block_k, max_registers, registers in ((64, 128, 128, 208), (128, 128, 168, 240), (256, 64, 128, 160)):
        shape = Shape(dim, dim, 16)
        numbers = dict(block_q=64, num_warps=4, max_registers=max_registers, consumer_registers=registers)
        assert shortfall(HopperBackwardConfig(num_stages=2, block_k=block_k, **numbers), shape, h200) == ""
        assert "two stages" in shortfall(HopperBackwardConfig(num_stages=1, block_k=block_k, **numbers), shape, h200)
        assert "items of" in shortfall(HopperBackwardConfig(num_stages=2, block_k=192 - block_k, **numbers), shape, h200)
        of_128 = HopperBackwardConfig(num_stages=2, block_k=block_k, **(numbers | dict(block_q=128)))
        assert "query tiles of 64" in shortfall(of_128, shape, h200)


@pytest.mark.parametrize(("dim", "block_k"), [(64, 128), (256, 64)])
def test_a_third_consumer_gets_registers_that_a_warp_group_can_have(dim: int, block_k: int) -> None:
    hopper, shape = TARGETS["sm_90"], Shape(dim, dim, 16)
    config = HopperBackwardConfig(block_q=64, block_k=block_k, num_warps=4, num_stages=2, max_registers=128)
    assert "a third consumer 24 or more, given 240 of 128, which leave 8" in shortfall(config, shape, hopper)
    assert shortfall(replace(config, consumer_registers=232), shape, hopper) == ""


@pytest.mark.parametrize("name", ["consumer_registers", "max_registers"])
@pytest.mark.parametrize("value", [0, 16, 236, 264, 128.0])
def test_registers_are_what_a_thread_can_have(name: str, value: float) -> None:
    with pytest.raises(InvalidConfig, match=name):
        HopperForwardConfig(block_k=128, num_warps=4, num_stages=2, **{name: value})  # type: ignore[arg-type]


def test_the_fused_backward_serves_three_head_dims() -> None:
    config = HopperBackwardConfig(block_q=64, num_warps=4, num_stages=2)
    for dim in (16, 32):
        assert "expected head dims 64, 128 or 256" in shortfall(config, Shape(dim, dim, 16), TARGETS["sm_90"])
