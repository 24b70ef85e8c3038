"""Data that every Python brings along: the standard library's docstrings, labelled by chapter of its manual."""

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
from fedpeft.errors import BadInput
from fedpeft.seeds import derive

SHORTEST = 30
"""Docstrings of fewer characters are left out: they say too little to be told apart."""


def pydocs(seed: int = 0) -> Dataset:
    """Return the docstrings of the running Python's standard library, about 70 : 10 : 20 by label.

    A row's text is a cleaned docstring of a module, class or function, its label the chapter of the
    Library Reference that documents the module (``chapters.toml``), its key the top-level module.
    No text occurs twice. The splits depend on ``seed`` and the set of texts alone; the texts differ
    a little between versions of Python, and ``digest`` tells. Raises BadInput where the standard
    library is installed without its source files.
    """
    rows = _collect(Path(sysconfig.get_path("stdlib")))
    mixed = rows.take(
        sorted(range(len(rows)), key=lambda row: derive(seed, "pydocs", rows.texts[row]))
    )
    rest, test = stratified(mixed, 0.2, derive(seed, "pydocs", "test"))
    train, validation = stratified(rest, 0.125, derive(seed, "pydocs", "validation"))
    return Dataset("pydocs", train, validation, test)


def _collect(library: Path) -> Rows:
    """Return every different docstring once, under the first module (in alphabetical order) that has it.

    The code is parsed, never run; what was found is kept in the user's cache for as long as the
    sources stay as they are.
    """
    sources = [
        (str(source), chapter, module)
        for module, chapter in _chapters()
        for source in _sources(library, module)
    ]
    if not sources:
        raise BadInput(
            f"data.source = 'pydocs': {library} holds no Python source; give files of your own instead"
        )
    kept = _cache() / f"pydocs-{_stamp(sources)}.json"
    with suppress(OSError, ValueError, TypeError):
        texts, labels, keys = json.loads(kept.read_bytes())
        if 0 < len(texts) == len(labels) == len(keys):
            return Rows(tuple(texts), tuple(labels), tuple(keys))
    found: dict[str, tuple[str, str]] = {}
    for source, chapter, module in sources:
        for text in _docstrings(ast.parse(Path(source).read_bytes())):
            found.setdefault(text, (chapter, module))
    labels, keys = zip(*found.values(), strict=True)
    own = kept.with_suffix(f".{os.getpid()}")  # several processes may get here at once
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps([list(found), labels, keys]), encoding="utf-8")
        own.replace(kept)
    except OSError:
        with suppress(OSError):
            own.unlink()
    return Rows(tuple(found), labels, keys)


def _cache() -> Path:
    """Return the folder where the user's programs keep what they can make again; of a user without a home, nowhere."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpeft"
    except RuntimeError:
        return Path(os.devnull) / "fedpeft"


def _stamp(sources: Sequence[tuple[str, str, str]]) -> str:
    """Return a digest of the sources, as far as their sizes and times of change tell, of this Python and of this file."""
    stats = [os.stat(source) for source, _, _ in sources]
    about = repr((sys.version, sources, [(stat.st_size, stat.st_mtime_ns) for stat in stats]))
    return blake2b(about.encode() + Path(__file__).read_bytes(), digest_size=16).hexdigest()


def _chapters() -> list[tuple[str, str]]:
    """Return every top-level module with its chapter, in alphabetical order."""
    text = resources.files("fedpeft.data").joinpath("chapters.toml").read_text(encoding="utf-8")
    return sorted(
        (module, chapter) for chapter, modules in tomllib.loads(text).items() for module in modules
    )


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
