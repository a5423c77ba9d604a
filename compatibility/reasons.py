"""Why a run failed, in one line, from what it wrote."""

from __future__ import annotations

import re

MAX_CHARS = 200


def last_exception(stderr: str) -> str | None:
    """The line that names the exception which ended a program, and not one that it brought about elsewhere."""
    exceptions = re.findall(r"^(?:\[rank\d+\]: ?)?([\w.]+(?:Error|Exception|Exit)\b.*)$", stderr, re.MULTILINE)
    consequences = r"ChildFailedError|Connection (closed|reset) by peer|Connection refused"
    causes = [line for line in exceptions if not re.search(consequences, line)]
    return (causes or exceptions or [None])[-1]


def last_warning(output: str) -> str | None:
    """What verl-valgen warned of last."""
    return (re.findall(r"\[verl_valgen[\w.]*\]\[WARNING\] - (.*)$", output, re.MULTILINE) or [None])[-1]


def pip_error(stderr: str) -> str | None:
    """What pip gave up over."""
    return (re.findall(r"^ERROR: (.*)$", stderr, re.MULTILINE) or [None])[-1]


def tidy(reason: str, root: str) -> str:
    """One short line, fit for a code span, that says nothing of this machine: no addresses, `root` as a dot."""
    reason = re.sub(r"\w+://\S+", "...", reason).replace(root, ".").replace("`", "'")
    reason = " ".join(reason.split())
    return reason if len(reason) <= MAX_CHARS else f"{reason[: MAX_CHARS - 3]}..."
