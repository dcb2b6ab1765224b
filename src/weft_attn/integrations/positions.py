"""Position ids beside a mask that has not seen them: packed documents must not pass for one, nor a shard for a document.

transformers shows position ids to a mask only where a model hands them on, and where there is neither a cache nor a padding mask.
Layers get them in any case, and look here before they attend. Positions that begin again at 0 are packed documents, as for flash
attention; the mask is cut at them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from weft_attn.errors import InvalidInput
from weft_attn.integrations import masks
from weft_attn.integrations.masks import IntArray, Window
from weft_attn.plan import Plan


@dataclass
class PositionRule:
    """What the position ids of a forward must be; the first layer that attends looks, the others take its word.

    Attributes:
        expected: (rows,) on the CPU; None: any that count up by one in each document.
        window: of a mask that is a band alone, which documents can be cut from; None: sequences are one document each.
        looked: whether a layer has looked.
        packed: the plan of the documents that positions showed; None: each sequence is one.
    """

    expected: torch.Tensor | None
    window: Window | None = None
    looked: bool = False
    packed: Plan | None = None

    def look(self, positions: torch.Tensor | None, batch: int = 1) -> None:
        """Compare a layer's (B or 1, rows) position ids; `batch`: B. Copies them, or one answer about them, to the host.

        Raises:
            InvalidInput: they break the rule; or there are none to see where only those of one document could be guessed.
        """
        if self.looked:
            return
        if self.expected is not None:
            self._look_in_batch(self.expected, positions)
        elif positions is not None and positions.ndim == 2 and bool((positions.diff(dim=1) != 1).any()):
            self.packed = self._packed(positions.detach().to(device="cpu", dtype=torch.int64).numpy(), batch)
        self.looked = True

    def _packed(self, positions: IntArray, batch: int) -> Plan:
        begins = np.diff(positions, axis=1, prepend=positions[:, :1] - 1) != 1
        if self.window is None or (positions[begins] != 0).any():
            raise InvalidInput(
                "packed documents are in the mask: expected position_ids that count up by one and begin again at 0, in layers that "
                "are causal or have a window, or use_cache=False with a model that shows them to its mask, or cu_seq_lens_q and "
                "cu_seq_lens_k, or an attention_mask of ones to attend across all tokens, given position_ids that jump"
            )
        documents = np.broadcast_to(begins.cumsum(axis=1), (batch, positions.shape[1]))
        return masks.segmented_band(documents, documents, None, 0, self.window)

    @staticmethod
    def _look_in_batch(expected: torch.Tensor, positions: torch.Tensor | None) -> None:
        if positions is None:
            given = torch.arange(len(expected), device="cpu") + (expected[:1] if len(expected) else 0)
        else:
            given = positions.reshape(-1).cpu()
        if not torch.equal(given, expected.to(given.dtype)):
            raise InvalidInput(
                "a model inside a context-parallel batch counts positions inside the documents: "
                "expected position_ids=cp.position_ids(cu_seqlens)[None], given "
                + ("none that its layers show" if positions is None else "others")
            )
