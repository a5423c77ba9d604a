"""The documentation: every link leads somewhere, pictures are complete, and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PICTURES = sorted((ROOT / "docs").glob("*.svg"))
LINK = re.compile(r"\]\(([^()\s]+)\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    """A page without fenced blocks, and without code spans that look like links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda match: "x" * len(match[0]) if "](" in match[0] else match[0], text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    counts: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#+ +(.*?) *$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        result.add(f"{anchor}-{counts[anchor]}" if anchor in counts else anchor)
        counts[anchor] = counts.get(anchor, 0) + 1
    return result


def test_there_are_pages_and_pictures():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/configuration.md"} <= {name(page) for page in PAGES}
    assert PICTURES


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_and_its_anchor_resolve(page):
    broken = []
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_every_page_of_docs_is_linked_from_another():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in LINK.findall(without_code(page.read_text(encoding="utf-8")))
        if target.partition("#")[0]
    }
    assert [name(page) for page in PAGES if page.parent.name == "docs" and page not in linked] == []
    assert [name(picture) for picture in PICTURES if picture not in linked] == []


def test_the_readme_has_at_most_200_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", [*PAGES, *PICTURES, ROOT / "pyproject.toml", ROOT / "Makefile"], ids=name)
def test_no_host_of_a_package_registry_is_named(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"\w+://\S*(?:pypi|pythonhosted|/simple\b|/whl\b)\S*|--\S*(?:index-url|find-links)\b", text) == []


@pytest.mark.parametrize("picture", PICTURES, ids=name)
def test_pictures_load_nothing_and_are_well_formed(picture):
    from xml.etree import ElementTree

    text = picture.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    addresses = set(re.findall(r"\w+://[^\"'\s)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, not an address that is loaded
    assert not re.search(r"@font-face|@import|<script|<image|url\((?!['\"]?#)", text)


def test_the_table_of_keys_can_be_generated():
    """Its markers stand once, in order, each on a line of its own."""
    lines = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines()
    begin, end = lines.index("<!-- keys: begin -->"), lines.index("<!-- keys: end -->")
    assert begin < end
    assert lines[begin + 1] == "| key | default | variable | meaning |"


def test_the_keys_in_the_readme_are_those_of_the_whole_table():
    """Everyday keys stand in both: with the same default and variable."""

    def rows(page: str) -> dict[str, tuple[str, ...]]:
        text = (ROOT / page).read_text(encoding="utf-8")
        cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| `")]
        return {row[0]: tuple(row[1:3]) for row in cells if re.fullmatch(r"`(generation|trainer)\.\w+`", row[0])}

    everyday, all_keys = rows("README.md"), rows("docs/configuration.md")
    assert len(everyday) == 14
    assert everyday.items() <= all_keys.items()
