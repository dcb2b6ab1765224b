"""What runs for a call: the reference, or kernels selected for the device, on the plan cut for them.

CPU tensors run the reference; with TRITON_INTERPRET=1 they run the Triton kernels in Triton's interpreter.

What a pass decides is kept with the plan as a recipe (recipes.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from weft_attn.errors import Unsupported
from weft_attn.launch.config import BackwardDkdvConfig, HopperBackwardDqConfig, HopperConfig, HopperForwardConfig, StreamConfig
from weft_attn.launch.device import Device, device_of
from weft_attn.launch.select import (
    DKDV_KERNELS,
    DQ_KERNELS,
    FUSED_KERNEL,
    Choice,
    Problem,
    select,
    select_backward,
    select_first,
    select_in_turn,
)
from weft_attn.launch.splits import ForwardCut, cut_forward, heads_per_wave, last_heads
from weft_attn.ops.recipes import Counter, Recipe, Run, Scratch, Step, Tensors, begin_recipe
from weft_attn.plan.in_step import Grid
from weft_attn.plan.slices import Plan
from weft_attn.plan.stream import DeviceStream, Tiling, device_stream
from weft_attn.reference import reference_attention, reference_gradients

if TYPE_CHECKING:
    from weft_attn.kernels.call import KernelCall


def kernels_interpreted() -> bool:
    """Whether Triton was imported to interpret kernels (TRITON_INTERPRET=1), so that CPU tensors run them."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def runs_reference(device: torch.device) -> bool:
    """Whether tensors on `device` run the reference instead of a kernel: on the CPU, outside the interpreter."""
    if device.type == "cpu":
        return not kernels_interpreted()
    if device.type == "cuda":
        return False
    raise Unsupported(f"attention runs on the CPU, CUDA or ROCm: expected such a device, given {device.type!r}")


def _describable(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can address these tensors: some rows, base and strides in whole 16 bytes, heads within int32 elements."""
    return all(
        x.shape[0] > 0
        and x.data_ptr() % 16 == 0
        and all(s * x.element_size() % 16 == 0 and s > 0 for s in x.stride()[:-1])
        and x.shape[1] * x.stride(1) < 2**31
        for x in tensors
    )


def problem_of(plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> Problem:
    """What selection needs to know of a call; `others` lie in memory beside q, k and v."""
    return _problem(plan, q, k, v, tma_possible=_describable(q, k, v, *others))


def _problem(plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, tma_possible: bool) -> Problem:
    return Problem(
        q.shape[2],
        v.shape[2],
        q.element_size() * 8,
        tma_possible=tma_possible,
        keys_per_query=plan.keys_per_query,
        group=q.shape[1] // k.shape[1],
    )


def backward_problem(
    plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, dout: torch.Tensor
) -> Problem:
    """As `problem_of`, for all kernels of a backward, so that they are chosen alike.

    The copy engine counts elements in int32, and so do kernels that read statistics themselves.
    """
    from weft_attn.kernels.triton.delta import SHIFTED_COPIES, stats_shape

    statistics = math.prod(stats_shape(q.shape[1], q.shape[0], SHIFTED_COPIES))
    describable = _describable(q, k, v, out, dout) and statistics < 2**31
    return _problem(plan, q, k, v, tma_possible=describable)


def is_deterministic(asked: bool) -> bool:
    """Whether a backward's bits must not change from run to run: asked of the call, or of PyTorch as a whole."""
    return asked or torch.are_deterministic_algorithms_enabled()


def _contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """Kernels want a contiguous last dimension; any token and head stride will do."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# ---- forward --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedForward:
    """A forward's decisions for one plan: everything but the tensors."""

    cut: ForwardCut
    stream: DeviceStream
    wave: int


def prepare_forward(plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> PreparedForward:
    """Select, cut and place; `others` are tensors that the kernel describes beside q, k and v."""
    cut = cut_forward(plan, q.shape[1], k.shape[1], problem_of(plan, q, k, v, *others), device_of(q.device))
    kv_heads_together = _wave(cut.config, k, v, 1, k.shape[1])
    wave = kv_heads_together * (q.shape[1] // k.shape[1]) // cut.pack
    return PreparedForward(cut, device_stream(plan, cut.tiling, q.device), wave)


def _wave(
    config: StreamConfig | HopperForwardConfig | HopperBackwardDqConfig,
    one: torch.Tensor,
    other: torch.Tensor,
    heads_each: int,
    limit: int,
) -> int:
    """Heads that run together: `one` and `other` are streamed, `heads_each` of their heads for each head of the grid."""
    bytes_per_head = one.shape[0] * (one.shape[2] + other.shape[2]) * one.element_size() * heads_each
    return heads_per_wave(bytes_per_head, config.wave_bytes, limit)


def attention_into(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: Plan,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,  # noqa: ARG001 (every forward is deterministic)
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Attention under a plan into tensors that are there; outside of autograd, on checked input.

    Args:
        q, k, v: (Tq, Hq, D), (Tk, Hkv, D), (Tk, Hkv, Dv).
        sinks: (Hq,) float32 or None.
        out: (Tq, Hq, Dv) in q's dtype, any strides with a contiguous last dimension; written.
        lse: (Hq, Tq) float32, contiguous rows; written.
    """
    if runs_reference(q.device):
        found, found_lse = reference_attention(q, k, v, plan, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks)
        out.copy_(found)
        lse.copy_(found_lse)
        return
    if out.numel() == 0:
        return
    tensors: Tensors = dict(
        q=_contiguous_rows(q), k=_contiguous_rows(k), v=_contiguous_rows(v), sinks=sinks, out=out, lse=lse
    )  # fmt: skip
    run = begin_forward(tensors, plan, softmax_scale, softcap, q.device)
    run.launch(run.recipe.steps)


def begin_forward(tensors: Tensors, plan: Plan, softmax_scale: float, softcap: float, device: torch.device) -> Run:
    """A forward on kernels that has begun, of q, k, v, sinks, out and lse with contiguous last dimensions."""

    def make() -> Recipe:
        return _forward_recipe(plan, tensors, softmax_scale, softcap)

    return begin_recipe(plan, ("forward", softmax_scale, softcap), tensors, device, make)


def _forward_recipe(plan: Plan, tensors: Any, softmax_scale: float, softcap: float) -> Recipe:
    from weft_attn.kernels.triton.combine import combine_call
    from weft_attn.kernels.triton.forward import forward_call

    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    prepared = prepare_forward(plan, q, k, v, tensors["out"])
    cut, stream = prepared.cut, prepared.stream
    if isinstance(cut.config, HopperForwardConfig):
        return _hopper_forward_recipe(prepared, device_of(q.device).multiprocessors, softmax_scale, softcap)
    scratch: dict[str, Scratch] = {}
    if stream.slots:
        rows = (stream.slots, q.shape[1] // cut.pack, cut.config.block_q)
        scratch = dict(partial_out=Scratch((*rows, v.shape[2])), partial_lse=Scratch(rows))

    def attend(t: Any) -> KernelCall:
        return forward_call(
            q=t["q"],
            k=t["k"],
            v=t["v"],
            sinks=t["sinks"],
            out=t["out"],
            lse=t["lse"],
            partial_out=t.get("partial_out"),
            partial_lse=t.get("partial_lse"),
            items=stream.items,
            runs=stream.runs,
            n_items=stream.n_items,
            pack=cut.pack,
            heads_per_wave=prepared.wave,
            softmax_scale=softmax_scale,
            softcap=softcap,
            config=cut.config,
        )

    steps = [Step(attend)]
    if stream.slots:
        combine_config = select("combine", problem_of(plan, q, k, v), device_of(q.device)).config

        def combine(t: Any) -> KernelCall:
            return combine_call(
                partial_out=t["partial_out"],
                partial_lse=t["partial_lse"],
                sinks=t["sinks"],
                out=t["out"],
                lse=t["lse"],
                combines=stream.combines,
                n_combines=stream.n_combines,
                pack=cut.pack,
                config=combine_config,
            )

        steps.append(Step(combine))
    return Recipe([stream], scratch, steps)


def _hopper_forward_recipe(prepared: PreparedForward, multiprocessors: int, softmax_scale: float, softcap: float) -> Recipe:
    from weft_attn.kernels.hopper.forward import hopper_forward_call

    def attend(t: Any) -> KernelCall:
        return hopper_forward_call(
            q=t["q"],
            k=t["k"],
            v=t["v"],
            sinks=t["sinks"],
            out=t["out"],
            lse=t["lse"],
            items=prepared.stream.items,
            runs=prepared.stream.runs,
            n_items=prepared.stream.n_items,
            heads_per_wave=prepared.wave,
            counter=t["counter"],
            softmax_scale=softmax_scale,
            softcap=softcap,
            multiprocessors=multiprocessors,
            config=prepared.cut.config,
        )

    return Recipe([prepared.stream], {}, [Step(attend)], Counter())


# ---- backward -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedBackward:
    """A backward kernel's config, stream and waves for one plan."""

    config: StreamConfig | HopperConfig
    stream: DeviceStream
    wave: int
    last_heads: int = 0
    in_turn: bool = False


def prepare_backward(
    choice: Choice, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, in_turn: bool = False
) -> PreparedBackward:
    """As `prepare_forward`, for a kernel that was chosen; `in_turn`: a fused one, whose programs add in turn if the plan lets them."""
    config = choice.config
    assert isinstance(config, StreamConfig | HopperConfig)
    group = q.shape[1] // k.shape[1]
    if config.kernel in DQ_KERNELS:
        assert isinstance(config, StreamConfig | HopperBackwardDqConfig)
        stream = device_stream(plan, Tiling(*config.cut), q.device)
        return PreparedBackward(config, stream, _wave(config, k, v, 1, k.shape[1]) * group)
    is_fused = config.kernel == FUSED_KERNEL
    tiling = Tiling(*config.cut, transposed=True, masks_ragged=is_fused, in_turn=group if in_turn else 0)
    if isinstance(config, HopperConfig):
        multiprocessors = device_of(q.device).multiprocessors
        stream = device_stream(plan, replace(tiling, grid=Grid(multiprocessors, k.shape[1])), q.device)
        late = last_heads(stream, multiprocessors, k.shape[1])
        return PreparedBackward(config, stream, stream.heads_per_wave, late, len(stream.afters) > 0)
    stream = device_stream(plan, tiling, q.device)
    return PreparedBackward(config, stream, _wave(config, q, v, group, k.shape[1]))


class Backward(NamedTuple):
    """A backward that has begun: `multiply`, then `finish`, on the stream that it began on.

    Attributes:
        multiply: launches what reads keys and values and writes their gradients.
        finish: launches what dq still needs; returns the (Hq,) float32 gradient of the sinks, or None without sinks.
    """

    multiply: Callable[[], None]
    finish: Callable[[], torch.Tensor | None]

    def complete(self) -> torch.Tensor | None:
        """Both; returns what `finish` does."""
        self.multiply()
        return self.finish()


def begin_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
) -> Backward:
    """Launch what the gradients of `attention_into` need before keys and values, and say how it goes on.

    Args:
        dout, dlse: gradients of out and lse (natural log); dlse None: the loss does not read lse.
        q, k, v, sinks, out, lse: what the forward had and gave. Where k and v are written only later, before `multiply`, their last
            dimension is contiguous: else they are copied now.
        dq: (Tq, Hq, D); dk, dv: (Tk, Hkv, D | Dv), float32 allowed, both or neither. Contiguous last dimensions; written. None: not
            wanted.

    Returns:
        The rest of the backward, for the stream that it began on.
    """
    if runs_reference(q.device):
        dsinks: list[torch.Tensor | None] = []

        def multiply() -> None:
            *found, found_dsinks = reference_gradients(
                dout, dlse, q, k, v, plan, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks
            )
            for wanted, gradient in zip((dq, dk, dv), found, strict=True):
                if wanted is not None:
                    wanted.copy_(gradient)
            dsinks.append(found_dsinks)

        return Backward(multiply, dsinks.pop)
    deterministic = is_deterministic(deterministic)
    tensors: Tensors = dict(
        q=_contiguous_rows(q), k=_contiguous_rows(k), v=_contiguous_rows(v), out=_contiguous_rows(out), lse=lse,
        dout=_contiguous_rows(dout), dlse=None if dlse is None else _contiguous_rows(dlse), dq=dq, dk=dk, dv=dv,
    )  # fmt: skip

    def make() -> Recipe:
        return _backward_recipe(plan, tensors, softmax_scale, softcap, deterministic)

    run = begin_recipe(plan, ("backward", softmax_scale, softcap, deterministic), tensors, q.device, make)

    def finish() -> torch.Tensor | None:
        run.launch(run.recipe.after)
        if sinks is None:
            return None
        delta = run.tensors["delta"]
        assert delta is not None
        return _sink_gradient(sinks, lse, delta[0, : lse.numel()].view(lse.shape))

    return Backward(lambda: run.launch(run.recipe.steps), finish)


def _backward_recipe(plan: Plan, tensors: Any, softmax_scale: float, softcap: float, deterministic: bool) -> Recipe:
    from weft_attn.kernels.triton.delta import SHIFTED_COPIES, delta_call, stats_shape

    q, k, v, out, dout, dq = (tensors[name] for name in ("q", "k", "v", "out", "dout", "dq"))
    heads, total_q = q.shape[1], q.shape[0]
    device = device_of(q.device)
    problem = backward_problem(plan, q, k, v, out, dout)
    delta_config = select("delta", problem, device).config

    def delta(t: Any) -> KernelCall:
        return delta_call(
            out=t["out"],
            dout=t["dout"],
            lse=t["lse"],
            dlse=t["dlse"],
            delta=t["delta"],
            lse_log2=t["lse_log2"],
            dq_sum=t.get("dq_sum"),
            turns=t.get("turns"),
            config=delta_config,
        )

    wants_dkdv, wants_dq = tensors["dk"] is not None and k.shape[0] > 0, dq is not None and total_q > 0
    if wants_dkdv and wants_dq:
        prepared = _prepare_all(plan, problem, device, deterministic, q, k, v)
    else:
        wanted = [kernels for kernels, wants in ((DKDV_KERNELS, wants_dkdv), (DQ_KERNELS, wants_dq)) if wants]
        prepared = [prepare_backward(select_first(kernels, problem, device), plan, q, k, v) for kernels in wanted]
    # Through the copy engine from shifted copies.
    by_copy_engine = any(isinstance(each.config, BackwardDkdvConfig) and each.config.use_tma for each in prepared)
    before = [Step(delta)] if total_q else []
    after = []
    if any(_makes_statistics(each) for each in prepared) and not by_copy_engine:
        # First, because the other kernel reads them.
        before, prepared = [], sorted(prepared, key=_makes_statistics, reverse=True)
    steps = [Step(_gradient_step(each, softmax_scale, softcap, device.multiprocessors)) for each in prepared]
    stats = stats_shape(heads, total_q, SHIFTED_COPIES if by_copy_engine else 1)
    scratch = dict(delta=Scratch(stats), lse_log2=Scratch(stats))
    if any(each.config.kernel == FUSED_KERNEL for each in prepared):
        from weft_attn.kernels.triton.finish_dq import finish_dq_call

        finish_config = select("finish_dq", problem, device).config
        scratch["dq_sum"] = Scratch((heads, total_q, q.shape[2]))
        if any(each.in_turn for each in prepared):
            from weft_attn.kernels.hopper.add_in_turn import turns_shape

            scratch["turns"] = Scratch(turns_shape(heads, total_q, q.shape[2]), torch.int32)
        after.append(
            Step(lambda t: finish_dq_call(dq_sum=t["dq_sum"], dq=t["dq"], softmax_scale=softmax_scale, config=finish_config))
        )
    is_persistent = any(isinstance(each.config, HopperConfig) for each in prepared)
    counter = Counter() if is_persistent else None
    return Recipe([each.stream for each in prepared], scratch, steps, counter, before, after)


def _prepare_all(
    plan: Plan, problem: Problem, device: Device, deterministic: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> list[PreparedBackward]:
    """The kernels for all gradients; a deterministic one that adds where the plan lets its programs take turns."""
    if deterministic:
        fused = select_in_turn(problem, device)
        if fused is not None:
            prepared = prepare_backward(fused, plan, q, k, v, in_turn=True)
            if prepared.in_turn:
                return [prepared]
    chosen = select_backward(problem, device, deterministic=deterministic)
    return [prepare_backward(choice, plan, q, k, v) for choice in chosen]


def _makes_statistics(prepared: PreparedBackward) -> bool:
    """Whether a kernel makes the row statistics that it needs."""
    return isinstance(prepared.config, HopperBackwardDqConfig)


def _gradient_step(
    prepared: PreparedBackward, softmax_scale: float, softcap: float, multiprocessors: int
) -> Callable[[Any], KernelCall]:
    """What puts together the launch of a kernel for dK and dV, for dQ, or for all of them."""
    kernel = prepared.config.kernel

    def make(t: Any) -> KernelCall:
        shared = dict(
            q=t["q"],
            k=t["k"],
            v=t["v"],
            dout=t["dout"],
            lse_log2=t["lse_log2"],
            delta=t["delta"],
            items=prepared.stream.items,
            runs=prepared.stream.runs,
            n_items=prepared.stream.n_items,
            heads_per_wave=prepared.wave,
            softmax_scale=softmax_scale,
            softcap=softcap,
            config=prepared.config,
        )
        if not isinstance(prepared.config, HopperConfig):
            from weft_attn.kernels.triton.backward_dkdv import backward_dkdv_call
            from weft_attn.kernels.triton.backward_dq import backward_dq_call

            if kernel in DQ_KERNELS:
                return backward_dq_call(**shared, dq=t["dq"])
            return backward_dkdv_call(**shared, dk=t["dk"], dv=t["dv"])
        from weft_attn.kernels.hopper.backward import hopper_backward_call
        from weft_attn.kernels.hopper.backward_dq import hopper_backward_dq_call

        shared |= dict(counter=t["counter"], multiprocessors=multiprocessors)
        if kernel in DQ_KERNELS:
            return hopper_backward_dq_call(**shared, out=t["out"], lse=t["lse"], dlse=t["dlse"], dq=t["dq"])
        shared |= dict(last_heads=prepared.last_heads)
        if prepared.in_turn:
            shared |= dict(turns=t["turns"], afters=prepared.stream.afters)
        return hopper_backward_call(**shared, dk=t["dk"], dv=t["dv"], dq_sum=t["dq_sum"] if kernel == FUSED_KERNEL else None)

    return make


def _sink_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """dsink_h = -sum_i exp(sink_h - lse_hi) delta_hi: the sink is a key whose value is zero."""
    share = torch.exp(sinks.to(torch.float32)[:, None] - lse)
    share = torch.where(torch.isneginf(lse), torch.zeros_like(share), share)
    return -(share * delta).sum(dim=1)
