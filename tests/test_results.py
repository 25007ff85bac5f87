"""The committed GPU report is of the sources that are committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cupy_attn import kernels

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_the_report_is_clean_and_measured_these_sources(file):
    report = json.loads(file.read_text())
    assert report["digest"] == kernels.source_digest(), (
        f"{file.name} was measured on other sources; run tools/gpu_report.py on a GPU and commit what it writes."
    )
    assert report["tests"]["failures"] == report["tests"]["errors"] == 0
    assert report["tests"]["passed"] > 0
    assert report["doctor"]["ok"]
    assert all(verdict.startswith(("0 errors", "0 hazards")) for verdict in report["sanitizer"].values())


def test_there_is_a_report():
    assert list(RESULTS.glob("*.json"))
