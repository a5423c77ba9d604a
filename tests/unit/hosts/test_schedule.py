"""`Schedule` against a transcription of the loop that it foretells."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_valgen.hosts.schedule import Schedule


def steps_of_the_loop(schedule: Schedule) -> list[int]:
    """The conditions of verl's `fit()`, step by step."""
    steps = []
    for step in range(schedule.start_step + 1, schedule.available_steps + 1):
        is_last = step >= schedule.total_training_steps
        if is_last or (schedule.test_freq > 0 and step % schedule.test_freq == 0):
            steps.append(step)
        if is_last:
            break
    return steps


@given(start=st.integers(0, 30), available=st.integers(0, 30), total=st.integers(0, 40), test_freq=st.integers(-1, 12))
def test_validation_steps_are_those_of_the_loop(start, available, total, test_freq):
    schedule = Schedule(start, available, total, test_freq)
    assert schedule.validation_steps() == steps_of_the_loop(schedule)
    assert str(schedule).startswith("at ")


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Schedule(0, 100, 100, 10), "at steps 10, 20, ... and 100"),
        (Schedule(0, 95, 95, 30), "at steps 30, 60, 90 and 95"),
        (Schedule(0, 10, 10, 10), "at step 10 only"),
        (Schedule(0, 40, 40, -1), "at step 40 only, the last one (trainer.test_freq is -1)"),
        (
            Schedule(0, 40, 1000, -1),
            "at no step: trainer.test_freq is -1, and step 1000 (trainer.total_training_steps) lies beyond the data's "
            "40 steps",
        ),
        (Schedule(40, 40, 40, 5), "at no step: step 40, from which the run resumes, is the last one of the data"),
    ],
)
def test_the_schedule_in_words(schedule, text):
    assert str(schedule) == text


@pytest.mark.parametrize(
    ("schedule", "steps", "text"),
    [
        (Schedule(0, 100, 100, 10, every=3), [30, 60, 90, 100], "at steps 30, 60, 90 and 100"),
        (Schedule(40, 100, 95, 10, every=2), [60, 80, 95], "at steps 60, 80 and 95"),
        (Schedule(0, 100, 100, -1, every=5), [100], "at step 100 only, the last one (trainer.test_freq is -1)"),
        (Schedule(0, 40, 40, 10, every=100), [40], "at step 40 only"),
        (Schedule(0, 20, 20, 10, before_train=True), [0, 10, 20], "at steps 0, 10 and 20"),
        (Schedule(10, 20, 20, 10, before_train=True), [10, 20], "at steps 10 and 20"),
        (
            Schedule(0, 40, 1000, -1, before_train=True),
            [0],
            "at step 0 only, before training (trainer.test_freq is -1)",
        ),
        (
            Schedule(20, 20, 20, 10, before_train=True),
            [],
            "at no step: step 20, from which the run resumes, is the last",
        ),
    ],
)
def test_rounds_at_some_validations_and_before_training(schedule, steps, text):
    assert schedule.round_steps() == steps
    assert str(schedule).startswith(text)


def test_steps_that_a_restored_loader_does_not_give_are_told_where_training_ends_without_them():
    reason = (
        "the run resumes at the end of an epoch, and verl's restored data loader gives no batch in the next one, so "
        "that training ends at step {} and not at {}"
    )
    some, none, enough = (Schedule(2, *steps, 1, lost_steps=2) for steps in ((4, 6), (2, 4), (4, 3)))
    assert (str(some), some.shortfall) == ("at steps 3 and 4", reason.format(4, 6))
    assert (str(none), none.shortfall) == (f"at no step: {reason.format(2, 4)}", reason.format(2, 4))
    assert (str(enough), enough.shortfall) == ("at step 3 only", None)
    # The loop begins, and finds nothing.
    assert Schedule(2, 2, 4, 1, before_train=True, lost_steps=2).round_steps() == [2]
