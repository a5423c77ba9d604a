"""Which of verl's trainers the examples use: `TRAINER`, or else what the installed verl has."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

TRAINERS = ("fsdp_sft_trainer", "sft_trainer", "sft_trainer_ray")


def choose_trainer() -> str:
    """Returns the module's name within `verl.trainer`; the first that verl has. Does not import verl.

    Raises:
        SystemExit: verl is not installed, or `TRAINER` names another one.
    """
    if name := os.environ.get("TRAINER"):
        if name not in TRAINERS:
            raise SystemExit(f"TRAINER must be one of {', '.join(TRAINERS)}, got {name}")
        return name
    verl = find_spec("verl")
    if verl is None or verl.origin is None:
        raise SystemExit("verl is not installed here: run `make install`, or name another Python with PYTHON=...")
    folder = Path(verl.origin).parent / "trainer"
    return next(name for name in TRAINERS if (folder / f"{name}.py").exists())


if __name__ == "__main__":
    print(choose_trainer())
