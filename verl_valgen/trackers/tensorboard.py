"""Samples in TensorBoard, in the files that verl writes to.

Written by verl's own live writer: of several files that grow in one folder, TensorBoard's Python reader follows the
last one alone, so that a second writer would hide verl's loss.

TensorBoard renders text as Markdown. A text is escaped such that one paragraph shows what the model said: no emphasis,
no links, no images that a browser would fetch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from verl_valgen.records import Round
from verl_valgen.trackers.base import TrackedRun, Tracker, package_of
from verl_valgen.trackers.table import TABLE_KEY, Cell, build_table, sample_texts, scalars

_MAX_TABLE_ROWS = 32
"""Of one table."""
_MAX_BYTES_PER_FLUSH = 100_000
"""The writer is locked while it writes what waits for it, and verl's next line waits for that too."""

_MAX_CLOSING_S = 5.0


class TensorboardTracker(Tracker):
    """Writes a text per sample, tables of all samples, and numbers."""

    # The writer makes its checksums in Python, of 8 MB a second: half a second for 512 samples.
    is_waited_for = False

    def __init__(self, run: TrackedRun) -> None:
        """Takes hold of verl's writer. Raises ImportError without the package, RuntimeError without a writer."""
        text = package_of("tensorboard", "tensorboard.plugins.text.summary_v2")
        if not self.is_live(run):
            raise RuntimeError("verl has no tensorboard writer")
        self._writer = run.verl_loggers["tensorboard"].writer
        self._new_text: Any = text.text_pb
        self._max_chars = run.settings.max_tracker_chars
        self._first_strategy = run.first_strategy

    @classmethod
    def is_live(cls, run: TrackedRun) -> bool:
        """Whether verl opened a writer; does not import the package."""
        return hasattr(run.verl_loggers.get("tensorboard"), "writer")

    def log(self, round: Round) -> None:
        try:
            self._log_samples(round)
        finally:  # the numbers do not depend on the texts
            for key, value in scalars(round.numbers).items():
                self._when_open(partial(self._writer.add_scalar, key, value, round.step))
            self._when_open(self._writer.flush)

    def _log_samples(self, round: Round) -> None:
        columns, rows = build_table(round.samples, self._max_chars)
        contents: Mapping[str, Any] = {
            **{
                key: escaped(text)
                for key, text in sample_texts(round.samples, self._max_chars, self._first_strategy).items()
            },
            **_tables(columns, rows),
        }
        num_bytes = 0
        for key, content in contents.items():
            summary = self._new_text(key, content)
            self._when_open(partial(self._add, summary, round.step))
            num_bytes += summary.ByteSize()
            if num_bytes > _MAX_BYTES_PER_FLUSH:
                self._when_open(self._writer.flush)
                num_bytes = 0

    def _add(self, summary: Any, step: int) -> None:
        self._writer._get_file_writer().add_summary(summary, step)  # as `add_text` does, which takes no tables

    def _when_open(self, write: Callable[[], object]) -> None:
        """Also once verl has ended its loggers: the writer then goes on in a new file of the same folder."""
        deadline = time.monotonic() + _MAX_CLOSING_S
        while True:
            try:
                write()
                return
            except OSError as error:
                if "closed" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)  # it is being closed at this moment


def _tables(columns: list[str], rows: list[list[Cell]]) -> dict[str, Any]:
    """`val/samples`, `val/samples/2`, ...: arrays of texts, whose first row has the columns."""
    import numpy as np  # a dependency of TensorBoard

    header = [escaped(column) for column in columns]
    tables = {}
    for number, start in enumerate(range(0, len(rows), _MAX_TABLE_ROWS), start=1):
        part = rows[start : start + _MAX_TABLE_ROWS]
        cells = [["" if cell is None else escaped(str(cell)) for cell in row] for row in part]
        tables[TABLE_KEY if number == 1 else f"{TABLE_KEY}/{number}"] = np.array([header, *cells], dtype=object)
    return tables


# Control characters but for line breaks: they have no place in HTML, or end a line.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
# Markdown's marks within a line.
_INLINE = {char: f"&#{ord(char)};" for char in "&\\`*_[]<>!~"}
# What may begin a heading, a list, a quotation or code, and the space at the end, which no paragraph keeps.
_BEGINNING = re.compile(r"\d+[.)]|[^A-Za-z0-9_\n]")  # Markdown takes the digits of any script
_END = re.compile(r"[^\S\n]\Z")


def escaped(text: str) -> str:
    """`text` as one line of Markdown that is shown as it is; control characters are made visible, as `\\x1b`."""
    visible = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    beginning = found[0] if (found := _BEGINNING.match(visible)) else ""
    rest = visible[len(beginning) :]
    end = found[0] if (found := _END.search(rest)) else ""
    middle = rest[: len(rest) - len(end)]
    for char, entity in _INLINE.items():  # "&" first; some ten times as fast as a pattern or `translate`
        middle = middle.replace(char, entity)
    return _as_entities(beginning) + middle.replace("\n", "<br>") + _as_entities(end)


def _as_entities(text: str) -> str:
    return "".join(char if char.isdigit() else f"&#{ord(char)};" for char in text)
