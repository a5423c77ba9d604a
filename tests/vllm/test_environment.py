"""The environment that `make test-vllm` makes has all that vLLM asks for, but for what the Makefile leaves out."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_else_is_missing():
    unfit = re.search(r"^UNFIT = (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (name,) = packages_distributions()["vllm"]
    lacking = []
    for requirement in map(Requirement, requires(name)):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            lacking.append(requirement.name)
            continue
        if requirement.name != "torch":  # its build is another
            assert requirement.specifier.contains(found, prereleases=True), f"{requirement}: {found}"
    assert sorted(lacking) == sorted(unfit[1].split())
