"""Examines the whole zoo, or the names that it is given, and writes what comes out: `run.py OUTPUT [NAME ...]`."""

from __future__ import annotations

import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[level]) for level in (1, 2)]
sys.path.remove(str(Path(__file__).parent))

from zoo.forks import Zookeeper  # noqa: E402


def main(output: Path, names: list[str], workers: int) -> None:
    if not names:
        from zoo import configurations

        names = configurations.names()
    keepers: SimpleQueue[Zookeeper] = SimpleQueue()
    for _ in range(workers):
        keepers.put(Zookeeper())

    def examine(name: str) -> dict[str, Any]:
        keeper = keepers.get()
        try:
            result = keeper.examine(name)
        finally:
            keepers.put(keeper)
        cells = result.get("cells", {})
        print(name, result.get("not built") or " ".join(f"{check}={cells[check][0]}" for check in cells), flush=True)
        return result

    with ThreadPoolExecutor(workers) as pool:
        results = dict(zip(names, pool.map(examine, names), strict=True))
    for _ in range(workers):
        keepers.get().close()
    versions = {package: version(package) for package in ("transformers", "torch", "verl")}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        json.dumps({"versions": versions | {"python": platform.python_version()}, "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], int(os.environ.get("WORKERS") or 0) or 2)
