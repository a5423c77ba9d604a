"""By which a resumed run knows that it asks other prompts."""

from __future__ import annotations

from dataclasses import replace

from verl_valgen.records import Prompt, RowData
from verl_valgen.rounds.fingerprint import fingerprint

ONE = Prompt(3, [1, 2], "a", "b", RowData(ground_truth={"x": 1}))
TWO = Prompt(4, [1, 3], "a", "b")


def test_order_and_rows_do_not_matter():
    assert fingerprint([ONE, TWO]) == fingerprint([TWO, replace(ONE, row=9, stream=9)])


def test_what_is_asked_and_expected_matters():
    others = [
        *([ONE], [ONE, ONE], [TWO], [], [replace(ONE, input_ids=[1, 2, 3])], [replace(ONE, reference=None)]),
        [replace(ONE, data=RowData(ground_truth={"x": 2}))],
    ]
    assert len({fingerprint(prompts) for prompts in others}) == len(others)
