"""A data set inside every Python: the standard library's docstrings, labelled by manual chapter."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedpeft.data.rows import Dataset
from fedpeft.data.stdlib import Collection, documented

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
    return PYDOCS.dataset(seed)


def _docstrings(source: str) -> Iterator[tuple[str]]:
    """Yield the docstrings of a module that are long enough, in source order."""
    for _, text in documented(ast.parse(source)):
        if len(text) >= SHORTEST:
            yield (text,)


PYDOCS: Final = Collection("pydocs", ("text",), _docstrings, Path(__file__))
