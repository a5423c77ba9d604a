"""Volcengine's WandB: the same tracker, over another module.

Its package works on that platform alone. What verl calls in it are WandB's own functions, so here its `wandb` is the
real one, and what is read back is a real run: tested is that the tracker finds its way to it.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from destinations import make_round, make_run, make_sample

from verl_valgen.trackers import open_trackers
from verl_valgen.trackers.vemlp_wandb import VemlpWandbTracker


@pytest.fixture
def platform(monkeypatch):
    import wandb

    package = ModuleType("volcengine_ml_platform")
    package.wandb = wandb
    monkeypatch.setitem(sys.modules, "volcengine_ml_platform", package)
    return package


def test_rounds_are_logged_through_the_platforms_module(platform, open_destination):
    destination = open_destination("wandb")
    composite = open_trackers(["vemlp_wandb"], make_run(page=False))
    assert "vemlp_wandb" in composite.trackers
    composite.log(make_round([make_sample(3)], 3, scores={"exact": 0.5}))
    composite.close()
    found = destination.read()[3]
    assert [row["generation"] for row in found.rows] == ["answer 0 at 3"]
    assert (found.values["val/sample_1_generation"], found.values["val/gen/exact"]) == ("answer 0 at 3", 0.5)


def test_a_run_of_wandbs_own_is_not_the_platforms(open_destination):
    open_destination("wandb")
    assert not VemlpWandbTracker.is_live(make_run())


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "volcengine_ml_platform", None)
    assert not VemlpWandbTracker.is_live(make_run())
    with pytest.raises(ImportError, match="package volcengine_ml_platform"):
        VemlpWandbTracker(make_run())


def test_without_a_run_it_says_so(platform):
    assert not VemlpWandbTracker.is_live(make_run())
    with pytest.raises(RuntimeError, match="vemlp_wandb has no live run"):
        VemlpWandbTracker(make_run())
