"""What is peculiar to SwanLab: charts that pass through a template engine."""

from __future__ import annotations

import pytest
from destinations import make_round, make_run, make_sample

from verl_valgen.trackers.swanlab import SwanlabTracker


@pytest.fixture
def swanlab_run(open_destination):
    return open_destination("swanlab")


def test_template_mark_in_a_text_does_not_break_the_table(swanlab_run):
    mark = "--x_x--0_0--"
    swanlab_run.tracker.log(make_round([make_sample(generation=mark), make_sample(index=1)], 1))
    found = swanlab_run.read()[1]
    assert [row["generation"] for row in found.rows] == ["--x_x-- 0_0--", "answer 1 at 1"]
    assert found.values["val/sample_1_generation"] == mark


def test_close_leaves_the_run_open(swanlab_run):
    swanlab_run.tracker.close()
    assert SwanlabTracker.is_live(make_run())
    swanlab_run.discard()
    assert not SwanlabTracker.is_live(make_run())
    with pytest.raises(RuntimeError, match="no live run"):
        SwanlabTracker(make_run(max_chars=100))
