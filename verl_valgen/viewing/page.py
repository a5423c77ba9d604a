"""The page of a run as text: the app with its styles, scripts and libraries in one document.

This module owns how the document is put together and what it may load (its Content-Security-Policy); it knows neither
samples nor folders. What the document does is in `app/`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

APP = Path(__file__).parent / "app"

STYLES = ("vendor/uPlot.min.css", "page.css")
SCRIPTS = (
    "vendor/diff.min.js",
    "vendor/uPlot.iife.min.js",
    "dom.js",
    "data.js",
    "loading.js",
    "state.js",
    "diff.js",
    "virtual.js",
    "answer.js",
    "stepper.js",
    "one_prompt.js",
    "one_step.js",
    "chart.js",
    "curves.js",
    "compare.js",
    "keys.js",
    "theme.js",
    "main.js",
)
"""In the order in which they run; the last one starts the app."""


def render(inline: str | None = None) -> str:
    """The document. Its data is loaded from `data/` beside it, or lies in it, where `inline` is given.

    `inline`: base64 of the gzip of the JSON `{"index": ..., "steps": [...]}`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    styles = [_source(name) for name in STYLES]
    scripts = [_source(name) for name in SCRIPTS]
    # Not escaped: the template puts in nothing but files of this package and base64.
    environment = Environment(loader=FileSystemLoader(APP), undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template("index.html.jinja").render(
        styles=styles, scripts=scripts, policy=_policy(styles, scripts, has_data=inline is not None), inline=inline
    )


def _source(name: str) -> str:
    text = (APP / name).read_text(encoding="utf-8")
    assert not re.search("</(script|style)|<!--", text, re.IGNORECASE), f"{name} would end its own element"
    return text


def _policy(styles: Iterable[str], scripts: Iterable[str], *, has_data: bool) -> str:
    """What the document may load: the styles and scripts in it, by their sums, and scripts beside it.

    Those beside it are the data; a document that has its data loads none. Opened from the file system, a document has
    no origin that `'self'` could mean, so `file:` is named; served, it is `'self'` that counts.
    """
    beside = "" if has_data else "'self' file: "
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {beside}{_sums(scripts)}",
            f"style-src {_sums(styles)}",
            "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _sums(sources: Iterable[str]) -> str:
    digests = (hashlib.sha256(source.encode()).digest() for source in sources)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
