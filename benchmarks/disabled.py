"""What the package costs where generation is off: verl's command up to its task function, with and without it.

    python benchmarks/disabled.py

`--cfg job` composes the configuration, plugins and all, prints it and ends. The two are run in turns.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
REPETITIONS = 7
MODULE = next(
    name
    for name in ("verl.trainer.fsdp_sft_trainer", "verl.trainer.sft_trainer")
    if importlib.util.find_spec(name) is not None
)
PROGRAM = """
import runpy, sys
root, module, hidden = sys.argv[1:4]
if hidden == "without":
    sys.path = [path for path in sys.path if path != root]  # where an editable install is found
sys.argv = [module, "--cfg", "job"]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    print("loaded:", sorted(name for name in sys.modules if name.startswith("verl_valgen")))
"""


def main() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    times: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(REPETITIONS):
        for how, values in times.items():
            start = time.perf_counter()
            command = [sys.executable, "-c", PROGRAM, ROOT, MODULE, how]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd="/")
            values.append(time.perf_counter() - start)
            loaded = result.stdout.rpartition("loaded:")[2].strip()
            assert (loaded == "[]") == (how == "without"), loaded
    medians = {how: statistics.median(values) for how, values in times.items()}
    difference = statistics.median(a - b for a, b in zip(times["with"], times["without"], strict=True))
    print(f"{MODULE}: with {medians['with']:.2f} s, without {medians['without']:.2f} s (medians of {REPETITIONS}),")
    print(f"median of the differences {difference:.3f} s")


if __name__ == "__main__":
    main()
