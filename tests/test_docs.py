"""Pages made from the sources are those that the sources make."""

from __future__ import annotations

from pathlib import Path

import cupy_attn as ca

ROOT = Path(__file__).resolve().parent.parent


def test_the_api_page_is_that_of_the_docstrings(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import api_page

    assert api_page.PAGE.read_text() == api_page.page(), "run python tools/api_page.py and commit docs/api.md."
    assert all(f"\n## {name}\n" in api_page.page() for name in ca.__all__)
