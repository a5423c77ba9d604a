"""What is peculiar to verl's `file` logger: lines of two threads in one file."""

from __future__ import annotations

import threading

import pytest
from destinations import make_round, make_run
from readback import read_verl_file

from verl_valgen.trackers.composite import CompositeTracker
from verl_valgen.trackers.verl_file import VerlFileTracker


@pytest.fixture
def verl_file(open_destination):
    return open_destination("file")


def test_lines_stand_between_verls_own(verl_file):
    for step in (1, 2):
        verl_file.logger.log(data={"train/loss": 1.0}, step=step)
        verl_file.tracker.log(make_round([], step, scores={"exact": 0.5}))
        verl_file.logger.log(data={"val/loss": 2.0}, step=step)
    for step, values in verl_file.read().items():
        numbers = values.values
        assert (numbers["train/loss"], numbers["val/gen/exact"], numbers["val/loss"]) == (1.0, 0.5, 2.0), step


def test_a_round_is_in_the_file_when_it_is_recorded(verl_file):
    verl_file.logger.log(data={"train/loss": 1.0}, step=1)
    verl_file.tracker.log(make_round([], 1, scores={"exact": 0.5}))
    numbers = read_verl_file(verl_file.path)[1]  # nobody has closed it
    assert (numbers["train/loss"], numbers["val/gen/exact"]) == (1.0, 0.5)


def test_lines_of_two_threads_are_whole(verl_file):
    steps = range(1000)

    def log_as_verl():
        for step in steps:
            verl_file.logger.log(data={"train/loss": 1.0, "padding": "x" * 500}, step=step)

    thread = threading.Thread(target=log_as_verl)
    thread.start()
    for step in steps:
        verl_file.tracker.log(make_round([], step, scores={"exact": 0.5}))
    thread.join()
    rounds = verl_file.read()
    assert [(values.values["train/loss"], values.values["val/gen/exact"]) for values in rounds.values()] == [
        (1.0, 0.5)
    ] * len(steps)


def test_a_round_behind_verls_end_costs_a_warning(verl_file, caplog):
    verl_file.logger.finish()
    CompositeTracker({"file": verl_file.tracker}).log(make_round([], 1))
    (message,) = caplog.messages
    assert message.startswith("file: a round was not recorded: ValueError: ")
    assert "closed file" in message


def test_without_verls_file_there_is_no_tracker():
    assert not VerlFileTracker.is_live(make_run())
    with pytest.raises(RuntimeError, match="no file logger"):
        VerlFileTracker(make_run())
