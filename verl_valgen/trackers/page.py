"""The page for the browser, `index.html` in the folder of the samples, which grows with every round.

A round writes its own data and the small list of steps, so that its cost does not grow with their number. The first
round of the process brings the rest in line with the step files: those of a resumed run, of a time without a page, of
files that were put aside.
"""

from __future__ import annotations

import logging

from verl_valgen.records import Round
from verl_valgen.text import OnceLogger, printable
from verl_valgen.trackers.base import TrackedRun, Tracker
from verl_valgen.viewing import writing
from verl_valgen.viewing.data import Payload, run_entry, step_payload
from verl_valgen.viewing.folder import Folder
from verl_valgen.viewing.page_files import DATA_FOLDER, PAGE_FILE


class PageTracker(Tracker):
    """Writes `index.html`, `data/steps.js`, and `data/step_<N, 8 digits>.js` for each round."""

    is_waited_for = False
    is_kept = True

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._steps: set[int] | None = None
        """The steps that have data; None while the folder may say otherwise: at first, and after a failure."""
        self._last: Round | None = None

    def log(self, round: Round) -> None:
        self._last, directory = round, self._run.directory
        # Where the page is gone, somebody has removed the folder.
        before, self._steps = (self._steps if (directory / PAGE_FILE).exists() else None), None
        (directory / DATA_FOLDER).mkdir(parents=True, exist_ok=True)
        records = [sample.to_dict() for sample in round.samples]
        writing.write_step(directory, step_payload(round.step, records, round.numbers.flat()))
        steps = {round.step, *(self._bring_in_line(round.step) if before is None else before)}
        writing.write_index(directory, self._entry(round, steps))
        if before is None:
            writing.write_app(directory)
        self._steps = steps

    def close(self) -> None:
        """Adds rounds that never came here, as they did not while others took long or failed."""
        if self._last is not None and set(Folder(self._run.directory).steps()) != self._steps:
            self._steps = None
            self.log(self._last)

    def _bring_in_line(self, step: int) -> list[int]:
        warnings = OnceLogger(logging.getLogger(__name__))
        folder = Folder(self._run.directory, lambda problem: warnings.warn(f"page: {printable(problem, 300)}"))
        return writing.bring_in_line(folder, own=step)

    def _entry(self, round: Round, steps: set[int]) -> Payload:
        settings, best = self._run.settings, round.numbers.best
        return run_entry(
            writing.run_name(self._run.directory, self._run.description or {}),
            writing.place(self._run.directory),
            sorted(steps),
            settings.best_metric,
            settings.best_mode,
            best,
        )
