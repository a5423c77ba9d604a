"""Writes docs/models.md from the results of `run.py`: `python page.py RESULTS [RESULTS]`, newer transformers last.

`python page.py --known RESULTS` prints the entries of known.py that the results need.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1])]

from zoo.known import COMMON, KINDS  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- results: `make zoo` writes them -->", "<!-- end of results -->"

COLUMNS = {
    "copy": ("copy", "bfloat16"), "hf": ("hf", "batch"), "fast": ("fast", "fused", "sampling"),
    "verified": ("verified",),
}  # fmt: skip
"""Column -> the checks whose worst outcome it shows."""

OUTCOMES = {"right": "yes", "falls back": "no", "upstream": "upstream", "wrong": "**wrong**", "raises": "**raises**"}
"""Outcome -> what the table says, the worst last."""

Results = dict[str, Any]


def main(arguments: list[str]) -> None:
    if arguments[0] == "--known":
        for path in arguments[1:]:
            print_known(json.loads(Path(path).read_text()))
        return
    runs = [json.loads(Path(path).read_text()) for path in arguments]
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    PAGE.write_text("\n".join([head + BEGIN, *page(runs), END]) + tail)


def page(runs: list[Results]) -> list[str]:
    versions = [run["versions"] for run in runs]
    said = "; ".join(", ".join(f"{package} {number}" for package, number in one.items()) for one in versions)
    lines = [f"Measured with: {said}.", "", count(runs), ""]
    lines += [f"| architecture | {' | '.join(f'`{c}`' if c in ('hf', 'fast') else c for c in COLUMNS)} |"]
    lines += ["|" + "---|" * (len(COLUMNS) + 1)]
    for name in sorted({name for run in runs for name in run["results"]}):
        cells = [joined([cell(run, name, checks) for run in runs], runs) for checks in COLUMNS.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "### Why", ""]
    for run in runs:
        lines += [f"**transformers {run['versions']['transformers']}**", ""]
        lines += [f"- `{name}`: {why}" for name, result in run["results"].items() if (why := reasons(result))] + [""]
    return lines


def count(runs: list[Results]) -> str:
    """How many architectures there are, and how many are right in every column."""
    parts = []
    for run in runs:
        built = {name: result for name, result in run["results"].items() if "cells" in result}
        architectures = [name for name in run["results"] if ":" not in name]
        right = [
            n for n, result in built.items() if all(c[0] in ("right", "falls back") for c in result["cells"].values())
        ]
        parts.append(
            f"transformers {run['versions']['transformers']}: {len(architectures)} architectures, of which "
            f"{sum(':' not in name for name in built)} were built, and {len(built) - sum(':' not in n for n in built)} "
            f"variants; {len(right)} of these {len(built)} are right throughout"
        )
    return "; ".join(parts) + "."


def cell(run: Results, name: str, checks: tuple[str, ...]) -> str:
    """What the table says of some checks with one release of transformers; empty where the architecture is missing."""
    result = run["results"].get(name)
    if result is None:
        return ""
    if "not built" in result:
        return "not built"
    worst, detail = max((result["cells"][check] for check in checks), key=lambda cell: list(OUTCOMES).index(cell[0]))
    if checks == ("verified",):
        return {"right": "yes", "upstream": "upstream"}.get(worst, "**no**")
    return f"no: {fall_back(detail)}" if worst == "falls back" else OUTCOMES[worst]


def fall_back(reason: str) -> str:
    """Why `fast` leaves a model to `hf`, in words that are not those of one class."""
    if re.match(r"\w+(Error|Exception): ", reason):
        return "its forward pass takes no such step"
    if reason.startswith("its logits differ"):
        return "other logits with our cache"
    first, _, rest = reason.partition(" has no steps")
    return f"no steps{rest}" if rest and " " not in first else reason


def joined(cells: list[str], runs: list[Results]) -> str:
    """One cell of all releases; they are named where they differ."""
    said = {cell for cell in cells if cell}
    if len(said) == 1:
        return said.pop()
    names = [".".join(run["versions"]["transformers"].split(".")[:2]) for run in runs]
    return "; ".join(f"{name}: {cell}" for name, cell in zip(names, cells, strict=True) if cell)


def reasons(result: Results) -> str:
    """Details of what is not right."""
    if "not built" in result:
        return f"not built: {plain(result['not built'])}"
    parts = [f"its own {what}: {plain(fault)}" for what, fault in result["upstream"].items()]
    own: dict[str, list[str]] = {}
    for check, (outcome, detail) in result["cells"].items():
        if outcome in ("wrong", "raises"):
            own.setdefault(plain(detail), []).append(f"**{check}**")
    return "; ".join([*parts, *(f"{', '.join(checks)}: {detail}" for detail, checks in own.items())])


def plain(text: str) -> str:
    """A message of anybody's, fit for a table: no markup but code spans."""
    return text.replace("|", "/").replace("<", "(").replace(">", ")").replace("*", "")


def not_right(result: Results) -> dict[str, str]:
    """What is not right of an animal, in the terms of `known.Known`: what -> why."""
    if "not built" in result:
        return {"not built": result["not built"]}
    found = dict(result["upstream"])
    found |= {check: detail for check, (outcome, detail) in result["cells"].items() if outcome in ("wrong", "raises")}
    outcome, detail = result["cells"]["fast"]
    return found | ({"falls back": detail} if outcome == "falls back" else {})


def print_known(run: Results) -> None:
    version = ".".join(run["versions"]["transformers"].split(".")[:2])
    for name in (*COMMON, *KINDS):
        for what, why in not_right(run["results"].get(name, {"not built": "not in this release"})).items():
            print(f"    Known({name!r}, {what!r}, {version!r}, {why!r}),")


if __name__ == "__main__":
    main(sys.argv[1:])
