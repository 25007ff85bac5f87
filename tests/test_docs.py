"""Pages made from the sources are those that the sources make; links lead somewhere; figures come from the reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cupy_attn as ca

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LEARN = ("getting-started.md", "troubleshooting.md", "performance.md", "extending.md")


def test_the_api_page_is_that_of_the_docstrings(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import api_page

    assert api_page.PAGE.read_text() == api_page.page(), "run python tools/api_page.py and commit docs/api.md."
    assert all(f"\n## {name}\n" in api_page.page() for name in ca.__all__)


def anchors(page: Path) -> set[str]:
    """Return the fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, fragment = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not fragment or fragment in anchors(there), target


def test_the_readme_names_every_page_to_learn_from():
    assert all(f"(docs/{name})" in PAGES[0].read_text() for name in LEARN)


def test_figures_of_the_performance_page_are_those_of_the_reports():
    page = (ROOT / "docs" / "performance.md").read_text()
    sources = "".join(file.read_text() for file in [PAGES[0], *(ROOT / "docs" / "results").glob("*.md")])
    decimals, percentages = re.findall(r"\d+\.\d+", page), re.findall(r"(\d+) %", page)
    known = set(re.findall(r"\d+(?:\.\d+)?", sources))
    assert len(decimals) > 30
    assert sorted({*decimals, *percentages} - known) == []
    rows = {
        re.sub(r"[ ,]+", " ", row)
        for row in re.findall(r"^\| (\d.*?B, \d+, \d+ \| [\d.]+)[,| ]", sources, re.MULTILINE)
    }
    for row in re.findall(r"^\| (\d.*?B, \d+, \d+ \| [\d.]+) ", page, re.MULTILINE):
        assert re.sub(r"[ ,]+", " ", row) in rows, "the case has another figure in the report"


def test_what_the_page_on_extending_names_exists():
    files = [
        f for folder in ("cupy_attn", "kernels_cu", "tests", "tools") for f in (ROOT / folder).iterdir() if f.is_file()
    ]
    names, text = {f.name for f in files}, "".join(f.read_text() for f in files if f.name != "test_docs.py")
    page = re.sub(r"^```.*?^```$", "", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", page)
    assert len(spans) > 80
    for span in spans:
        for word in re.findall(r"[\w./]*\w", span.replace("\n", " ")):
            if re.fullmatch(r"\w+\.(py|cuh?)", word):
                assert word in names, span
            elif re.fullmatch(r"[A-Za-z_]\w*", word):
                assert re.search(rf"\b{word}\b", text), span
