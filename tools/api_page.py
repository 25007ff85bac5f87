"""Write docs/api.md from the docstrings of the public names.

python tools/api_page.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cupy_attn as ca

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
HEAD = """# The API

Made by `python tools/api_page.py` from the docstrings; letters as in [design.md](design.md): B sequences of S new
tokens, T tokens cached, H hidden_size, Hq and Hkv heads, D head_dim.
"""


def signature(function: Any) -> str:
    """Return the parameters of a function as they are written, without self and cls."""
    words, starred = [], False
    for p in inspect.signature(function).parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        starred = starred or p.kind is p.VAR_POSITIONAL
        word = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        annotated = p.annotation is not p.empty
        word += f": {p.annotation}" if annotated else ""
        if p.default is not p.empty:
            word += f"{' = ' if annotated else '='}{default(p.default)}"
        words.append(word)
    return f"({', '.join(words)})"


def default(value: Any) -> str:
    """Return a default value as it is written; what dataclasses make anew is not one."""
    if inspect.ismodule(value):
        return value.__name__
    return "..." if "factory" in repr(value) else repr(value)


def markdown(docstring: str) -> str:
    """Return a numpydoc docstring as Markdown: sections in bold, their entries as lists."""
    text = re.sub(r"``(.+?)``", r"`\1`", inspect.cleandoc(docstring))
    text = re.sub(r":(?:func|class|meth):`\.?(.+?)`", r"`\1`", text)
    lines: list[str] = []
    source, section, fenced = text.split("\n"), False, False
    for i, line in enumerate(source):
        if re.fullmatch(r"-{3,}", line):
            continue  # under a section's name
        if i + 1 < len(source) and re.fullmatch(r"-{3,}", source[i + 1]):
            lines += ["```", ""] * fenced + [f"**{line}**", ""] + ["```pycon"] * (line == "Examples")
            fenced = line == "Examples"
            section = line in ("Parameters", "Returns", "Raises", "Warns", "Attributes", "Yields")
        elif section and line and not line.startswith(" "):
            lines.append(f"- {line}")
        else:
            lines.append(line)
    return "\n".join(lines + ["```"] * fenced)


def members(kind: type) -> Iterator[tuple[str, str, str]]:
    """Yield name, signature and docstring of the public methods and properties that a class documents itself."""
    for name, member in vars(kind).items():
        function = getattr(member, "__func__", getattr(member, "func", getattr(member, "fget", member)))
        documented = getattr(function, "__doc__", None)
        if (name.startswith("_") and name != "__call__") or not documented or not inspect.isfunction(function):
            continue
        written = "" if function is not member and not hasattr(member, "__func__") else signature(function)
        yield name, written, documented


def page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for name in sorted(ca.__all__, key=str.lower):
        thing = getattr(ca, name)
        if not callable(thing):
            continue
        written = "" if inspect.isclass(thing) and issubclass(thing, Exception) else signature(thing)
        parts.append(f"## {name}\n\n```python\n{name}{written}\n```\n\n{markdown(thing.__doc__ or '')}\n")
        if written and inspect.isclass(thing):
            for member, arguments, documented in members(thing):
                called = member == "__call__"
                block = f"```python\n{name.lower() if called else member}{arguments}\n```\n\n" if arguments else ""
                title = f"Calling an {name}" if called else f"{name}.{member}"
                parts.append(f"### {title}\n\n{block}{markdown(documented)}\n")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
