"""The page as text: what it is made of, and what it may load."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from verl_valgen.viewing.page import APP, SCRIPTS, STYLES, render

VENDOR = APP / "vendor"
OWN = sorted(path for path in APP.iterdir() if path.suffix == ".js")


def sums() -> dict[str, str]:
    lines = (VENDOR / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines if not line.startswith("#"))}


def test_libraries_are_what_they_were():
    files = {path.name for path in VENDOR.iterdir()} - {"SHA256SUMS"}
    assert files == set(sums()), "each file has its sum"
    for name, digest in sums().items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name
    assert {"diff.LICENSE", "uPlot.LICENSE"} <= files
    assert "1.6.32" in (VENDOR / "uPlot.iife.min.js").read_text(encoding="utf-8")[:100], "as SHA256SUMS says"


def test_every_file_of_the_app_is_in_the_page():
    assert {path.name for path in OWN} == {name for name in SCRIPTS if "/" not in name}
    assert {path.name for path in APP.glob("*.css")} == {name for name in STYLES if "/" not in name}
    page = render()
    for name in (*SCRIPTS, *STYLES):
        assert (APP / name).read_text(encoding="utf-8").strip() in page, name


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_text_becomes_nothing_but_text(path):
    """What makes markup or code of a string is not used, nor what loads from elsewhere."""
    source = path.read_text(encoding="utf-8")
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|parseFromString|document\.write|setHTML"
    code = r"srcdoc|\beval\b|new Function|\bimport\b|\bfetch\(|XMLHttpRequest|https?://"
    assert re.findall(f"{markup}|{code}", source) == []


def test_the_page_allows_its_own_scripts_and_no_others():
    page = render("QUJD")
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert "unsafe" not in policy
    assert {"default-src 'none'", "connect-src 'none'", "base-uri 'none'"} <= set(policy.split("; "))
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    there = {
        base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for content in re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", page, re.DOTALL)
    }
    assert there == allowed
    bare = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert re.findall(r"<[^<>]*\s(?:on\w+|style)=", bare) == []
    assert '<script id="valgen-data" type="text/plain">QUJD</script>' in page
    assert "<script id=" not in render(), "no data, no place for it"
    assert "script-src 'sha256-" in policy, "a page with its data loads nothing"
    assert "script-src 'self' file: 'sha256-" in render()


def test_the_page_names_no_address():
    """Nothing in it could be loaded from elsewhere; libraries name their homes in comments and namespaces alone."""
    page = re.sub(r"/\*!.*?\*/", "", render(), flags=re.DOTALL)
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", page) == []
