"""What `weft check` computes: a pack's attention cut over zigzag ranks, and the same on one device.

Every rank holds its own rows and, as after an all-gather, the keys and values of all ranks in rank order. Its gradients of those
keys and values are added to the other ranks', as a reduce-scatter would.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from weft_attn import ops
from weft_attn.api import plan_attention
from weft_attn.demo.documents import Pack
from weft_attn.errors import Unsupported, require
from weft_attn.plan.layouts import Zigzag
from weft_attn.plan.slices import Plan
from weft_attn.testing.cases import Inputs

IntArray = NDArray[np.int64]

ROPE_BASE = 500_000.0
SEED = 0
# A token's hidden state is of itself and the bytes just before it.
BYTES_IN_STATE = 4


@dataclass(frozen=True)
class Sizes:
    """A pack's tokens at most, and the attention's shape."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


# Triton's interpreter takes milliseconds for a tile: half a minute in all. It truncates to bfloat16, where GPUs round; float16 it
# rounds as they do.
INTERPRETER_SIZES = Sizes(tokens=1536, heads=4, kv_heads=2, head_dim=32, dtype=torch.float16)
# The attention of Llama 3 8B.
GPU_SIZES = Sizes(tokens=32_768, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)


@dataclass(frozen=True)
class RankResult:
    """What one rank computes.

    Attributes:
        plan: who attends to whom on this rank.
        tokens: (rows,) the pack's tokens that are this rank's rows, in its order.
        out, dq: (rows, Hq, D).
        dk, dv: (T, Hkv, D) this rank's part, in gathered order.
        forward_ms, backward_ms: time on a GPU; None in the interpreter, whose time means nothing.
    """

    plan: Plan
    tokens: torch.Tensor
    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    forward_ms: float | None
    backward_ms: float | None


def choose_device(name: str | None) -> torch.device:
    """The named device; None: a GPU if there is one. On the CPU, makes Triton interpret its kernels.

    Raises:
        InvalidInput: another kind of device.
        Unsupported: there is no such GPU, or on the CPU no Triton that can still be told to interpret.
    """
    has_gpu = torch.cuda.is_available()
    named = re.fullmatch(r"cpu|cuda(:\d+)?", name or "") is not None
    require(name is None or named, "the device is known", expected="cpu, cuda or cuda:N", given=repr(name))
    device = torch.device(("cuda" if has_gpu else "cpu") if name is None else name)
    if device.type == "cuda" and not has_gpu:
        raise Unsupported("the device is there: expected a GPU that torch can use for 'cuda', given none")
    if device.type == "cpu":
        if "triton" not in sys.modules:
            os.environ["TRITON_INTERPRET"] = "1"
        if not ops.kernels_interpreted():
            raise Unsupported(
                "kernels run on the CPU in Triton's interpreter: expected an installed Triton, imported with TRITON_INTERPRET=1"
            )
    return device


def project(pack: Pack, sizes: Sizes, device: torch.device) -> Inputs:
    """A pack's bytes under fixed random weights: embedding, RMS norm, projections, RoPE. Documents one after the other."""
    generator = torch.Generator().manual_seed(SEED)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    hidden = sizes.heads * sizes.head_dim
    tokens = torch.from_numpy(pack.tokens.astype(np.int64)).to(device)
    starts = torch.from_numpy(np.repeat(pack.cu_seqlens[:-1], np.diff(pack.cu_seqlens))).to(device)
    positions = torch.arange(len(tokens), device=device) - starts
    # A hidden state knows some of what came before it; of a byte alone, equal bytes would have equal values.
    states = torch.zeros(len(tokens), hidden, device=device)
    for back in range(BYTES_IN_STATE):
        earlier = random(256, hidden)[tokens.roll(back)]
        states += torch.where((positions >= back)[:, None], earlier, 0.0)
    states = states * torch.rsqrt(states.square().mean(dim=1, keepdim=True) + 1e-6)

    def projected(heads: int) -> torch.Tensor:
        return (states @ random(hidden, heads * sizes.head_dim) / math.sqrt(hidden)).view(len(tokens), heads, -1)

    q, k = (_rotate(projected(heads), positions) for heads in (sizes.heads, sizes.kv_heads))
    v = projected(sizes.kv_heads)
    dout = random(len(tokens), sizes.heads, sizes.head_dim)
    q, k, v, dout = (x.to(sizes.dtype) for x in (q, k, v, dout))
    return Inputs(q, k, v, sinks=None, dout=dout, dlse=None)


def _rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE: x (T, H, D), positions (T,) inside each document."""
    half = x.shape[2] // 2
    angles = positions[:, None] * ROPE_BASE ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2)


class ZigzagRanks:
    """A pack on `world_size` ranks of the zigzag layout, all on one device, one after the other."""

    def __init__(self, inputs: Inputs, cu_seqlens: IntArray, world_size: int) -> None:
        self.inputs = inputs
        self.cu_seqlens = cu_seqlens
        self.layout = Zigzag.of(cu_seqlens, world_size)
        owned = [self.layout.tokens(rank) for rank in range(world_size)]
        self.owned = [torch.from_numpy(tokens).to(inputs.q.device) for tokens in owned]
        # (T,) the pack's token that each gathered key is.
        self.gathered = torch.cat(self.owned)
        self.k = inputs.k[self.gathered]
        self.v = inputs.v[self.gathered]

    def plan(self, rank: int) -> Plan:
        return Plan.zigzag(self.cu_seqlens, rank, self.layout.world_size, kv_order="rank")

    def run(self, rank: int) -> RankResult:
        """One rank's forward and backward."""
        plan, tokens = self.plan(rank), self.owned[rank]
        q, k, v = (x.detach().requires_grad_() for x in (self.inputs.q[tokens], self.k, self.v))
        dout = self.inputs.dout[tokens]

        def forward() -> torch.Tensor:
            out = plan_attention(q, k, v, plan)
            assert isinstance(out, torch.Tensor)
            return out

        # The interpreter computes log2(0) = -inf for rows that see nothing yet, and numpy warns of it.
        with np.errstate(divide="ignore", invalid="ignore"):
            out = forward()
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        on_gpu = q.device.type == "cuda"
        return RankResult(
            plan,
            tokens,
            out.detach(),
            dq,
            dk,
            dv,
            _milliseconds(forward) if on_gpu else None,
            _milliseconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)) if on_gpu else None,
        )

    def summed(self, results: Sequence[RankResult], name: str) -> torch.Tensor:
        """The ranks' "dk" or "dv" added up in float32, (T, Hkv, D) in the pack's own order."""
        total = torch.stack([getattr(result, name) for result in results]).sum(dim=0, dtype=torch.float32)
        return torch.empty_like(total).index_copy_(0, self.gathered, total)


def _milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))
