"""How many examples the properties of this folder are tried with: few, and the same in every run, unless all are asked
for with `VALGEN_RELIABILITY=full`.

A module takes the profile by its name, as a decorator: loaded here, it would hold for all tests that come after.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "reliability",
    max_examples=5000 if os.environ.get("VALGEN_RELIABILITY") == "full" else 100,
    deadline=None,
    derandomize=True,
    database=None,
    # Fixtures are models and folders, which examples may share. What is slow to make is meant to be large.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
