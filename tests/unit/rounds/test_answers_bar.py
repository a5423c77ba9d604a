"""The bar while answers are long in coming: when it is there, what it says, and that it leaves nothing behind."""

from __future__ import annotations

import io
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from pseudo_terminal import on_a_terminal
from tqdm import tqdm

from verl_valgen.backends.base import Backend
from verl_valgen.records import Completion, Request
from verl_valgen.rounds import generation
from verl_valgen.rounds.answers_bar import AnswersBar
from verl_valgen.settings.settings import GenerationSettings


class Terminal(io.StringIO):
    """Notes when something is drawn on it."""

    def __init__(self) -> None:
        super().__init__()
        self.has_bar = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        written = super().write(text)
        if "answers" in text:
            self.has_bar.set()
        return written


class Clock:
    """Stands for the event that ends the bar: waiting takes no time."""

    def __init__(self, *actions):
        self.actions = list(actions)
        self.waits: list[float] = []

    def wait(self, seconds: float) -> bool:
        """True at the end, when the actions are used up."""
        self.waits.append(seconds)
        if self.actions:
            self.actions.pop(0)()
        return not self.actions


def drawn(monkeypatch, num_answers, num_in_all, since, *actions_of) -> tuple[list[str], list[float]]:
    """What was drawn, state by state, and how long the bar waited in between."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    bar = AnswersBar(num_answers, num_in_all, since, is_wanted=True)
    bar._stopped = clock = Clock(*(action(bar) for action in actions_of))  # type: ignore[assignment]
    bar._draw()
    states = [state.rstrip() for state in terminal.getvalue().split("\r") if state.strip()]
    return states, clock.waits


def test_it_is_there_from_two_seconds_after_the_beginning_on_and_taken_away(monkeypatch):
    done = lambda num: lambda bar: lambda: bar.add(num)  # noqa: E731
    states, waits = drawn(monkeypatch, 12, 12, 99.5, done(2), done(4), done(0))
    assert waits == [1.5, 0.5, 0.5]
    assert list(dict.fromkeys(state.partition(" [")[0] for state in states)) == [
        "Generating: 2/12 answers", "Generating: 6/12 answers",
    ]  # fmt: skip
    assert sys.stderr.getvalue().endswith("\r")
    assert sys.stderr.getvalue().rpartition("answers")[2].count("\r") == 2  # blanks over it


def test_of_several_ranks_it_says_that_it_knows_its_own(monkeypatch):
    states, waits = drawn(monkeypatch, 6, 12, 0.0, lambda bar: lambda: None, lambda bar: lambda: None)
    assert waits == [0.0, 0.5]
    assert states[0].startswith("Generating: 0/6 answers of this rank, 12 in all [01:40]")


def test_a_short_round_has_none(monkeypatch):
    states, waits = drawn(monkeypatch, 6, 6, 100.0, lambda bar: lambda: None)
    assert (states, waits) == ([], [2.0])


@pytest.mark.parametrize(("is_wanted", "stream"), [(False, Terminal()), (True, io.StringIO()), (True, None)])
def test_without_a_terminal_or_where_it_is_not_wanted_there_is_no_thread(monkeypatch, is_wanted, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    before = threading.active_count()
    with AnswersBar(3, 3, 0.0, is_wanted=is_wanted) as bar:
        bar.add(1)
        assert threading.active_count() == before
    assert stream is None or stream.getvalue() == ""


def test_a_terminal_that_has_gone_costs_nothing(monkeypatch, capsys):
    class Gone(Terminal):
        def write(self, text: str) -> int:
            self.has_bar.set()
            raise BrokenPipeError

    terminal = Gone()
    monkeypatch.setattr(sys, "stderr", terminal)
    with AnswersBar(3, 3, 0.0, is_wanted=True) as bar:
        assert terminal.has_bar.wait(60)
        bar.add(3)
    monkeypatch.undo()
    assert capsys.readouterr().err == ""
    for lock in tqdm.get_lock().locks:  # for which the trainer's own bar would wait
        assert lock.acquire(True, 60)
        lock.release()


def test_it_ends_with_the_answers_whatever_ends_them(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = AnswersBar(3, 3, 0.0, is_wanted=True)

    def fail() -> None:
        with bar:
            assert terminal.has_bar.wait(60)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not bar._thread.is_alive()
    assert terminal.getvalue().endswith("\r")


@pytest.mark.parametrize(
    ("is_logging_rank", "console", "is_wanted"),
    [(True, "full", True), (True, "brief", True), (True, "none", False), (False, "full", False)],
)
def test_the_logging_rank_counts_what_its_backend_tells(monkeypatch, is_logging_rank, console, is_wanted):
    made: list[AnswersBar] = []

    class Noted(AnswersBar):
        def __init__(self, *args, is_wanted: bool) -> None:
            super().__init__(*args, is_wanted=False)
            made.append(self)
            self.was_wanted = is_wanted

    class TwoBatches(Backend):
        def generate(self, requests):
            for _ in range(2):
                self.on_answers(len(requests) // 2)
            return [Completion([1], "eos") for _ in requests]

    monkeypatch.setattr(generation, "AnswersBar", Noted)
    answerer = object.__new__(generation.Answerer)
    answerer.host = SimpleNamespace(is_logging_rank=is_logging_rank)  # type: ignore[assignment]
    answerer.settings = GenerationSettings(enabled=True, console=console)
    share = [Request([1], (0, 0), {})] * 4
    gathered = SimpleNamespace(share=share, requests=share * 2, began_at=7.0, is_beside_training=False)
    assert len(answerer._timed(TwoBatches(None, None, 0), gathered)) == 4  # type: ignore[arg-type]
    (bar,) = made
    assert (bar.was_wanted, bar.num_done, bar.num_answers, bar.num_in_all, bar.since) == (is_wanted, 4, 4, 8, 7.0)


PROGRAM = """
import sys, threading
from tqdm import tqdm
from verl_valgen.rounds.answers_bar import AnswersBar
from verl_valgen.viewing.beside_bars import write_lines

with tqdm(total=2, desc="Epoch 1/1", mininterval=0) as verls:
    for step in range(2):
        with AnswersBar(4, 4, 0.0, is_wanted=True) as bar:
            bar.add(3)
            while len(tqdm._instances) < 2:
                threading.Event().wait(0.01)
            write_lines(f"a warning at step {step}")
        write_lines(f"=== Validation Samples (Step {step}) ===")
        verls.update()
print("done")
"""


def test_verls_own_bar_goes_on_and_nothing_of_ours_is_left():
    *lines, bar, last = [line for line in on_a_terminal([sys.executable, "-c", PROGRAM]) if line]
    assert lines == [
        line for step in range(2) for line in (f"a warning at step {step}", f"=== Validation Samples (Step {step}) ===")
    ]
    assert bar.startswith("Epoch 1/1: 100%")
    assert last == "done"


def test_without_room_for_a_thread_the_round_goes_on_without_a_bar(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(threading.Thread, "start", start)
    with AnswersBar(6, 6, 0.0, is_wanted=True) as bar:
        bar.add(1)
    assert sys.stderr.getvalue() == ""
