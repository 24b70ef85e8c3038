"""The examples in docstrings are true, and everything that methods written outside may import has one."""

import ast
import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import fedpeft
from fedpeft import method_kit

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = [
    found.name
    for found in pkgutil.walk_packages(fedpeft.__path__, "fedpeft.")
    if not found.name.startswith("fedpeft.engines.")  # Flower need not be installed
]
NO_EXAMPLE = {"Split", "Targets", "Weighting", "Payload", "NO_MEMORY"}
"""Names of types and numbers, and protocols and errors, which are shown where they are used."""


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=OPTIONS).failed == 0


def test_there_are_many_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    shown = 0
    for name in MODULES:
        shown += sum(bool(test.examples) for test in finder.find(importlib.import_module(name)))
    assert shown >= 40


@pytest.mark.parametrize("name", sorted(set(method_kit.__all__) - NO_EXAMPLE))
def test_what_methods_may_import_is_shown_by_example(name: str) -> None:
    exported = getattr(method_kit, name)
    doc = inspect.getdoc(exported) or ""
    is_protocol = getattr(exported, "_is_protocol", False)
    is_error = isinstance(exported, type) and issubclass(exported, Exception)
    assert doc
    assert ">>>" in doc or is_protocol or is_error


def test_the_example_of_a_method_imports_the_kit_alone() -> None:
    source = Path(__file__).parents[1] / "examples" / "head_only.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {module for module in imported if module and module.startswith("fedpeft")}
    assert ours == {"fedpeft.method_kit"}
