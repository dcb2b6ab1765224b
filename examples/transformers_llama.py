"""A model of transformers under context parallelism: register, choose attn_implementation="weft", say which batch.

    torchrun --nproc-per-node 4 examples/transformers_llama.py

Losses and gradients are those of one process: `torchrun --nproc-per-node 1 examples/transformers_llama.py`.
"""

import os
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import weft_attn as weft
from weft_attn.integrations.transformers import register

VOCABULARY, LONGEST = 64, 200
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LONGEST,
)


def packed_batch(step: int) -> tuple[torch.Tensor, list[int]]:
    """Five documents that count in steps of their own: ids (T,), and where they begin, on the host. Equal on every rank."""
    chance = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, LONGEST, (5,), generator=chance).tolist()
    starts, strides = torch.randint(1, VOCABULARY, (2, 5), generator=chance).tolist()
    documents = [
        (start + stride * torch.arange(n)) % VOCABULARY for start, stride, n in zip(starts, strides, lengths, strict=True)
    ]
    return torch.cat(documents), [0, *torch.tensor(lengths).cumsum(0).tolist()]


def train(device: torch.device, steps: int) -> list[tuple[float, float]]:
    """Returns every step's loss and gradient norm."""
    register()
    cp = weft.ContextParallel()
    torch.manual_seed(0)  # the same weights on every rank
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="weft").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    log = []
    for step in range(steps):
        ids, cu_seqlens = packed_batch(step)
        labels = cp.shift_labels(cu_seqlens, ids)[None].to(device)  # cut from the whole batch, before it is sharded
        with cp.batch(cu_seqlens):
            loss = model(
                input_ids=cp.shard(cu_seqlens, ids)[None].to(device),
                position_ids=cp.position_ids(cu_seqlens)[None].to(device),
                use_cache=False,
                labels=labels,
                shift_labels=labels,  # shifted already
                # The labels of all ranks: each rank's loss is its part of the mean over the whole batch.
                num_items_in_batch=sum(max(stop - start - 1, 0) for start, stop in pairwise(cu_seqlens)),
            ).loss
            optimizer.zero_grad()
            loss.backward()  # inside the block, for checkpointed layers are computed again
        loss = loss.detach()
        for tensor in (loss, *(p.grad for p in model.parameters())):
            dist.all_reduce(tensor)  # parts add up: a sum, no mean
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
