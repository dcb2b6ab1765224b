"""Which documents the demo and the check pack, and their bytes as tokens."""

from __future__ import annotations

import itertools
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weft_attn.errors import InvalidInput, require

IntArray = NDArray[np.int64]

# The order in which the standard library's files are tried is shuffled with this, so that lengths vary.
SHUFFLE_SEED = 37
# Of the standard library, files longer than twice their share of a pack of this many are passed over, if not this short.
DOCUMENTS_AIMED_AT = 5
SHORT = 600
NOT_PACKAGES = {"site-packages", "dist-packages", "test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """A file's name and its bytes, one token each."""

    name: str
    tokens: NDArray[np.uint8]


@dataclass(frozen=True)
class Pack:
    """Documents one after the other.

    Attributes:
        documents: in packed order; the last may be cut at the cap.
        left_out: documents that the cap left no room for.
        source: where they come from, in words.
    """

    documents: tuple[Document, ...]
    left_out: int
    source: str

    @property
    def cu_seqlens(self) -> IntArray:
        """(documents + 1,) cumulative lengths."""
        return np.concatenate([[0], np.cumsum([len(document.tokens) for document in self.documents])]).astype(np.int64)

    @property
    def tokens(self) -> NDArray[np.uint8]:
        """(total,) all tokens."""
        return np.concatenate([document.tokens for document in self.documents])


@dataclass(frozen=True)
class Source:
    """Files in the order in which they are packed, their names, and where they come from in words."""

    files: tuple[Path, ...]
    names: tuple[str, ...]
    words: str

    @classmethod
    def find(cls, paths: Sequence[Path], max_tokens: int) -> Source:
        """The files under `paths`; without paths, of the standard library, none too long for packs of `max_tokens`.

        Raises:
            InvalidInput: a path does not exist.
        """
        if paths:
            files = [file for path in paths for file in _files_under(path)]
            return cls(tuple(files), tuple(file.name for file in files), ", ".join(str(path) for path in paths))
        root, files = _standard_library(max_tokens)
        names = (file.relative_to(root).as_posix() for file in files)
        return cls(tuple(files), tuple(names), "the Python standard library's own source")

    def documents(self) -> Iterator[Document]:
        for name, file in zip(self.names, self.files, strict=True):
            yield Document(name, np.frombuffer(file.read_bytes(), dtype=np.uint8))


def pack_documents(paths: Sequence[Path], max_tokens: int) -> Pack:
    """Pack the files under `paths`, or of the standard library when there are none, up to `max_tokens`.

    Raises:
        InvalidInput: a path does not exist, or the files hold no byte.
    """
    source = Source.find(paths, max_tokens)
    documents: list[Document] = []
    room = max_tokens
    for document in source.documents():
        if room == 0:
            break
        documents.append(Document(document.name, document.tokens[:room]))
        room -= len(documents[-1].tokens)
    _require_tokens(max_tokens - room, source)
    return Pack(tuple(documents), len(source.files) - len(documents) if paths else 0, source.words)


def pack_batches(paths: Sequence[Path], tokens: int, count: int) -> list[Pack]:
    """Packs of `tokens` each, one after the other through the files and around again; a document may go on in the next pack.

    Raises:
        InvalidInput: a path does not exist, or the files hold no byte.
    """
    source = Source.find(paths, tokens)
    _require_tokens(sum(file.stat().st_size for file in source.files), source)
    stream = itertools.chain.from_iterable(source.documents() for _ in itertools.count())
    packs: list[Pack] = []
    documents: list[Document] = []
    room = tokens
    while len(packs) < count:
        document = next(stream)
        rest = document.tokens
        # Also an empty file is a document.
        while True:
            documents.append(Document(document.name, rest[:room]))
            rest = rest[room:]
            room -= len(documents[-1].tokens)
            if room == 0:
                packs.append(Pack(tuple(documents), 0, source.words))
                documents, room = [], tokens
            if len(rest) == 0:
                break
    return packs[:count]


def _require_tokens(found: int, source: Source) -> None:
    require(found > 0, "documents hold tokens", expected="files with at least one byte", given=source.words)


def _files_under(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_file():
        return [path]
    raise InvalidInput(f"a document is a file or a folder of files: expected an existing path, given {path}")


def _standard_library(max_tokens: int) -> tuple[Path, list[Path]]:
    """Python files of the standard library in a fixed order, none so long that it takes most of the pack."""
    root = Path(sysconfig.get_path("stdlib"))
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and entry.name not in NOT_PACKAGES)
    files = [file for folder in (root, *folders) for file in sorted(folder.glob("*.py"))]
    longest = max(2 * max_tokens // DOCUMENTS_AIMED_AT, SHORT)
    files = [file for file in files if file.stat().st_size <= longest]
    random.Random(SHUFFLE_SEED).shuffle(files)
    return root, files
