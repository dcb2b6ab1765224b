"""A plain PyTorch training loop under context parallelism: every rank computes a part of every document.

    torchrun --nproc-per-node 4 examples/plain_pytorch.py

Losses and gradients are those of one process: `torchrun --nproc-per-node 1 examples/plain_pytorch.py`.
"""

import os
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import weft_attn as weft

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LONGEST = 64, 64, 4, 2, 16, 200


def packed_batch(step: int) -> tuple[torch.Tensor, list[int]]:
    """Five documents that count in steps of their own: ids (T,), and where they begin, on the host. Equal on every rank."""
    chance = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, LONGEST, (5,), generator=chance).tolist()
    starts, strides = torch.randint(1, VOCABULARY, (2, 5), generator=chance).tolist()
    documents = [
        (start + stride * torch.arange(n)) % VOCABULARY for start, stride, n in zip(starts, strides, lengths, strict=True)
    ]
    return torch.cat(documents), [0, *torch.tensor(lengths).cumsum(0).tolist()]


class Block(nn.Module):
    """A transformer block over this rank's tokens; attention alone looks at other ranks' tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 3 * HIDDEN), nn.SiLU(), nn.Linear(3 * HIDDEN, HIDDEN))

    def forward(self, x: torch.Tensor, cp: weft.ContextParallel, cu_seqlens: list[int]) -> torch.Tensor:
        heads = self.qkv(self.before_attention(x)).unflatten(1, (-1, HEAD_DIM))
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)  # (T_local, heads, D) each
        x = x + self.out(cp.attention(q, k, v, cu_seqlens).flatten(1))
        return x + self.mlp(self.before_mlp(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LONGEST, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, cp: weft.ContextParallel, cu_seqlens: list[int]
    ) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x, cp, cu_seqlens)
        return self.head(x)


def train(device: torch.device, steps: int) -> list[tuple[float, float]]:
    """Returns every step's loss and gradient norm."""
    cp = weft.ContextParallel()  # all ranks; for some, pass a process group or a device mesh's dimension
    torch.manual_seed(0)  # the same weights on every rank
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    log = []
    for step in range(steps):
        ids, cu_seqlens = packed_batch(step)
        labels = cp.shift_labels(cu_seqlens, ids)  # cut from the whole batch: neighbours may live on another rank
        count = sum(max(stop - start - 1, 0) for start, stop in pairwise(cu_seqlens))
        logits = model(cp.shard(cu_seqlens, ids).to(device), cp.position_ids(cu_seqlens, device=device), cp, cu_seqlens)
        # The mean over all labels of the batch: ranks sum theirs and divide by the count of all, so that the loss and its
        # gradients are sums over the ranks, however many labels each has.
        loss = F.cross_entropy(logits, labels.to(device), ignore_index=-100, reduction="sum") / count
        optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        for tensor in (loss, *(p.grad for p in model.parameters())):
            dist.all_reduce(tensor)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log.append((loss.item(), norm.item()))
        if cp.rank == 0:
            print(f"step {step}: {cp.world_size} ranks, {cu_seqlens[-1]} tokens, loss {loss:.5f}, gradient norm {norm:.4f}")
    return log


if __name__ == "__main__":
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"), steps=20)
    dist.destroy_process_group()
