"""A data set inside every Python: the standard library's functions, and what each one does."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from fedpeft.data.rows import Dataset
from fedpeft.data.stdlib import Collection, documented

LONGEST = 200
"""Characters of code that a prompt holds at most, about 64 tokens of a language model."""
SHORTEST = 15
"""First lines of docstrings with fewer characters are left out: they say too little."""


def pycode(seed: int = 0) -> Dataset:
    """Return functions of the running Python's standard library, about 70 : 10 : 20 by label.

    A row's prompt is the signature of a function with the first lines of its body, without the
    docstring, as far as they have at most ``LONGEST`` characters; its response is the first line of
    the docstring. Its label is the chapter of the Library Reference that documents the module
    (``chapters.toml``), its key the top-level module. No prompt occurs twice. The splits depend
    only on ``seed`` and the set of rows. The functions differ a little between versions of Python;
    ``digest`` shows that. Raises BadInput where the standard library is installed without its
    source files.
    """
    return PYCODE.dataset(seed)


def _functions(source: str) -> Iterator[tuple[str, str]]:
    """Yield prompt and response of every function of a module that has both, in source order."""
    lines = source.split("\n")  # as ``ast`` counts them: ``splitlines`` would also end at \f
    for node, docstring in documented(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        prompt = _prompt(node, lines)
        response = docstring.splitlines()[0].strip()
        if prompt and len(response) >= SHORTEST:
            yield prompt, response


def _prompt(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str:
    """Return the beginning of a function: no decorators, no docstring, no blank lines.

    ``lines``: of its module. It is empty where not even the signature and a line of the body fit,
    where nothing follows the docstring, and where the docstring shares a line with code.
    """
    docstring = node.body[0]
    if len(node.body) == 1 or docstring.lineno == node.lineno:
        return ""
    assert docstring.end_lineno is not None  # ``ast.parse`` sets them all
    if node.body[1].lineno == docstring.end_lineno:
        return ""
    signature = _written(lines[node.lineno - 1 : docstring.lineno - 1])
    body = _written(lines[docstring.end_lineno : node.end_lineno])
    indent = " " * node.col_offset
    beginning: list[str] = []
    room = LONGEST
    for indented in [*signature, *body]:
        line = indented.removeprefix(indent)  # a comment may begin further to the left
        room -= len(line) + 1  # with its end
        if room < 0:
            break
        beginning.append(line)
    return "\n".join(beginning) if len(beginning) > len(signature) else ""


def _written(lines: Sequence[str]) -> list[str]:
    """Return the lines that are not blank, without blanks at their ends."""
    return [line.rstrip() for line in lines if line.strip()]


PYCODE: Final = Collection("pycode", ("prompt", "response"), _functions, Path(__file__))
