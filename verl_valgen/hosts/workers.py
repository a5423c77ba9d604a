"""What the driver of Ray's trainer and its workers tell each other about answers.

Everything that can fail in a worker is a value that is returned: an exception that one worker raises reaches the driver
while others wait for that worker in a collective, and whatever is called next waits for them for ever. What a worker
logs comes with the value, as Ray prints a worker's own output late, shortened, and in another place.

This module knows neither Ray nor verl: it is given a group whose methods call all workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from verl_valgen import __version__
from verl_valgen.collectives import attempt
from verl_valgen.hosts.reports import Failure, LogLine, Report, WorkerError
from verl_valgen.settings.checks import ConfigError
from verl_valgen.text import OnceLogger, describe_at_length

logger = logging.getLogger(__name__)

_PACKAGE = "verl_valgen"


class Desk:
    """A worker's end: does what it is asked, and reports.

    Args:
        part: What is asked, by the names of its methods.
    """

    def __init__(self, rank: int, is_logging_rank: bool, lines: Lines) -> None:
        self.rank, self.is_logging_rank, self.lines = rank, is_logging_rank, lines
        self.part: Any = None

    def set_up(self, make_part: Callable[[], Any]) -> Report:
        """Makes what is asked later. Never raises."""

        def make() -> None:
            self.part = make_part()

        return self._report(make)

    def call(self, name: str, *args: Any) -> Report:
        """Never raises, except to end the program."""
        return self._report(lambda: getattr(self.part, name)(*args))

    def _report(self, function: Callable[[], Any]) -> Report:
        value, error = attempt(function)
        if error is not None:
            logger.debug("%s", describe_at_length(error))
        return Report(
            self.rank,
            self.is_logging_rank,
            value if self.is_logging_rank else None,  # the others have nothing that is read
            None if error is None else Failure.of(error),
            self.lines.taken(),
        )


class Lines(logging.Handler):
    """Keeps what the package logs in a worker, for the driver to log it."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[LogLine] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(LogLine(record.name, record.levelno, record.getMessage()))

    def taken(self) -> list[LogLine]:
        """What was logged since the last call, perhaps by a thread that goes on."""
        self.acquire()
        try:
            taken, self._lines = self._lines, []
        finally:
            self.release()
        return taken

    def take_over(self, level: int) -> None:
        """From now on the package's log goes here alone."""
        package = logging.getLogger(_PACKAGE)
        package.handlers[:] = [self]
        package.propagate = False
        package.setLevel(level)


class Workers:
    """The driver's end.

    Args:
        group: Its methods `valgen_set_up` and `valgen_call` do so on all workers, and give a list of `Report`s.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.warnings = OnceLogger(logger)

    def set_up(self, make_part: Callable[..., Any], *args: Any) -> None:
        """Has each worker make its part: of `make_part`, which is pickled by reference, its `ModelHost` and `args`.

        Raises:
            WorkerError: One could not; then none may be called, as others would wait for it.
            ConfigError: One has another version of the package.
        """
        level = logging.getLogger(_PACKAGE).getEffectiveLevel()
        reports = self.group.valgen_set_up(make_part, args, level)
        for report in reports:  # first, as another version may be what has failed
            if report.version != __version__:
                raise ConfigError(
                    f"the node of rank {report.rank} has verl-valgen {report.version}, the driver {__version__}: "
                    "install the same version on every node"
                )
        self._value_of(reports)

    def call(self, name: str, *args: Any) -> Any:
        """Calls a method of every worker's part, and returns what it gives on the logging rank.

        Raises:
            WorkerError: It failed on any rank: what belongs to it must not be called, as others would wait there.
            BrokenGroupError: No other collective is possible.
        """
        return self._value_of(self.group.valgen_call(name, *args))

    def call_last(self, name: str, *args: Any) -> Any:
        """`call` for what ends a round: what failed on other ranks than the logging rank alone costs a warning."""
        return self._value_of(self.group.valgen_call(name, *args), is_last=True)

    def _value_of(self, reports: list[Report], *, is_last: bool = False) -> Any:
        for report in reports:
            for line in report.lines:
                logging.getLogger(line.logger).log(line.level, "%s%s", report.whose, line.message)
        leading = [report for report in reports if report.is_logging_rank]
        if len(leading) != 1:
            raise WorkerError(f"{len(leading)} of {len(reports)} workers say that they are the logging rank")
        # The logging rank's own error first: what others say may follow from it.
        for report in sorted(reports, key=lambda report: not report.is_logging_rank):
            if report.failure is None:
                continue
            if report.is_logging_rank or report.failure.has_broken_group or not is_last:
                raise report.failure.as_error(report.whose)
            self.warnings.warn(f"{report.whose}{report.failure.text}", cause=report.failure.text)
        return leading[0].value
