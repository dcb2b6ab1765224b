"""A replayed launch hands the C function behind Triton's launcher what Triton would hand it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from weft_attn.errors import Unsupported
from weft_attn.kernels.call import BoundCall, KernelCall, tensor_descriptor
from weft_attn.kernels.replay import MAX_ENCODED, launch_in_clusters

GRID = (5, 1, 1)
NAMES = ("q_desc", "out_ptr", "k_desc", "stride", "BLOCK", "scale")
SIGNATURE = ("tensordesc<bf16[16,32]>", "*bf16", "tensordesc<bf16[16,32]>", "i32", "constexpr", "fp32")
ENCODING = dict(swizzle=3, elem_size=2, elem_type=10, block_size=[16, 32], fp4_padded=False)


class Machine:
    """What stands in for the driver: a C function and an encoder of descriptors that note what they are handed."""

    def __init__(self) -> None:
        self.handed: list[tuple[Any, ...]] = []
        self.encoded = 0
        self.stream = 11

    def launch(self, *arguments: Any) -> None:
        # The last one is a list in Triton 3.9, which a caller may write to again.
        self.handed.append((*arguments[:-1], list(arguments[-1]) if isinstance(arguments[-1], list) else arguments[-1]))

    def encode(self, *arguments: Any) -> tuple[Any, ...]:
        self.encoded += 1
        return ("encoded", *map(repr, arguments))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    utils = SimpleNamespace(
        launch=made.launch,
        fill_tma_descriptor=made.encode,
        fill_tma_descriptor_tiled=made.encode,
        build_signature_metadata=bytes,
    )
    active = SimpleNamespace(utils=utils, get_current_device=lambda: 0, get_current_stream=lambda device: made.stream)
    monkeypatch.setattr(driver, "_active", active)
    # Triton 3.6 compiles a C function for each signature; 3.9 has one, and annotations.
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **k: SimpleNamespace(launch=made.launch), raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", list)
    monkeypatch.setattr(nvidia, "make_kernel_signature", lambda signature: b"signature", raising=False)
    monkeypatch.setattr(nvidia, "annotate_arguments", lambda signature: "annotations", raising=False)
    return made


class Compiled:
    """A compiled kernel, with Triton's own launcher and launch."""

    __getitem__ = CompiledKernel.__getitem__

    def __init__(self, *encodings: Any) -> None:
        self.src = SimpleNamespace(signature=dict(zip(NAMES, SIGNATURE, strict=True)), constants={}, fn=None)
        self.metadata = SimpleNamespace(
            tensordesc_meta=list(encodings), num_warps=4, num_ctas=1, shared=0, launch_cooperative_grid=False, launch_pdl=False,
            global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
        )  # fmt: skip
        self.run = nvidia.CudaLauncher(self.src, self.metadata)
        self.function, self.packed_metadata = 9, (4, 1, 0)

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, *arguments: Any) -> None:
        return None


def bound_call(compiled: Any) -> tuple[BoundCall, dict[str, int | None]]:
    tensors: dict[str, torch.Tensor | None] = {n: torch.empty(40, 2, 32, dtype=torch.bfloat16) for n in ("q", "k", "out")}
    q, k, out = (tensors[n] for n in ("q", "k", "out"))
    assert q is not None
    assert k is not None
    call = KernelCall(
        kernel=SimpleNamespace(arg_names=NAMES),
        grid=GRID[:1],
        arguments=dict(q_desc=tensor_descriptor(q, 16), k_desc=tensor_descriptor(k, 16), out_ptr=out, stride=64, scale=0.5),
        constants=dict(BLOCK=16),
        num_warps=4,
        num_stages=2,
    )
    return BoundCall(call, compiled, tensors), {n: x.data_ptr() for n, x in tensors.items() if x is not None}


def without_hooks(handed: tuple[Any, ...]) -> list[Any]:
    return [None if isinstance(x, knobs.HookChain) else x for x in handed]


def test_a_replay_hands_over_what_triton_would(machine: Machine) -> None:
    compiled = Compiled(ENCODING, ENCODING)
    bound, first = bound_call(compiled)
    for addresses in (first, {name: 1 << (20 + at) for at, name in enumerate(first)}, first):
        machine.handed.clear()
        bound.launch(addresses, machine.stream)
        compiled[GRID](*bound._arguments(addresses))
        replayed, of_triton = machine.handed
        assert without_hooks(replayed) == without_hooks(of_triton)
        assert str(addresses["q"]) in repr(replayed)
        assert str(addresses["out"]) in repr(replayed)


def test_a_replay_goes_to_the_stream_it_is_told(machine: Machine) -> None:
    bound, addresses = bound_call(Compiled(ENCODING, ENCODING))
    machine.handed.clear()
    for stream in (11, 12):
        bound.launch(addresses, stream)
    one, other = machine.handed
    assert [x for x, y in zip(one, other, strict=True) if x != y] == [11]


def test_descriptors_are_encoded_once_for_each_address(machine: Machine) -> None:
    bound, addresses = bound_call(Compiled(ENCODING, ENCODING))
    bound.launch(addresses, 0)
    before = machine.encoded
    for _ in range(3):
        bound.launch(addresses, 0)
    assert machine.encoded == before
    bound.launch(addresses | dict(k=1 << 30), 0)
    assert machine.encoded > before


def test_encoded_descriptors_are_bounded(machine: Machine) -> None:
    bound, addresses = bound_call(Compiled(ENCODING, ENCODING))
    for at in range(MAX_ENCODED + 5):
        bound.launch(addresses | dict(q=at << 8), 0)
        assert bound._replay is not None
        assert all(len(encoded) <= MAX_ENCODED for _, _, encoded in bound._replay._descriptors)


def test_a_watched_launch_is_told_to_its_hooks(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    bound, addresses = bound_call(Compiled(ENCODING, ENCODING))
    machine.handed.clear()
    bound.launch(addresses, machine.stream)
    chain: knobs.HookChain[Any] = knobs.HookChain()
    chain.add(lambda metadata: None)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", chain)
    bound.launch(addresses, machine.stream)
    replayed, told = machine.handed
    assert not any(x is chain for x in replayed)
    assert any(x is chain for x in told)


def test_a_launcher_that_allocates_memory_is_not_replayed(machine: Machine) -> None:
    compiled = Compiled(ENCODING, ENCODING)
    compiled.run.global_scratch_size = 16
    bound, _ = bound_call(compiled)
    assert bound._replay is None


@pytest.mark.parametrize("encodings", [(), (None, None)], ids=repr)
def test_descriptors_that_are_taken_apart_are_not_replayed(encodings: tuple[Any, ...], machine: Machine) -> None:
    bound, addresses = bound_call(Compiled(*encodings))
    assert bound._replay is None
    machine.handed.clear()
    bound.launch(addresses, machine.stream)
    assert len(machine.handed) == 1


def test_another_launcher_is_not_replayed(machine: Machine) -> None:
    class Other(nvidia.CudaLauncher):  # type: ignore[misc, name-defined]
        pass

    compiled = Compiled(ENCODING, ENCODING)
    compiled.run.__class__ = Other
    bound, _ = bound_call(compiled)
    assert bound._replay is None


def test_a_launch_in_clusters_says_so_to_tritons_launcher_and_in_its_replay(machine: Machine) -> None:
    """Warps, programs of a cluster, bytes of shared memory."""
    compiled = Compiled(ENCODING, ENCODING)
    launch_in_clusters(compiled, 2)
    launch_in_clusters(compiled, 2)
    assert compiled.packed_metadata == (4, 2, 0)
    bound, addresses = bound_call(compiled)
    machine.handed.clear()
    bound.launch(addresses, machine.stream)
    compiled[GRID](*bound._arguments(addresses))
    replayed, of_triton = machine.handed
    assert without_hooks(replayed) == without_hooks(of_triton)
    # 3.6 hands the tuple over; 3.9 its three numbers, between the grid and the stream or behind them.
    assert (4, 2, 0) in replayed or any(tuple(replayed[at : at + 3]) == (4, 2, 0) for at in range(len(replayed)))


def test_a_triton_that_packs_something_else_is_refused(machine: Machine) -> None:
    compiled = Compiled(ENCODING, ENCODING)
    compiled.packed_metadata = (1, 4, 0)
    with pytest.raises(Unsupported, match="as Weft knows it"):
        launch_in_clusters(compiled, 2)


class KernelOfTriton:
    """Compiles when it is warmed up, and launches what it compiled."""

    arg_names = ("x",)

    def __init__(self) -> None:
        metadata = SimpleNamespace(num_warps=4, num_ctas=1, shared=512)
        self.compiled = SimpleNamespace(packed_metadata=(4, 1, 512), metadata=metadata)
        self.launched: list[tuple[Any, ...]] = []

    def warmup(self, **arguments: Any) -> Any:
        assert arguments.pop("grid") == GRID
        return self.compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.launched.append((grid, self.compiled.packed_metadata))


@pytest.mark.parametrize("cluster", [1, 2])
def test_a_call_of_a_cluster_is_compiled_and_then_launched_as_one(cluster: int) -> None:
    kernel = KernelOfTriton()
    KernelCall(kernel=kernel, grid=GRID, arguments={}, constants={}, num_warps=4, num_stages=1, cluster=cluster).launch()
    assert kernel.launched == [(GRID, (4, cluster, 512))], "and never before its launcher knows"
