"""How much of this folder is tried: a part, the same in every run, or all of it with `VALGEN_RELIABILITY=full`.

What takes whole runs of the trainer is `slow`; of generated input `make test` has a few examples.

What is measured goes to the file that `VALGEN_RELIABILITY_FIGURES` names, as JSON lines.
"""

from __future__ import annotations

import json
import os

from end_to_end.trainer import VERL_VERSION
from hypothesis import HealthCheck, settings

IS_WHOLE = os.environ.get("VALGEN_RELIABILITY") == "full"

# A module takes the profile by its name, as a decorator: loaded here, it would hold for all tests that come after.
settings.register_profile(
    "reliability",
    max_examples=5000 if IS_WHOLE else 20,
    deadline=None,
    derandomize=True,
    database=None,
    # Fixtures are models and folders, which examples may share. What is slow to make is meant to be large.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def record_figure(of: str, **figures: float) -> None:
    """Adds a line to the file of figures, if there is to be one."""
    if path := os.environ.get("VALGEN_RELIABILITY_FIGURES"):
        line = {"of": of, "verl": str(VERL_VERSION), **{name: round(value, 3) for name, value in figures.items()}}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
