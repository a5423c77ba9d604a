"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def replace_file(path: Path, content: bytes, *, writer: str = "") -> None:
    """Writes `path` so that a crash at any moment leaves the old file or the new one, whole.

    Args:
        writer: Tells this writer of the file from others that may write it at the same time; "": there are none.
    """
    temporary = path.with_name(path.name + writer + TEMPORARY_SUFFIX)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # What failed above is what the caller should hear of, not that there was nothing to remove.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    # Makes the new name durable. Some network file systems refuse it; the file is in place all the same.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
