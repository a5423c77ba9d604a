"""Small disks, and full ones: tmpfs, which root may mount. For runs and for their tests."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

_FILLER = "filler"


@contextlib.contextmanager
def mounted(directory: Path, size: str) -> Iterator[Path]:
    """The folder, made, as a file system of its own. Where none may be mounted the test is skipped, unless all is to be
    tried."""
    import pytest
    from reliability.conftest import IS_WHOLE

    directory.mkdir(parents=True)
    try:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        if IS_WHOLE:
            raise
        pytest.skip("mounting a file system takes root")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def remount(directory: Path | str, mode: str) -> None:
    """Makes the folder's file system read-only (`ro`) or takes that back (`rw`)."""
    subprocess.run(["mount", "-o", f"remount,{mode}", str(directory)], check=True)


def fill(directory: Path | str) -> None:
    """Leaves no byte on the folder's file system, which should be a small one."""
    with contextlib.suppress(OSError), open(Path(directory, _FILLER), "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 512)


def make_room(directory: Path | str) -> None:
    Path(directory, _FILLER).unlink()
