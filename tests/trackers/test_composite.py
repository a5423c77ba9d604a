"""The error policy: a tracker that fails costs a warning, and nothing else."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from destinations import make_round, make_sample

from verl_valgen.records import WITHHELD
from verl_valgen.trackers import composite as composite_module
from verl_valgen.trackers import page_copies
from verl_valgen.trackers.background import BackgroundQueue
from verl_valgen.trackers.base import Tracker
from verl_valgen.trackers.composite import CompositeTracker
from verl_valgen.trackers.page_copies import PageCopies


class Recorder(Tracker):
    """Remembers its calls, and raises `error` in those named in `failing`."""

    def __init__(self, error: BaseException | None = None, failing: tuple[str, ...] = ("log",)) -> None:
        self.error, self.failing, self.calls = error, failing, []

    def _called(self, method, step=None):
        self.calls.append((method, step))
        if self.error is not None and method in self.failing:
            raise self.error

    def log(self, round):
        self._called("log", round.step)

    def close(self):
        self._called("close")


def _log(composite, *steps):
    for step in steps:
        composite.log(make_round([make_sample(step)], step, scores={"exact": 1.0}))


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "verl_valgen")
    return lambda: [record.getMessage() for record in caplog.records]


def test_every_call_reaches_every_tracker_in_order(warnings):
    trackers = {"jsonl": Recorder(), "console": Recorder()}
    composite = CompositeTracker(trackers)
    _log(composite, 1, 2)
    composite.close()
    expected = [("log", 1), ("log", 2), ("close", None)]
    assert [tracker.calls for tracker in trackers.values()] == [expected, expected]
    assert list(composite.trackers) == ["jsonl", "console"]
    assert warnings() == []


def test_what_is_not_waited_for_takes_no_time_from_what_is():
    order = []

    class Noting(Recorder):
        def log(self, round):
            order.append(self.is_waited_for)

    later, first = Noting(), Noting()
    later.is_waited_for = False
    composite = CompositeTracker({"page": later, "jsonl": first})
    _log(composite, 1)
    composite.close()
    assert order == [True, False]


def test_failing_tracker_warns_once_and_is_given_up_after_three(warnings):
    bad, good = Recorder(ConnectionError("down")), Recorder()
    composite = CompositeTracker({"wandb": bad, "mlflow": good})
    _log(composite, 1, 2, 3, 4, 5)
    composite.close()
    assert [step for method, step in bad.calls if method == "log"] == [1, 2, 3]
    assert [step for method, step in good.calls if method == "log"] == [1, 2, 3, 4, 5]
    assert list(composite.trackers) == ["mlflow"]
    first, second = warnings()
    assert first == "wandb: a round was not recorded: ConnectionError: down"
    assert second == "wandb: disabled after 3 failures in a row; the samples are in the JSONL files"


def test_success_between_failures_starts_the_count_anew(warnings):
    tracker = Recorder()
    composite = CompositeTracker({"wandb": tracker})
    for step in range(1, 10):
        tracker.error = ConnectionError("down") if step % 3 else None
        _log(composite, step)
    assert list(composite.trackers) == ["wandb"]
    assert len(warnings()) == 1


def test_each_kind_of_error_is_warned_of(warnings):
    tracker = Recorder(ValueError("a"))
    composite = CompositeTracker({"wandb": tracker})
    _log(composite, 1)
    tracker.error = KeyError("b")
    _log(composite, 2)
    assert [message.rpartition("recorded: ")[2] for message in warnings()] == ["ValueError: a", "KeyError: 'b'"]


def test_one_that_is_to_be_kept_is_never_given_up(warnings):
    tracker = Recorder(OSError(28, "No space left on device"))
    tracker.is_kept = True
    composite = CompositeTracker({"jsonl": tracker})
    _log(composite, 1, 2, 3, 4, 5)
    assert [step for method, step in tracker.calls if method == "log"] == [1, 2, 3, 4, 5]
    assert len(warnings()) == 1


def test_a_failing_close_is_caught_too(warnings):
    tracker = Recorder(TimeoutError("slow"), failing=("close",))
    composite = CompositeTracker({"mlflow": tracker})
    _log(composite, 1)
    composite.close()
    assert tracker.calls[-1] == ("close", None)
    assert len(warnings()) == 1


def test_hostile_message_is_cut_and_made_printable(warnings):
    _log(CompositeTracker({"wandb": Recorder(ValueError("\x1b[2J\n\u202e" + "x" * 5000))}), 1)
    (message,) = warnings()
    assert "ValueError: \\x1b[2J\\n\\u202exxx" in message
    assert len(message) < 400


def test_message_that_cannot_be_made_is_survived(warnings):
    class Unspeakable(Exception):
        def __str__(self):
            raise RuntimeError

    _log(CompositeTracker({"wandb": Recorder(Unspeakable())}), 1)
    assert "Unspeakable" in warnings()[0]


class Hanging(Recorder):
    """Hangs in every call, until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def _called(self, method, step=None):
        assert self.released.wait(60)
        super()._called(method, step)


def test_one_that_hangs_is_left_behind_and_comes_late(warnings, monkeypatch):
    monkeypatch.setattr(composite_module, "_MAX_WAIT_S", 0.05)
    trackers = {"jsonl": Hanging(), "console": Recorder()}
    composite = CompositeTracker(trackers)
    _log(composite, 1, 2)
    expected = [("log", 1), ("log", 2)]
    assert [tracker.calls for tracker in trackers.values()] == [[], expected]
    trackers["jsonl"].released.set()
    composite.close()
    assert trackers["jsonl"].calls == [*expected, ("close", None)]
    assert warnings() == ["jsonl: a round takes longer than 0.05 s to record; training does not wait"]


def test_two_that_hang_are_waited_for_as_long_as_one(warnings, monkeypatch):
    waited: list[float] = []
    wait = BackgroundQueue.wait
    monkeypatch.setattr(BackgroundQueue, "wait", lambda self, seconds: (waited.append(seconds), wait(self, seconds))[1])
    monkeypatch.setattr(composite_module, "_MAX_WAIT_S", 0.5)
    first, second = Hanging(), Hanging()
    _log(CompositeTracker({"jsonl": first, "best": second}), 1)
    first.released.set()
    second.released.set()
    assert waited[0] <= 0.5
    assert waited[1] <= 0.05  # hardly anything was left of the round's time
    assert len(warnings()) == 2


def test_one_that_hangs_for_good_holds_up_neither_a_round_nor_the_end(warnings, monkeypatch):
    monkeypatch.setattr(composite_module, "_MAX_WAIT_S", 0.01)
    monkeypatch.setattr(composite_module, "_MAX_CLOSE_S", 0.01)
    monkeypatch.setattr(composite_module, "_MAX_PENDING_CALLS", 4)
    hanging = Hanging()
    composite = CompositeTracker({"wandb": hanging, "jsonl": Recorder()})
    _log(composite, *range(1, 9))
    assert list(composite.trackers) == ["jsonl"]  # it had no room for three calls in a row
    composite.close()
    hanging.released.set()
    assert [message.split()[1:5] for message in warnings()] == [
        ["a", "round", "takes", "longer"], ["a", "round", "was", "not"], ["disabled", "after", "3", "failures"],
    ]  # fmt: skip


def test_an_operating_systems_errors_are_told_apart_by_their_number(warnings):
    tracker = Recorder(OSError(28, "No space left on device"))
    tracker.is_kept = True
    composite = CompositeTracker({"jsonl": tracker})
    _log(composite, 1, 2)
    tracker.error = OSError(5, "Input/output error")
    _log(composite, 3, 4)
    assert [message.rpartition("] ")[2] for message in warnings()] == ["No space left on device", "Input/output error"]


@pytest.mark.parametrize("error", [SystemExit(3), BaseException("a panic of Rust's")], ids=["exit", "panic"])
def test_what_would_end_a_trackers_thread_ends_nothing(warnings, error):
    _log(CompositeTracker({"wandb": Recorder(error)}), 1)
    (message,) = warnings()
    assert message.startswith(f"wandb: a round was not recorded: RuntimeError: {type(error).__name__}")


def test_ctrl_c_passes(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(BackgroundQueue, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _log(CompositeTracker({"wandb": Recorder()}), 1)


def test_an_unverified_answer_goes_only_to_those_that_take_it():
    rounds = {}

    class Keeper(Recorder):
        def log(self, round):
            rounds[type(self)] = round

    class Taker(Keeper):
        takes_unverified = True

    wrong = make_sample(1, verified=False, generation="wrong", generation_raw="<s>wrong", scores={"exact": 1.0})
    right = make_sample(1, 1, verified=True, generation="right")
    composite = CompositeTracker({"jsonl": Taker(), "console": Keeper()})
    composite.log(make_round([wrong, right], 1))
    composite.close()
    assert list(rounds[Taker].samples) == [wrong, right]
    shown, other = rounds[Keeper].samples
    assert shown.generation == WITHHELD
    assert "wrong" not in str(shown)
    assert shown.scores == {}
    assert other == right


class Taker(Recorder):
    """Takes the page; WandB, say."""

    takes_page = True

    def add_page(self, page):
        self._called(page)


def _close_with_page(trackers, make, *steps):
    composite = CompositeTracker(trackers, PageCopies(Path("here"), make))
    _log(composite, *steps)
    composite.close()


def test_the_page_is_made_once_of_all_rounds_and_goes_to_those_that_take_it(warnings):
    files, made = Recorder(), []
    files.is_kept = True
    trackers = {"wandb": Taker(), "console": Recorder(), "mlflow": Taker(), "jsonl": files}

    def make(directory):
        made.append(directory)
        return f"page of {files.calls}"

    _close_with_page(trackers, make, 1, 2)
    rounds, close = [("log", 1), ("log", 2)], ("close", None)
    page = (f"page of {rounds}", None)
    assert made == [Path("here")]
    assert trackers["wandb"].calls == trackers["mlflow"].calls == [*rounds, page, close]
    assert trackers["console"].calls == files.calls == [*rounds, close]
    assert warnings() == []


def test_no_page_is_made_where_nobody_takes_it(warnings):
    _close_with_page({"jsonl": Recorder()}, pytest.fail, 1)
    assert warnings() == []


def _missing(name, reason):
    return (
        f"{name}: the page of the run is not there: {reason}; "
        "python -m verl_valgen page here --one-file page.html makes it"
    )


def test_a_page_that_cannot_be_made_costs_a_line(warnings):
    def make(directory):
        raise MemoryError("too long a run")

    tracker = Taker()
    _close_with_page({"wandb": tracker}, make, 1)
    assert tracker.calls == [("log", 1), ("close", None)]
    assert warnings() == [_missing("wandb", "MemoryError: too long a run")]


def test_a_tracker_that_refuses_the_page_is_closed_all_the_same(warnings):
    bad, good = Taker(ConnectionError("down"), failing=("page",)), Taker()
    _close_with_page({"wandb": bad, "mlflow": good}, lambda directory: "page", 1)
    assert bad.calls == good.calls == [("log", 1), ("page", None), ("close", None)]
    assert warnings() == [_missing("wandb", "ConnectionError: down")]


class HangingTaker(Hanging):
    takes_page = True


def test_a_page_that_takes_too_long_holds_up_nobody_for_good(warnings, monkeypatch):
    monkeypatch.setattr(page_copies, "_MAX_S", 0.05)
    released = threading.Event()
    tracker = Taker()
    _close_with_page({"wandb": tracker}, lambda directory: released.wait(60), 1)
    released.set()
    assert tracker.calls == [("log", 1), ("close", None)]
    assert warnings() == [_missing("wandb", "it takes too long")]


def test_a_tracker_that_hangs_keeps_the_page_from_no_other(warnings, monkeypatch):
    monkeypatch.setattr(page_copies, "_MAX_PENDING_S", 0.05)
    monkeypatch.setattr(composite_module, "_MAX_WAIT_S", 0.01)
    monkeypatch.setattr(composite_module, "_MAX_CLOSE_S", 0.01)
    hanging, other = HangingTaker(), Taker()
    _close_with_page({"wandb": hanging, "mlflow": other}, lambda directory: "page", 1)
    hanging.released.set()
    assert ("page", None) in other.calls
    assert _missing("wandb", "it takes too long") in warnings()
