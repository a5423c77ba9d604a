"""Writes rounds as `rounds.py` does: `python killed_writer.py FOLDER ATTEMPT START_STEP END_STEP MOMENT`.

Is killed at a moment (see `killing.py`; 0: not at all). Says on its standard output which steps are complete.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from killing import die_in_folder

from verl_valgen.records import GroupNumbers, Round, RoundNumbers, Sample
from verl_valgen.rounds.recorder import BestFile
from verl_valgen.scores.best import Best
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.trackers import composite, open_trackers
from verl_valgen.trackers.base import TrackedRun
from verl_valgen.trackers.jsonl import set_aside

NUM_SAMPLES = 3
METRIC = "exact_match"
_TEXT = "So it goes. " * 1000  # more than a file's buffer holds


def value_of(attempt: int, step: int) -> float:
    """Of the metric; up and down, and tells the attempt that it comes from."""
    return (7 * step + 3 * attempt) % 11 + attempt / 1000


def _sample(attempt: int, step: int, index: int) -> Sample:
    return Sample(
        step=step,
        index=index,
        row=index,
        strategy="default",
        completion=0,
        prompt="<|user|>And then?",
        prompt_text="And then?",
        generation=_TEXT,
        reference=None,
        finish_reason="length",
        num_prompt_tokens=3,
        num_new_tokens=1000,
        seed=attempt,
    )


def main(directory: Path, attempt: int, start_step: int, end_step: int, moment: int) -> None:
    composite._MAX_WAIT_S = 60.0  # a round that is not written yet is not complete
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the console is a tracker too
    die_in_folder(directory, moment)
    set_aside(directory, start_step)
    best = Best(directory, METRIC, "max", start_step)
    trackers = open_trackers(
        [],
        TrackedRun(directory, GenerationSettings(enabled=True), description={"attempt": attempt}),
        others={"best.json": BestFile(best)},
    )
    for step in range(start_step + 1, end_step + 1):
        samples = [_sample(attempt, step, index) for index in range(NUM_SAMPLES)]
        numbers = RoundNumbers(NUM_SAMPLES, 1.0, 1.0, GroupNumbers(scores={METRIC: value_of(attempt, step)}))
        trackers.log(Round(step, samples, best.update(numbers, step)))
        print(step, file=report, flush=True)
    trackers.close()


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    main(Path(folder), *map(int, numbers))
