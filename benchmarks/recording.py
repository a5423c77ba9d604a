"""Measures what recording a round costs: the time that the trainer waits, and that of each tracker's own thread.

    python benchmarks/recording.py                              # files and console, with the page and without
    python benchmarks/recording.py wandb swanlab mlflow         # and with these of verl's loggers, offline
    PYTHONPATH=<another checkout> python benchmarks/recording.py

Ways take turns, round by round, each with a folder of its own; before the next round all threads are done, as they are
in a run whose validations lie minutes apart. Samples are of 2 KB, half of it the prompt. Times are medians over the
rounds, in milliseconds; the first round of each way, which imports and makes what the others find, stands apart. What
the page adds is the median of the differences within a turn, which a busy machine disturbs less.
Works with the package as it was before it had a page, too.
"""

from __future__ import annotations

import argparse
import atexit
import inspect
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_valgen.records import GroupNumbers, Round, RoundNumbers, Sample
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.trackers import open_trackers

SIZES = (8, 512)
ROUNDS = 20
NUM_CHARS = 1000
"""Of a prompt, and of an answer."""
METRICS = ("exact_match", "token_f1")
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline", "CLEARML_OFFLINE_MODE": "1"}
HAS_PAGE = "page" in inspect.signature(GenerationSettings).parameters


class Way:
    """One way of recording rounds; notes how long the trainer waited, and how long each tracker took."""

    def __init__(
        self, name: str, directory: Path, loggers: list[str], verl_loggers: dict[str, Any], page: bool
    ) -> None:
        self.name = name
        self.composite = _open(directory, loggers, verl_loggers, page)
        self.waited_s: list[float] = []
        self.thread_s: dict[str, list[float]] = defaultdict(list)
        for tracker_name, tracker in self.composite.trackers.items():
            tracker.log = self._timed(tracker_name, tracker.log)

    def record(self, round: Round) -> None:
        start = time.perf_counter()
        self.composite.log(round)
        self.waited_s.append(time.perf_counter() - start)
        for name in self.composite.trackers:
            self.composite._queues[name].drain(60.0)

    def _timed(self, name: str, log: Callable[[Round], None]) -> Callable[[Round], None]:
        def timed(round: Round) -> None:
            start = time.perf_counter()
            try:
                log(round)
            finally:
                self.thread_s[name].append(time.perf_counter() - start)

        return timed


def _open(directory: Path, loggers: list[str], verl_loggers: dict[str, Any], page: bool) -> Any:
    settings = {"enabled": True, **({"page": page} if HAS_PAGE else {})}
    if "directory" in inspect.signature(open_trackers).parameters:  # as it was before
        return open_trackers(loggers, directory=directory, max_log_chars=500, max_tracker_chars=4000)
    from verl_valgen.trackers.base import TrackedRun

    return open_trackers(loggers, TrackedRun(directory, GenerationSettings(**settings), verl_loggers))


def make_round(step: int, num_samples: int) -> Round:
    """Answers of which each step changes a part."""
    samples = [
        Sample(
            step=step,
            index=index,
            row=index,
            strategy="default",
            completion=0,
            prompt=_text(index, 0),
            prompt_text=_text(index, 0)[: NUM_CHARS // 2],
            generation=_text(index, step),
            reference=f"The {index}th of all",
            finish_reason="eos",
            num_prompt_tokens=250,
            num_new_tokens=250,
            seed=0,
            params={"do_sample": False, "max_new_tokens": 300, "dtype": "bfloat16"},
            scores=dict.fromkeys(METRICS, 0.5),
            data_source="capitals",
        )
        for index in range(num_samples)
    ]
    means = GroupNumbers({"num_new_tokens": 250.0, "cut_off": 0.0, "empty": 0.0}, dict.fromkeys(METRICS, step / 100))
    return Round(step, samples, RoundNumbers(num_samples, 10.0, 100.0, means))


def _text(index: int, step: int) -> str:
    words = (f"word {(index * 31 + step * 17 + i * i) % 997}, <b>é</b>\n" for i in range(NUM_CHARS))
    return "".join(words)[:NUM_CHARS]


def open_verls_loggers(loggers: list[str], directory: Path) -> dict[str, Any]:
    """verl's own logger objects, on runs that are offline and lie in a folder, the working directory from then on."""
    if not loggers:
        return {}
    os.environ |= OFFLINE | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
        "SWANLAB_LOG_DIR": str(directory / "swanlog"),
        "TENSORBOARD_DIR": str(directory / "tensorboard"),
        "TRACKIO_DIR": str(directory / "trackio"),
        "VERL_FILE_LOGGER_ROOT": str(directory / "file"),
        "WANDB_DIR": str(directory),
    }
    os.chdir(directory)
    from verl.utils.tracking import Tracking

    global _tracking  # it ends all runs when the last reference to it goes
    _tracking = Tracking("benchmark", "recording", loggers, config={"trainer": {"wandb_proxy": None}})
    return dict(_tracking.logger)


def measure(num_samples: int, loggers: list[str], verl_loggers: dict[str, Any], directory: Path, num: int) -> list[Way]:
    ways = []
    for used in ([], loggers) if loggers else ([],):
        for page in (False, True) if HAS_PAGE else (False,):
            name = f"{', '.join(['files', *used])}{', page' if page else ''}"
            folder = directory / str(num_samples) / f"{len(ways)}" / "generations"
            ways.append(Way(name, folder, used, verl_loggers, page))
    for number in range(num + 1):
        for place in range(len(ways)):
            way = ways[(place + number) % len(ways)]  # none is always the first, or the last
            step = num_samples * 10_000 + number * len(ways) + place  # trackers know one run, whose steps go up
            way.record(make_round(step, num_samples))
    for way in ways:
        way.composite.close()
    return ways


def report(num_samples: int, ways: list[Way]) -> str:
    lines = [f"\n{num_samples} samples of {2 * NUM_CHARS} characters; ms", ""]
    lines += ["| | trainer waits | at most | first round | with the page | trackers' own threads |", "|" + "---|" * 6]
    for number, way in enumerate(ways):
        first, *rest = (1e3 * seconds for seconds in way.waited_s)
        more = [1e3 * (a - b) for a, b in zip(way.waited_s[1:], ways[number - 1].waited_s[1:], strict=True)]
        with_page = f"{statistics.median(more):+.1f}" if HAS_PAGE and number % 2 else ""
        threads = ", ".join(f"{name} {1e3 * statistics.median(times[1:]):.1f}" for name, times in way.thread_s.items())
        lines.append(
            f"| {way.name} | {statistics.median(rest):.1f} | {max(rest):.1f} | {first:.1f} | {with_page} | {threads} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loggers", nargs="*", help="of verl's, by their names in trainer.logger")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="numbers of samples")
    args = parser.parse_args()
    shown = os.fdopen(os.dup(1), "w")
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory, ignore_errors=True)  # behind what the loggers' packages do at the end
    with open(directory / "console.txt", "w") as console:
        os.dup2(console.fileno(), 1)  # the console is a tracker too
    verl_loggers = open_verls_loggers(args.loggers, directory)
    for num_samples in args.sizes:
        ways = measure(num_samples, args.loggers, verl_loggers, directory, args.rounds)
        print(report(num_samples, ways), file=shown, flush=True)


if __name__ == "__main__":
    main()
