"""Attention over packed documents on one device: no processes, one call.

    python examples/packed_documents.py

A batch is documents of any length, one after the other, without padding. `cu_seqlens` says where each begins.
"""

import torch

import weft_attn as weft

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
cu_seqlens = [0, 700, 703, 1000]  # three documents, of 700, 3 and 297 tokens


def make(heads: int) -> torch.Tensor:
    return torch.randn(cu_seqlens[-1], heads, HEAD_DIM, device=device, requires_grad=True)


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
q, k, v = make(HEADS), make(KV_HEADS), make(KV_HEADS)

# Every token sees its own document up to itself.
out = weft.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, causal=True)
out.square().mean().backward()
print(f"out {tuple(out.shape)}, gradient of k {tuple(k.grad.shape)}")

# A model has many layers and one batch: cut the plan once, and give it to every layer.
plan = weft.Plan.from_cu_seqlens(cu_seqlens, cu_seqlens, causal=True, window=(255, 0))  # the last 256 tokens
for _layer in range(3):
    out = weft.plan_attention(q, k, v, plan)
print(f"{plan.pairs:,} visible pairs of {plan.total_q * plan.total_k:,}")

# The second document alone gives the same as in its place in the batch.
alone = weft.varlen_attention(q[700:703], k[700:703], v[700:703], [0, 3], [0, 3], causal=True)
torch.testing.assert_close(alone, weft.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, causal=True)[700:703])
print("a document in a batch is as it is alone")
