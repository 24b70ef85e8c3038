"""Data that every Python brings along: the standard library's docstrings, labelled by chapter of its manual."""

import ast
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from fedpeft.data.rows import Dataset, Rows, stratified
from fedpeft.seeds import derive
from fedpeft.types import BadInput

SHORTEST = 30
"""Docstrings of fewer characters are left out: they say too little to be told apart."""


def pydocs(seed: int = 0) -> Dataset:
    """Return the docstrings of the running Python's standard library, about 70 : 10 : 20 by label.

    A row's text is a cleaned docstring of a module, class or function, its label the chapter of the Library Reference
    that documents the module (``chapters.toml``), its key the top-level module. No text occurs twice. The splits depend
    on ``seed`` and the set of texts alone; the texts differ a little between versions of Python, and ``digest`` tells.
    Raises BadInput where the standard library is installed without its source files.
    """
    rows = _collect(Path(sysconfig.get_path("stdlib")))
    mixed = rows.take(sorted(range(len(rows)), key=lambda row: derive(seed, "pydocs", rows.texts[row])))
    rest, test = stratified(mixed, 0.2, derive(seed, "pydocs", "test"))
    train, validation = stratified(rest, 0.125, derive(seed, "pydocs", "validation"))
    return Dataset("pydocs", train, validation, test)


def _collect(library: Path) -> Rows:
    """Return every different docstring once, under the first module (in alphabetical order) that has it.

    The code is parsed, never run.
    """
    found: dict[str, tuple[str, str]] = {}
    for module, chapter in sorted(_chapters().items()):
        for source in _sources(library, module):
            for text in _docstrings(ast.parse(source.read_bytes())):
                found.setdefault(text, (chapter, module))
    if not found:
        raise BadInput(f"data.source = 'pydocs': {library} holds no Python source; give files of your own instead")
    labels, keys = zip(*found.values(), strict=True)
    return Rows(tuple(found), labels, keys)


def _chapters() -> dict[str, str]:
    """Return top-level module -> chapter."""
    text = resources.files("fedpeft.data").joinpath("chapters.toml").read_text(encoding="utf-8")
    return {module: chapter for chapter, modules in tomllib.loads(text).items() for module in modules}


def _sources(library: Path, module: str) -> Iterator[Path]:
    """Yield the source files of a top-level module or package, without its tests, in a fixed order."""
    for path in sorted([library / f"{module}.py", *(library / module).rglob("*.py")]):
        if path.is_file() and {"test", "tests"}.isdisjoint(path.relative_to(library).parts):
            yield path


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings inside ``node`` that are long enough, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = (ast.get_docstring(node) or "").strip()
        if len(text) >= SHORTEST:
            yield text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # most nodes are expressions, and they define nothing
            yield from _docstrings(child)
