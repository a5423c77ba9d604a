"""How scores and ends of answers are said to people, on the console and by `show`."""

from __future__ import annotations

ENDINGS = {"length": "cut off", "stop": "ended by a stop string", "time": "out of time"}
"""Why an answer ended, by its finish reason; what ended by itself has nothing to say."""


def number(value: float) -> str:
    """Three digits, and all of those before the point up to a million."""
    # From 999.5 on, three digits would be 1e+03.
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"
