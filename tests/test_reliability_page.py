"""docs/reliability.md promises nothing that no test shows: each row names tests, and all of them are there."""

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


@cache
def functions_in(file: str) -> set[str]:
    """Return the names of the functions in a file of tests."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_are_there() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    rows = [row for row in rows if not row.startswith(("|---", "| fault |"))]
    assert len(rows) > 30
    for row in rows:
        fault, expected, tests = row.strip("|").split(" | ")
        assert fault
        assert expected
        assert NAMED.sub("", tests).strip(" ,") == "", row
        assert NAMED.search(tests), row


def test_every_test_that_is_named_exists() -> None:
    for file, name in NAMED.findall(PAGE):
        assert name in functions_in(file), f"{file}::{name}"
