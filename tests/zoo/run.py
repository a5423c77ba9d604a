"""Examines the whole zoo, or the names that it is given, and writes what comes out: `run.py OUTPUT [NAME ...]`."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[level]) for level in (1, 2)]
sys.path.remove(str(Path(__file__).parent))

from zoo.forks import Zookeeper  # noqa: E402

PASSES = ("right", "falls back", "upstream")
"""Outcomes that need no mention, or got one."""


def main(output: Path, names: list[str], workers: int) -> None:
    if not names:
        from zoo import configurations

        names = configurations.names()
    versions = {package: version(package) for package in ("transformers", "torch", "verl")}
    results: dict[str, Any] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    keepers: SimpleQueue[Zookeeper] = SimpleQueue()
    for _ in range(workers):
        keepers.put(Zookeeper())

    def examine(name: str) -> tuple[str, dict[str, Any]]:
        keeper = keepers.get()
        try:
            return name, keeper.examine(name)
        finally:
            keepers.put(keeper)

    with ThreadPoolExecutor(workers) as pool:
        for name, result in pool.map(examine, names):
            results[name] = result
            print(f"{name}: {summary(result)}", flush=True)
            output.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")
    for _ in range(workers):
        keepers.get().close()


def summary(result: dict[str, Any]) -> str:
    """What is not right of an animal, in a line."""
    if "not built" in result:
        return f"not built: {result['not built']}"
    faults = [f"its own {what}: {fault}" for what, fault in result["upstream"].items()]
    faults += [
        f"{check} {outcome}: {detail}" for check, (outcome, detail) in result["cells"].items() if outcome not in PASSES
    ]
    return "; ".join(faults) or "right"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], int(os.environ.get("WORKERS") or 0) or 2)
