"""Lines beside progress bars: on a terminal between them, in a file whole.

verl's bar (tqdm's) has the last line of its terminal, and may write to the file that our lines go to. This module owns
how lines are written beside it; it does not know what they say. Nothing here imports tqdm: where it is not loaded,
there is no bar.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

WIDTH_OF_FILES = 120
"""Characters of a line where there is no terminal."""

_file_ends: dict[tuple[int, int], int] = {}
"""How long regular files were behind the last line that was written here, by device and inode."""

_written_at: dict[tuple[int, int], float] = {}
"""When the last line was written here to what has no length, such as a pipe: `time.time()`, as bars have it."""


def is_terminal(stream: Any) -> bool:
    """Whether a person looks at what is written to `stream`, so that a bar may be drawn there."""
    try:
        return bool(stream.isatty())
    except Exception:  # closed, or somebody's own object
        return False


def width(stream: Any) -> int:
    """The characters of a line of `stream`: as the terminal has, or `COLUMNS` says; in a file always the same."""
    return shutil.get_terminal_size().columns if is_terminal(stream) else WIDTH_OF_FILES


def write_lines(text: str) -> None:
    """Writes lines to the current standard output, at once; letters that it lacks are escaped.

    Raises what the stream raises.
    """
    stream = sys.stdout
    if stream is None:
        return  # a program without a console
    # Under an ASCII or Latin-1 locale one foreign letter would cost the whole block.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with beside_bars(stream):
        stream.write(text.encode(encoding, errors="backslashreplace").decode(encoding) + "\n")
        stream.flush()


@contextmanager
def beside_bars(stream: Any) -> Iterator[None]:
    """Lines may be written to `stream` meanwhile. What fails of a bar is left to the bar.

    On a terminal all bars are taken away, and drawn again behind the lines. Elsewhere a line is ended that a bar has
    begun in the same file: bars end none before they are done.
    """
    with _locked(stream) as bars:
        cleared = []
        if is_terminal(stream):
            cleared = [bar for bar in bars if _succeeds(bar.clear, nolock=True)]
        elif bars:
            _succeeds(_end_line, stream, bars)
        try:
            yield
        finally:
            if not is_terminal(stream):
                _succeeds(_note_end, stream)
            for bar in cleared:
                _succeeds(bar.refresh, nolock=True)


@contextmanager
def _locked(stream: Any) -> Iterator[list[Any]]:
    """The bars that share lines with `stream`, none of which is drawn meanwhile.

    Without any the lock is not taken: who reads `stream` may hold up the lines, and no bar elsewhere is to wait for
    them; and a bar whose stream writes into the log waits, with the lock, for a handler that we have.
    """
    if not _bars_beside(stream):
        yield []
        return
    with sys.modules["tqdm"].tqdm.get_lock():
        yield _bars_beside(stream)


def _bars_beside(stream: Any) -> list[Any]:
    instances = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())  # () before the first bar
    while True:
        try:
            # One that is being made has no `start_t` yet: as in tqdm's own `external_write_mode`.
            bars = [bar for bar in instances if hasattr(bar, "start_t")]
        except RuntimeError:  # another was made meanwhile
            continue
        return [bar for bar in bars if _shares_lines(bar, stream)]


def _shares_lines(bar: Any, stream: Any) -> bool:
    return is_terminal(bar.fp) if is_terminal(stream) else _is_same_file(bar.fp, stream)


def _succeeds(function: Any, *args: Any, **kwargs: Any) -> bool:
    try:
        function(*args, **kwargs)
    except Exception:  # a bar on a broken pipe, say: a nicety must not cost the lines
        return False
    return True


def _end_line(stream: Any, bars: Sequence[Any]) -> None:
    stream.flush()
    if (length := _length(stream)) is not None:
        is_begun = length != _file_ends.get(_identity(stream), 0)
    else:
        is_begun = any(bar.last_print_t >= _written_at.get(_identity(stream), 0.0) for bar in bars)
    if is_begun:
        stream.write("\n")


def _note_end(stream: Any) -> None:
    """Remembers how long a file is: if it is longer later, somebody may have begun a line in it."""
    stream.flush()
    if (length := _length(stream)) is not None:
        _file_ends[_identity(stream)] = length
    else:
        _written_at[_identity(stream)] = time.time()


def _length(stream: Any) -> int | None:
    """Bytes of a regular file; None of a pipe, say, where it does not tell whether anything was written."""
    found = os.fstat(stream.fileno()) if _has_fileno(stream) else None
    return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None


def _identity(stream: Any) -> tuple[int, int]:
    if not _has_fileno(stream):
        return 0, id(stream)
    found = os.fstat(stream.fileno())
    return found.st_dev, found.st_ino


def _is_same_file(one: Any, other: Any) -> bool:
    if _has_fileno(one) and _has_fileno(other):
        try:
            return os.path.sameopenfile(one.fileno(), other.fileno())
        except OSError:  # one was closed behind its object's back
            return False
    return getattr(one, "_wrapped", one) is other  # tqdm wraps the streams that it writes to


def _has_fileno(stream: Any) -> bool:
    try:
        return isinstance(stream.fileno(), int)
    except Exception:  # a stream in memory, or one that is closed
        return False


class RootHandlersBesideBars(logging.Handler):
    """Hands records on to the root logger's handlers, in place of propagation, beside progress bars.

    So they keep their formats, levels and files.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self.logger = logger

    def handle(self, record: logging.LogRecord) -> bool:
        """Without a lock of its own, as propagation has none."""
        if self.logger.propagate:
            return False  # somebody has switched it on again
        # One that is ours too has the record already (pytest's, which come to loggers that do not propagate).
        handlers = [handler for handler in logging.getLogger().handlers if handler not in self.logger.handlers]
        if not handlers and self.logger.handlers == [self] and logging.lastResort is not None:
            handlers = [logging.lastResort]
        for handler in handlers:
            if record.levelno >= handler.level:
                _hand_on(record, handler)
        return True


def _hand_on(record: logging.LogRecord, handler: logging.Handler) -> None:
    # A class of somebody's own may write beside bars by itself.
    if getattr(type(handler), "emit", None) is not logging.StreamHandler.emit:
        handler.handle(record)
        return
    # The handler's lock first: so does whoever writes beside bars in a handler, and two orders would be a deadlock.
    handler.acquire()
    try:
        with beside_bars(handler.stream):  # type: ignore[attr-defined]
            handler.handle(record)
    finally:
        handler.release()


def log_beside_bars(logger: logging.Logger) -> None:
    """Has the records of `logger` and its children written beside progress bars, wherever the root logger writes them.

    A logger that does not propagate is somebody's own, and stays as it is.
    """
    if logger.propagate and logging.getLogger().handlers:
        logger.addHandler(RootHandlersBesideBars(logger))
        logger.propagate = False
