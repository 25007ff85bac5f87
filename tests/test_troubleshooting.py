"""docs/troubleshooting.md quotes the messages that the code has, and all of them."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import cupy_attn as ca
from cupy_attn import errors

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
CLASSES = {name for name, value in vars(errors).items() if inspect.isclass(value)}
CLI_CLASSES = {"ClickException", "UsageError"}
VALUE = "…"  # stands for what is filled in


def text_of(node: ast.AST) -> str:
    """Return a string expression with its values left out; strings side by side are one node already."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return VALUE


def trees() -> list[ast.Module]:
    return [ast.parse(file.read_text()) for file in sorted((ROOT / "cupy_attn").rglob("*.py"))]


def literals() -> set[str]:
    """Return every string of the package that is not a docstring."""
    found = set()
    for tree in trees():
        statements = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        found |= {text_of(n) for n in ast.walk(tree)
                  if isinstance(n, ast.Constant | ast.JoinedStr | ast.BinOp) and id(n) not in statements}  # fmt: skip
    return found


def raised() -> set[tuple[str, str]]:
    """Return (class, message) of every error and warning whose words stand where it is raised."""
    found = set()
    for node in (n for tree in trees() for n in ast.walk(tree)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            kind, message = node.exc.func, node.exc.args[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            message, kind = node.args[:2]
        else:
            continue
        name, text = ast.unparse(kind).rpartition(".")[2], text_of(message)
        if name in CLASSES | CLI_CLASSES and re.search("[a-z]", text):
            found.add((name, text))
    return found


def rows() -> list[tuple[str, str]]:
    """Return (message, class) of every row of the page's tables of messages."""
    return re.findall(r"^\| `(.*?)` \| (?:(\w+) )?\| \S.* \|$", PAGE, re.MULTILINE)


def stable(message: str) -> str:
    """Return a pattern of the parts of a quoted message that do not change, in their order."""
    return ".*".join(re.escape(part.strip()) for part in message.split(VALUE) if part.strip())


LITERALS, RAISED, ROWS = literals(), raised(), rows()


def test_the_page_and_the_code_were_read():
    assert len(ROWS) > 150
    assert len(RAISED) > 150
    in_tables = sum(line.startswith("| `") for line in PAGE.splitlines())
    assert in_tables == len(ROWS) + len([name for name in CLASSES if f"| `{name}` |" in PAGE])


@pytest.mark.parametrize(("message", "kind"), ROWS)
def test_a_quoted_message_is_in_the_code(message, kind):
    pattern = re.compile(stable(message), re.DOTALL)
    assert max(len(part.strip()) for part in message.split(VALUE)) >= 9, "quote more of it"
    assert any(pattern.search(text) for text in LITERALS), "the code does not say so any more; mend the page"
    kinds = {name for name, text in RAISED if pattern.search(text)}
    assert not kinds or not kind or kind in kinds, f"it is raised as {kinds}"


def test_reasons_and_findings_quoted_in_the_text_are_in_the_code():
    for words in ("the storage dtype is float32", "not a multiple of 8", "First departure:", "Collapse:", "MISSED"):
        assert words in PAGE
        assert any(words in text for text in LITERALS)


@pytest.mark.parametrize(("kind", "text"), sorted(RAISED))
def test_a_message_of_the_code_is_on_the_page(kind, text):
    wanted = [message for message, name in ROWS if name == kind and re.search(stable(message), text, re.DOTALL)]
    assert wanted, "add a row to docs/troubleshooting.md"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_is_named_and_public(name):
    assert f"`{name}`" in PAGE
    assert name in ca.__all__


def test_words_side_by_side_are_one_message():
    tree = ast.parse('raise E("a is "\n f"{b}; give "\n "one of c.")')
    assert text_of(tree.body[0].exc.args[0]) == "a is …; give one of c."
