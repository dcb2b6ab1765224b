"""A small byte-level Llama, and its training on packed documents: in one process, or as a rank of a context-parallel group.

Both start from the same parameters and take the same batches. The one process uses transformers' own attention over PyTorch and
cuts labels and positions itself, so that whatever differs is the doing of the group, of Weft, or of rounding.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from weft_attn.demo.documents import Pack
from weft_attn.demo.options import Sizes
from weft_attn.distributed.context_parallel import ContextParallel
from weft_attn.integrations.transformers import register

SEED = 0
IGNORED = -100
LEARNING_RATE = 2e-3
WARM_UP = 5  # steps
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Share:
    """The tokens of a batch that a process computes, each with its position in its document and the token to predict."""

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


class Trainer:
    """A model and its optimizer, alone or as one rank.

    Args:
        sizes: of the model.
        device: where to.
        parallel: the group that shares every batch; None: this process has the whole batch.
    """

    def __init__(self, sizes: Sizes, device: torch.device, parallel: ContextParallel | None = None) -> None:
        self.device = device
        self.parallel = parallel
        if parallel is not None:
            register()
        torch.manual_seed(SEED)
        # Weights are drawn on the CPU, so that they are the same on every device.
        model = LlamaForCausalLM(llama(sizes))
        model.set_attn_implementation("sdpa" if parallel is None else "weft")
        # transformers' annotation of `to` has lost its self.
        self.model = model.to(device)  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))

    def backward(self, batch: Pack) -> float:
        """The loss of a batch (nats per byte), and its gradients in the parameters; on a rank, those of the whole group."""
        share = whole(batch) if self.parallel is None else share_of(batch, self.parallel)
        attending = contextlib.nullcontext() if self.parallel is None else self.parallel.batch(batch.cu_seqlens)
        self.optimizer.zero_grad()
        with attending:
            logits = self.model(
                input_ids=share.ids[None].to(self.device),
                position_ids=share.positions[None].to(self.device),
                use_cache=False,
            ).logits[0]
            # The mean over ALL labels of the batch. Ranks own different numbers of labels, so a mean of the ranks' means would
            # weigh tokens by the rank they landed on: each rank sums its own and divides by the count of the whole batch.
            summed = F.cross_entropy(logits, share.labels.to(self.device), ignore_index=IGNORED, reduction="sum")
            loss = summed / labelled(batch)
            loss.backward()
        loss = loss.detach()
        if self.parallel is not None:
            # The whole loss is then the sum of the ranks' losses, and its gradient the sum (no mean) of their gradients.
            for tensor in (loss, *self.gradients().values()):
                dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return loss.item()

    def update(self) -> None:
        self.optimizer.step()
        self.schedule.step()

    def gradients(self) -> dict[str, torch.Tensor]:
        """By parameter name."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def timed_backward(self, batch: Pack) -> tuple[float, float]:
        """`backward`'s loss, and its seconds."""
        begin = time.perf_counter()
        # Reading the loss waits for the device.
        return self.backward(batch), time.perf_counter() - begin


def llama(sizes: Sizes) -> LlamaConfig:
    """A Llama over bytes, without special tokens."""
    hidden = sizes.heads * sizes.head_dim
    return LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.tokens,
        bos_token_id=None,
        eos_token_id=None,
    )


def labelled(batch: Pack) -> int:
    """Labels of a batch: every token of a document predicts the next one, but for its last."""
    return int(np.maximum(np.diff(batch.cu_seqlens) - 1, 0).sum())


def whole(batch: Pack) -> Share:
    """All tokens of a batch, in packed order."""
    cu_seqlens = batch.cu_seqlens
    lengths = np.diff(cu_seqlens)
    ids = torch.from_numpy(batch.tokens.astype(np.int64))
    positions = np.arange(len(ids)) - np.repeat(cu_seqlens[:-1], lengths)
    labels = ids.roll(-1)
    labels[torch.from_numpy(cu_seqlens[1:][lengths > 0] - 1)] = IGNORED
    return Share(ids, torch.from_numpy(positions), labels)


def share_of(batch: Pack, parallel: ContextParallel) -> Share:
    """The tokens that this rank owns."""
    cu_seqlens = batch.cu_seqlens
    ids = torch.from_numpy(batch.tokens.astype(np.int64))
    labels = parallel.shift_labels(cu_seqlens, ids)
    return Share(parallel.shard(cu_seqlens, ids), parallel.position_ids(cu_seqlens), labels)


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Of all elements of all gradients, the largest difference as a share of its tensor's largest element; and that tensor.

    A gradient that one side lacks, or that is not finite, differs infinitely.
    """
    worst, where = 0.0, ""
    for name in ours.keys() | theirs.keys():
        found = _difference(ours.get(name), theirs.get(name))
        if found >= worst:
            worst, where = found, name
    return worst, where


def _difference(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    if ours is None or theirs is None or not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        return float("inf")
    gap, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    return gap / size if size > 0 else float("inf") if gap > 0 else 0.0
