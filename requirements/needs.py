"""Prints what an installed package asks for, as requirements: `python needs.py PACKAGE [WITHOUT ...]`.

For a package that cannot be installed with all that it asks for. A build of torch that only its own index has
(`torch==2.11.0+cpu`) becomes the release; requirements of extras are left out.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires


def main(package: str, *without: str) -> None:
    for requirement in requires(package) or []:
        name = re.match(r"[\w.-]+", requirement)
        if name is not None and name[0] not in without and "extra ==" not in requirement:
            print(re.sub(r"(==[\d.]+)\+\w+", r"\1", requirement))


if __name__ == "__main__":
    main(*sys.argv[1:])
