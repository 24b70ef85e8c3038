"""Rows from the source of the running Python's standard library, by chapter of its manual."""

import ast
import json
import os
import sys
import sysconfig
import tokenize
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from typing import final

from fedpeft.cache import cache_folder, keep
from fedpeft.data.rows import Dataset, Rows, stratified
from fedpeft.errors import BadInput
from fedpeft.seeds import derive


@final
@dataclass(frozen=True)
class Collection:
    """What is taken from the sources.

    ``name``: as ``data.source`` names it. ``columns``: the roles of a row's columns. ``extract``:
    the source of a module -> the values of its rows, one for each column, in source order.
    ``code``: the file in which ``extract`` is written.
    """

    name: str
    columns: tuple[str, ...]
    extract: Callable[[str], Iterator[tuple[str, ...]]]
    code: Path

    def dataset(self, seed: int) -> Dataset:
        """Return all rows, about 70 : 10 : 20 by label.

        The splits depend only on ``seed`` and the set of rows. Raises BadInput where the standard
        library is installed without its source files.
        """
        rows = self._collect(Path(sysconfig.get_path("stdlib")))
        # Each row draws its own place, so a row more or less leaves the order of the others alone.
        order = sorted(range(len(rows)), key=lambda row: derive(seed, self.name, rows.name_of(row)))
        mixed = rows.take(order)
        not_test, test = stratified(mixed, 0.2, derive(seed, self.name, "test"))
        # An eighth of the 80 % that are left is 10 % of all.
        train, validation = stratified(not_test, 0.125, derive(seed, self.name, "validation"))
        return Dataset(self.name, train, validation, test)

    def _collect(self, library: Path) -> Rows:
        """Return every row whose first value is new, under the first module, by name, that has it.

        The code is parsed, never run. The result is cached in the user's cache folder until a
        source file changes.
        """
        sources: list[tuple[str, str, str]] = []  # (file, chapter, module)
        for module, chapter in _chapters():
            for source in _sources(library, module):
                sources.append((str(source), chapter, module))
        if not sources:
            raise BadInput(
                f"data.source = {self.name!r}: {library} holds no Python source; "
                "give files of your own instead"
            )
        # 1. Take what an earlier run has cached. A damaged file is as good as none.
        cached = cache_folder() / f"{self.name}-{self._stamp(sources)}.json"
        with suppress(OSError, ValueError, TypeError):
            return self._rows(json.loads(cached.read_bytes()))
        # 2. Parse the sources, the slow part.
        found: dict[str, tuple[str, ...]] = {}  # first value -> all values, chapter, module
        for path, chapter, module in sources:
            for values in self.extract(_text(Path(path))):
                found.setdefault(values[0], (*values, chapter, module))
        # 3. Cache the result where that is possible.
        columns = list(zip(*found.values(), strict=True))
        keep(cached, json.dumps(columns).encode())
        return self._rows(columns)

    def _rows(self, columns: Sequence[Sequence[str]]) -> Rows:
        """Return rows of their columns, labels and keys; ValueError where these are not whole."""
        *values, labels, keys = columns
        lengths = {len(column) for column in columns}
        if len(values) != len(self.columns) or len(lengths) != 1 or 0 in lengths:
            raise ValueError("the columns are not equally long")
        by_role: dict[str, tuple[str, ...]] = {}
        for role, column in zip(self.columns, values, strict=True):
            by_role[role] = tuple(column)
        return Rows(by_role, tuple(labels), tuple(keys))

    def _stamp(self, sources: Sequence[tuple[str, str, str]]) -> str:
        """Return a digest of the sources, this version of Python and the code that collects.

        Of the sources, sizes and modification times stand for the content.
        """
        stats: list[tuple[int, int]] = []
        for source, _, _ in sources:
            stat = os.stat(source)
            stats.append((stat.st_size, stat.st_mtime_ns))
        about = repr((sys.version, sources, stats)).encode()
        # With the code in it, a change of what is collected makes old caches useless.
        code = Path(__file__).read_bytes() + self.code.read_bytes()
        return blake2b(about + code, digest_size=16).hexdigest()


def documented(
    node: ast.AST,
) -> Iterator[tuple[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Yield what inside ``node`` has a docstring, with its cleaned text, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = (ast.get_docstring(node) or "").strip()
        if text:
            yield node, text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # most nodes are expressions, and they define nothing
            yield from documented(child)


def _text(path: Path) -> str:
    """Return the text of a source file, decoded by the encoding that it declares."""
    with tokenize.open(path) as file:
        return file.read()


def _chapters() -> list[tuple[str, str]]:
    """Return every top-level module with its chapter, in alphabetical order."""
    text = resources.files("fedpeft.data").joinpath("chapters.toml").read_text(encoding="utf-8")
    chapters: list[tuple[str, str]] = []
    for chapter, modules in tomllib.loads(text).items():
        for module in modules:
            chapters.append((module, chapter))
    return sorted(chapters)


def _sources(library: Path, module: str) -> Iterator[Path]:
    """Yield the source files of a top-level module or package, sorted, without its tests."""
    for path in sorted([library / f"{module}.py", *(library / module).rglob("*.py")]):
        if path.is_file() and {"test", "tests"}.isdisjoint(path.relative_to(library).parts):
            yield path
