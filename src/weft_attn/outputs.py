"""Whether a result could be written to a path: asked before the work that makes it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from weft_attn.errors import refuse, require


def require_writable(path: Path, *, makes_folders: bool = False) -> None:
    """Refuse a path that no result could be written to. A file that is there stays as it is; one that is not is not made.

    Args:
        path: where the result is to go.
        makes_folders: whether who writes it makes missing folders.

    Raises:
        InvalidInput: a folder; a file that may not be written; a folder that is missing or takes no new file.
    """
    try:
        require(not path.is_dir(), "a result goes into a file", expected="a path that is no folder", given=repr(str(path)))
        if path.exists():
            # Appending nothing. A pipe would wait for its reader.
            if path.is_file():
                path.open("ab").close()
            return
        folder = path.resolve().parent
        while makes_folders and not folder.exists():
            folder = folder.parent
        require(folder.is_dir(), "a result has a folder to go to", expected="an existing folder", given=folder)
        # Tried, not asked: some file systems take no files from anyone.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        refuse("a result can be written", expected="a place that takes a file", given=f"{path} ({error.strerror})")
