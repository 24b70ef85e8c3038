"""The methods' names, purposes and papers, read from their files: importing torch takes seconds."""

import ast
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, NamedTuple

FOLDER: Final = Path(__file__).parent.parent / "methods"
GROUP: Final = "fedpeft.methods"
"""The entry-point group in which third parties name their methods."""


class Entry(NamedTuple):
    """What is told of a method."""

    name: str
    purpose: str
    paper: str


def catalogue() -> list[Entry]:
    """Return what is told of every method: ours, and those that installed packages add.

    Others' files may be of any form: where there are any, all is imported.
    """
    if entry_points(group=GROUP):
        return _imported()
    package = ast.parse((FOLDER / "__init__.py").read_text("utf-8"))
    files = dict(_files_of_classes(package))
    found: list[Entry] = []
    for name, constructor in _registered(package).items():
        body = _class(ast.parse(files[constructor].read_text("utf-8")), constructor)
        purpose = (ast.get_docstring(body) or "").splitlines()[0]
        found.append(Entry(name, purpose, _paper(body)))
    return found


def _imported() -> list[Entry]:
    """Return what the classes themselves tell."""
    from fedpeft.methods import constructors

    found: list[Entry] = []
    for name, constructor in constructors().items():
        purpose = (constructor.__doc__ or "").splitlines()[0]  # a dataclass always has one
        found.append(Entry(name, purpose, constructor.paper))
    return found


def _files_of_classes(package: ast.Module) -> Iterator[tuple[str, Path]]:
    """Yield every class that the package imports from a method's file, and that file."""
    for node in package.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedpeft.methods."):
            file = FOLDER / f"{(node.module or '').rpartition('.')[2]}.py"
            for alias in node.names:
                yield alias.name, file


def _registered(package: ast.Module) -> Mapping[str, str]:
    """Return the class of every method, by the method's name: the package's METHODS."""
    for node in package.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            keys = [ast.literal_eval(key) for key in node.value.keys if key is not None]
            return dict(zip(keys, map(ast.unparse, node.value.values), strict=True))
    raise LookupError("fedpeft/methods/__init__.py: METHODS")


def _class(module: ast.Module, name: str) -> ast.ClassDef:
    """Return a class of a module."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(name)


def _paper(body: ast.ClassDef) -> str:
    """Return the text of a method's ``paper``."""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "paper":
            assert node.value is not None
            return str(ast.literal_eval(node.value))
    raise LookupError(f"{body.name}.paper")
