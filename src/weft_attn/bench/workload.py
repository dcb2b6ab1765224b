"""One batch on the ranks of a context-parallel group: what is measured, and what is predicted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weft_attn.bench.cases import LOG_NORMAL_SEED, Model, equal_lengths, log_normal_lengths, tokens_in_words
from weft_attn.errors import InvalidInput, require
from weft_attn.plan.build import concat_lengths

IntArray = NDArray[np.int64]

LOG_NORMAL = "lognormal"
# What `--documents` takes beside a number of documents, in its errors.
DOCUMENTS = "lengths separated by commas, a file of lengths, equal:L or lognormal:N[:SEED]"
# Lengths for each GPU: a group of W ranks gets every document W times as long, so that a GPU's tokens stay the same.
PACKINGS_PER_GPU = ((8192,), (256, 7392, 544), (4096, 4096), (3104, 3200, 1600, 160, 128))
LONG_PER_GPU = (32768,)
WORK = {"packings": PACKINGS_PER_GPU, "long": (LONG_PER_GPU,)}
# For smoke runs: odd lengths, a document shorter than the chunks, an empty one.
QUICK_WORK = {"long": ((48,),), "packings": ((1, 0, 37, 10),)}


@dataclass(frozen=True)
class Workload:
    """A packed causal batch over the ranks of a group.

    Attributes:
        lengths: documents of the whole batch.
        world_size: ranks.
        layout: which rank owns which tokens, by name.
        max_gather_bytes: cap of the gathered keys and values, as `ContextParallel` takes it.
    """

    lengths: tuple[int, ...]
    world_size: int
    model: Model
    layout: str = "zigzag"
    max_gather_bytes: int | None = None

    def __post_init__(self) -> None:
        require(self.world_size >= 1, "world_size counts ranks", expected=">= 1", given=self.world_size)
        require(
            min(self.lengths, default=0) >= 0, "a length counts tokens", expected=">= 0", given=min(self.lengths, default=0)
        )

    @property
    def cu_seqlens(self) -> IntArray:
        """(documents + 1,) int64."""
        return concat_lengths(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def name(self) -> str:
        """Tokens a GPU, ranks, and the documents as their lengths per GPU where they are whole."""
        per_gpu = [length // self.world_size for length in self.lengths]
        whole = all(one * self.world_size == length for one, length in zip(per_gpu, self.lengths, strict=True))
        shown, unit = (per_gpu, f" x {self.world_size}") if whole else (list(self.lengths), "")
        documents = str(shown) + unit if len(shown) <= 8 else f"{len(shown)} documents"
        return f"{tokens_in_words(self.tokens // self.world_size)} per GPU, {documents}"


def workloads(
    model: Model, world_size: int, *, quick: bool, layout: str, max_gather_bytes: int | None, work: str | None = None
) -> list[Workload]:
    """What `weft bench cp` measures: the packings, then one long document; or only those of a name in WORK, none of another."""
    known: Mapping[str, tuple[tuple[int, ...], ...]] = QUICK_WORK if quick else WORK
    return [
        Workload(tuple(length * world_size for length in lengths), world_size, model, layout, max_gather_bytes)
        for name, per_gpu in known.items()
        if work in (None, name)
        for lengths in per_gpu
    ]


def document_lengths(text: str, tokens: int | None) -> tuple[int, ...]:
    """Lengths as a command line names them.

    Args:
        text: "lognormal:N" or "lognormal:N:SEED", N documents of log-normal length; "equal:L", documents of L tokens; lengths
            separated by commas; a file of lengths separated by commas or white space; or, with `tokens`, another number N than
            that: N documents of equal length, to one token.
        tokens: the batch's tokens; None: the sum of the lengths.

    Raises:
        InvalidInput: none of these; a negative length, no token in all; lengths that do not sum to `tokens`; no `tokens` where
            lengths follow from it.
    """
    require(tokens is None or tokens >= 1, "--tokens counts tokens", expected=">= 1", given=tokens)
    kind, *parameters = text.split(":")
    if kind in (LOG_NORMAL, "equal") and parameters:
        if tokens is None:
            raise InvalidInput(f"drawn lengths fill a number of tokens: expected --tokens with {text!r}, given none")
        numbers = _integers(parameters, text)
        if kind == "equal" and len(numbers) == 1 and numbers[0] >= 1:
            return tuple(equal_lengths(numbers[0], tokens))
        if kind == LOG_NORMAL and len(numbers) <= 2:
            seed = numbers[1] if len(numbers) == 2 else LOG_NORMAL_SEED
            require(seed >= 0, "a seed is not negative", expected=">= 0", given=seed)
            return tuple(log_normal_lengths(numbers[0], tokens, seed))
        raise InvalidInput(f"documents are described: expected lognormal:N[:SEED] or equal:L, given {text!r}")
    # Unlike Path.is_file, False for a list that is too long to name a file.
    if os.path.isfile(text):  # noqa: PTH113
        lengths = _integers(_read(text).replace(",", " ").split(), text)
    else:
        lengths = _integers([part for part in text.split(",") if part.strip()], text)
        if tokens is not None and len(lengths) == 1 and lengths[0] != tokens:
            count = lengths[0]
            require(
                1 <= count <= tokens,
                "one number for --documents counts documents",
                expected=f"1 to {tokens} of them; or {DOCUMENTS}",
                given=count,
            )
            return tuple(np.diff(np.arange(count + 1) * tokens // count).tolist())
    require(bool(lengths), "--documents describes documents", expected=f"a number of them, {DOCUMENTS}", given=repr(text))
    require(min(lengths) >= 0, "a length counts tokens", expected=">= 0", given=min(lengths))
    total = sum(lengths)
    require(
        total >= 1,
        "lengths hold tokens, and one number counts documents only with --tokens",
        expected=f"a sum >= 1 of {DOCUMENTS}",
        given=total,
    )
    require(
        tokens is None or total == tokens,
        "the lengths of --documents sum to --tokens",
        expected=f"a sum of {tokens}",
        given=f"{total} from {text!r}" if len(lengths) <= 8 else f"{total} from {len(lengths)} lengths",
    )
    return tuple(lengths)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidInput(f"a file of lengths can be read: expected text at {path}, given {error}") from error


def _integers(parts: Sequence[str], text: str) -> list[int]:
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise InvalidInput(f"--documents describes documents: expected a number of them, {DOCUMENTS}, given {text!r}") from None
