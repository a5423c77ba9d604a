"""Samples in the Weights & Biases of Volcengine's machine learning platform, in the run that verl opened.

The platform's package has a `wandb` of its own, which verl calls as it does the other: so does this tracker.
"""

from __future__ import annotations

import sys
from typing import Any

from verl_valgen.trackers.wandb import WandbTracker


class VemlpWandbTracker(WandbTracker):
    """As `WandbTracker`, through `volcengine_ml_platform.wandb`."""

    name = "vemlp_wandb"

    @classmethod
    def _imported(cls) -> Any:
        return getattr(sys.modules.get("volcengine_ml_platform"), "wandb", None)

    @classmethod
    def _import(cls) -> Any:
        try:
            from volcengine_ml_platform import wandb
        except ImportError as error:
            raise ImportError("samples in vemlp_wandb need Volcengine's package volcengine_ml_platform") from error
        return wandb
