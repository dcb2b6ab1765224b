"""What a caller of the demo may choose, and what follows from it on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from weft_attn.demo.documents import Pack, pack_batches
from weft_attn.distributed.process_group import backend_of
from weft_attn.errors import Unsupported, require
from weft_attn.plan.draw import require_picture
from weft_attn.plan.layouts import Zigzag

RANKS = 4
STEPS = 40


@dataclass(frozen=True)
class Sizes:
    """The model's sizes, and the tokens of a batch."""

    tokens: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


# Less than a minute on two cores.
CPU_SIZES = Sizes(tokens=1024, layers=3, heads=4, kv_heads=2, head_dim=32)
GPU_SIZES = Sizes(tokens=8192, layers=6, heads=8, kv_heads=2, head_dim=64)


@dataclass(frozen=True)
class Options:
    """What a caller may choose.

    Attributes:
        documents: files and folders to train on; empty: the Python standard library.
        tokens: tokens of a batch; None: what the device does in about a minute.
        steps: batches to train on.
        world_size: ranks; None: 4, or fewer where there are fewer GPUs.
        device: "cpu" or "cuda"; None: GPUs where there are several.
        picture: where the picture goes.
    """

    documents: Sequence[Path] = ()
    tokens: int | None = None
    steps: int = STEPS
    world_size: int | None = None
    device: str | None = None
    picture: Path = Path("out/weft-demo.png")


@dataclass(frozen=True)
class Setup:
    """A run: its model's sizes, its batches, and the processes that share them."""

    sizes: Sizes
    batches: tuple[Pack, ...]
    world_size: int
    on_gpu: bool
    picture: Path

    @classmethod
    def of(cls, options: Options, *, local_ranks: int | None = None, draws: bool = True) -> Setup:
        """What `options` come to on this machine.

        Args:
            options: the caller's; their world_size is already the group's where there is one.
            local_ranks: processes of the group on this machine; None: all.
            draws: whether this process draws the picture.

        Raises:
            InvalidInput: an option that is out of range, a picture that could not be written, or documents without enough bytes.
            Unsupported: no such device, fewer GPUs than ranks, or a package of the extra `demo` is missing.
        """
        given = options.world_size
        require(given is None or given >= 1, "ranks are counted", expected=">= 1", given=given)
        require(options.steps >= 1, "steps are counted", expected=">= 1", given=options.steps)
        require(options.tokens is None or options.tokens >= 2, "tokens predict the next", expected=">= 2", given=options.tokens)
        require(options.device in (None, "cpu", "cuda"), "devices are named", expected="cpu or cuda", given=options.device)
        missing = [name for name in ("transformers", "matplotlib") if importlib.util.find_spec(name) is None]
        require(
            not missing,
            "the demo trains a model of transformers and draws with matplotlib",
            expected="the extra weft-attn[demo]",
            given=f"no {' and no '.join(missing)}",
            error=Unsupported,
        )
        if draws:
            require_picture(options.picture)
        gpus = torch.cuda.device_count()
        # Two ranks cannot share a GPU under NCCL.
        on_gpu = options.device == "cuda" or (options.device is None and gpus >= (local_ranks or given or 2))
        world_size = given or (min(RANKS, max(1, gpus)) if on_gpu else RANKS)
        require(
            not on_gpu or gpus >= (local_ranks or world_size),
            "every rank has a GPU of its own",
            expected=f">= {local_ranks or world_size} GPUs",
            given=gpus,
            error=Unsupported,
        )
        sizes = GPU_SIZES if on_gpu else CPU_SIZES
        sizes = replace(sizes, tokens=options.tokens or sizes.tokens)
        batches = tuple(pack_batches(options.documents, sizes.tokens, options.steps))
        require(
            all((np.diff(batch.cu_seqlens) >= 2).any() for batch in batches),
            "a batch has something to predict",
            expected="a document of at least two bytes in every batch",
            given=batches[0].source,
        )
        for number, batch in enumerate(batches, start=1):
            rows = Zigzag.of(batch.cu_seqlens, world_size).rank_tokens
            # A model of transformers fails on a batch without rows.
            require(
                bool(rows.all()),
                "every rank has rows of every batch",
                expected="fewer ranks, more tokens or longer documents",
                given=f"batch {number} of {batch.cu_seqlens[-1]} tokens, of which rank {rows.argmin()} of {world_size} has none",
            )
        return cls(sizes, batches, world_size, on_gpu, options.picture)

    @property
    def backend(self) -> str:
        return backend_of(self.on_gpu)
