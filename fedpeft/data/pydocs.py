"""A data set inside every Python: the standard library's docstrings, labelled by manual chapter."""

import ast
import json
import os
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from importlib import resources
from pathlib import Path

from fedpeft.data.rows import Dataset, Rows, stratified
from fedpeft.data.user_cache import cache_folder
from fedpeft.errors import BadInput
from fedpeft.seeds import derive

SHORTEST = 30
"""Docstrings of fewer characters are left out: they say too little to tell their chapter."""


def pydocs(seed: int = 0) -> Dataset:
    """Return the docstrings of the running Python's standard library, about 70 : 10 : 20 by label.

    A row's text is a cleaned docstring of a module, class or function. Its label is the chapter of
    the Library Reference that documents the module (``chapters.toml``), its key the top-level
    module. No text occurs twice. The splits depend only on ``seed`` and the set of texts. The texts
    differ a little between versions of Python; ``digest`` shows that. Raises BadInput where the
    standard library is installed without its source files.
    """
    rows = _collect(Path(sysconfig.get_path("stdlib")))
    # Each text draws its own place, so a text more or less leaves the order of the others alone.
    order = sorted(range(len(rows)), key=lambda row: derive(seed, "pydocs", rows.texts[row]))
    mixed = rows.take(order)
    not_test, test = stratified(mixed, 0.2, derive(seed, "pydocs", "test"))
    # An eighth of the 80 % that are left is 10 % of all.
    train, validation = stratified(not_test, 0.125, derive(seed, "pydocs", "validation"))
    return Dataset("pydocs", train, validation, test)


def _collect(library: Path) -> Rows:
    """Return every distinct docstring once, under the first module, by name, that has it.

    The code is parsed, never run. The result is cached in the user's cache folder until a source
    file changes.
    """
    sources: list[tuple[str, str, str]] = []  # (file, chapter, module)
    for module, chapter in _chapters():
        for source in _sources(library, module):
            sources.append((str(source), chapter, module))
    if not sources:
        raise BadInput(
            f"data.source = 'pydocs': {library} holds no Python source; "
            "give files of your own instead"
        )
    # 1. Take what an earlier run has cached. A damaged file is as good as none.
    cached = cache_folder() / f"pydocs-{_stamp(sources)}.json"
    with suppress(OSError, ValueError, TypeError):
        texts, labels, keys = json.loads(cached.read_bytes())
        if 0 < len(texts) == len(labels) == len(keys):
            return Rows.of_texts(texts, labels, keys)
    # 2. Parse the sources, the slow part.
    chapter_and_module: dict[str, tuple[str, str]] = {}
    for path, chapter, module in sources:
        for text in _docstrings(ast.parse(Path(path).read_bytes())):
            chapter_and_module.setdefault(text, (chapter, module))
    labels, keys = zip(*chapter_and_module.values(), strict=True)
    # 3. Cache the result where that is possible. Several processes may get here at once, so each
    # writes a file of its own and renames it.
    temporary = cached.with_suffix(f".{os.getpid()}")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps([list(chapter_and_module), labels, keys])
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(cached)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
    return Rows.of_texts(tuple(chapter_and_module), labels, keys)


def _stamp(sources: Sequence[tuple[str, str, str]]) -> str:
    """Return a digest of the sources, this version of Python and this file.

    Of the sources, sizes and modification times stand for the content.
    """
    stats: list[tuple[int, int]] = []
    for source, _, _ in sources:
        stat = os.stat(source)
        stats.append((stat.st_size, stat.st_mtime_ns))
    about = repr((sys.version, sources, stats))
    # With this file in it, a change of the code that collects makes old caches useless.
    return blake2b(about.encode() + Path(__file__).read_bytes(), digest_size=16).hexdigest()


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


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings inside ``node`` that are long enough, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = (ast.get_docstring(node) or "").strip()
        if len(text) >= SHORTEST:
            yield text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # most nodes are expressions, and they define nothing
            yield from _docstrings(child)
