"""FSDP2 and context parallelism over a 2-D mesh: rows of the mesh take different batches, a row's ranks share one.

    torchrun --nproc-per-node 4 examples/fsdp2_context_parallel.py

Losses and gradients are those of one process: `torchrun --nproc-per-node 1 examples/fsdp2_context_parallel.py`.
"""

import os
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

import weft_attn as weft
from weft_attn.integrations.transformers import register

VOCABULARY, LONGEST = 64, 200
BATCHES = 2  # of a step, over all rows of the mesh
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LONGEST,
)


def packed_batch(seed: int) -> tuple[torch.Tensor, list[int]]:
    """Five documents that count in steps of their own: ids (T,), and where they begin, on the host. Equal on every rank."""
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, LONGEST, (5,), generator=chance).tolist()
    starts, strides = torch.randint(1, VOCABULARY, (2, 5), generator=chance).tolist()
    documents = [
        (start + stride * torch.arange(n)) % VOCABULARY for start, stride, n in zip(starts, strides, lengths, strict=True)
    ]
    return torch.cat(documents), [0, *torch.tensor(lengths).cumsum(0).tolist()]


def train(device: torch.device, steps: int) -> list[tuple[float, float]]:
    """Returns every step's loss and gradient norm."""
    register()
    world_size = dist.get_world_size()
    rows = BATCHES if world_size % BATCHES == 0 else 1
    mesh = init_device_mesh(device.type, (rows, world_size // rows), mesh_dim_names=("dp", "cp"))
    cp = weft.ContextParallel(mesh["cp"])

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="weft").to(device)
    # Over both dimensions: parameters are sharded over "cp" and replicated over "dp", gradients reduced over all ranks. Without
    # `mesh`, they are sharded over all ranks.
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    log = []
    for step in range(steps):
        batches = [packed_batch(BATCHES * step + index) for index in range(BATCHES)]
        count = sum(max(stop - start - 1, 0) for _, cu_seqlens in batches for start, stop in pairwise(cu_seqlens))
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for ids, cu_seqlens in batches[mesh.get_local_rank("dp") :: rows]:  # this row's batches
            with cp.batch(cu_seqlens):
                logits = model(
                    input_ids=cp.shard(cu_seqlens, ids)[None].to(device),
                    position_ids=cp.position_ids(cu_seqlens)[None].to(device),
                    use_cache=False,
                ).logits[0]
                labels = cp.shift_labels(cu_seqlens, ids).to(device)
                # This rank's part of the mean over all labels of all batches. FSDP takes the mean of the ranks' gradients,
                # where the sum is due: times the number of ranks.
                loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count
                (loss * world_size).backward()
            total += loss.detach()
        dist.all_reduce(total)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        log.append((total.item(), norm.item()))
        if dist.get_rank() == 0:
            print(f"step {step}: {rows} x {cp.world_size} ranks, loss {total:.5f}, gradient norm {norm:.4f}")
    return log


if __name__ == "__main__":
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"), steps=20)
    dist.destroy_process_group()
