"""What the commands share: arguments that mean the same everywhere, and how they print."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .layer import DEVICES

PATH = click.Path(path_type=Path)
MODEL = click.argument("model", type=PATH)
KEY = click.option("--key", help="Name of the activations in a file with several arrays.")
DEVICE = click.option(
    "--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="auto: the GPU if one is usable."
)
PLOT = click.option("--plot", type=PATH, help="Draw it as a PNG (needs the plot extra).")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def echo_json(value: Any) -> None:
    """Print one JSON object; NaN and Inf, which JSON does not have, as null."""

    def finite(v: Any) -> Any:
        if isinstance(v, dict):
            return {key: finite(item) for key, item in v.items()}
        if isinstance(v, list | tuple):
            return [finite(item) for item in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    click.echo(json.dumps(finite(value), allow_nan=False))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns under a header: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, ["-" * w for w in widths], *rows):
        cells = [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def verdict(passed: bool) -> str:
    """Return what a check says."""
    return "ok" if passed else "MISSED"


def layer_ranges(option: str) -> list[tuple[int, int]] | None:
    """Read the option --layers: "0,5-7" as [(0, 0), (5, 7)] and "all" as None."""
    if option == "all":
        return None
    found = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part) for part in option.split(",")]
    ranges = [(int(m[1]), int(m[2] or m[1])) for m in found if m]
    if len(ranges) < len(found) or any(first > last for first, last in ranges):
        raise click.UsageError(f"--layers {option}: give 'all', or layers and ranges of them such as 0,5-7.")
    return ranges
