"""The Python blocks of docs/getting-started.md run, in order, in a folder of their own."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from cupy_attn import demo

PAGE = Path(__file__).resolve().parent.parent / "docs" / "getting-started.md"
# What stands behind ```python, and the sentence above such a block.
NEEDS = {"gpu": "*Needs a GPU:*", "torch": "*Needs PyTorch:*", "jax": "*Needs JAX:*"}


def has(module: str) -> bool:
    """Return whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def blocks() -> list[tuple[int, str, str]]:
    """Return (first line, what it needs, code) of every Python block."""
    text = PAGE.read_text()
    found = re.finditer(r"^```python([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(2)) + 1, m[1].strip(), m[2]) for m in found]


@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_every_python_block_of_the_guide_runs(tmp_path, monkeypatch, gpu):
    (tmp_path / "demo").mkdir()
    demo.write_checkpoint(tmp_path / "demo", lambda phrase: None)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    ran = 0
    for line, needs, code in blocks():
        here = {"": True, "gpu": gpu, "torch": has("torch"), "jax": has("jax")}
        if here[needs]:
            exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), names)  # errors name the page's own lines
            ran += not needs
    assert ran >= 6


@pytest.mark.parametrize("needs", NEEDS)
def test_blocks_that_need_more_than_a_cpu_say_so(needs):
    text, sentence = PAGE.read_text(), NEEDS[needs]
    marked = len(re.findall(rf"^{re.escape(sentence)}\n\n```python {needs}$", text, re.MULTILINE))
    assert marked == text.count(f"```python {needs}\n") == text.count(sentence) > 0


def test_every_block_is_of_a_kind_that_is_run():
    assert {needs for _, needs, _ in blocks()} == {"", *NEEDS}
