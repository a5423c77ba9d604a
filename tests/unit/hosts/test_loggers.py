"""verl's own loggers, whose runs end with the last reference to what made them."""

from __future__ import annotations

import gc
import weakref

from verl.utils.tracking import Tracking

from verl_valgen.hosts.loggers import loggers_remembered


def test_verls_runs_stay_open_until_the_rounds_are_recorded():
    def fit():
        """As verl's: the only reference goes as it returns."""
        tracking = Tracking("project", "experiment", default_backend="console")
        return weakref.ref(tracking)

    loggers = {}
    with loggers_remembered(loggers):
        tracking = fit()
        gc.collect()
        assert tracking() is not None
        assert loggers["console"] is tracking().logger["console"]
    gc.collect()
    assert tracking() is None


def test_verls_class_is_as_it_was():
    before = Tracking.__init__
    with loggers_remembered({}):
        assert Tracking.__init__ is not before
    assert Tracking.__init__ is before
