"""Which files a path or a pattern names, and what is said where there is none."""

import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from glob import glob
from pathlib import Path

from fedpeft.errors import BadInput


def matching(pattern: Path) -> list[Path]:
    """Return the file ``pattern``, or those that it matches by ``*``, ``?``, ``[...]`` or ``**``.

    They are sorted. What exists is taken as it is, so brackets in a folder's name do no harm.
    Raises BadInput where there is no file.
    """
    with readable(pattern):
        if pattern.exists():
            return [existing(pattern)]
        root = pattern.parent
        while not root.is_dir() and root != root.parent:
            root = root.parent
        rest = str(pattern.relative_to(root))
        if not any(wildcard in rest for wildcard in "*?["):
            return [existing(pattern)]
        found = [root / name for name in glob(rest, root_dir=root, recursive=True)]
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise BadInput(f"{pattern}: no file matches this pattern")
    return files


def existing(path: Path) -> Path:
    """Return ``path`` if it is a file; else raise BadInput, naming the nearest in its folder."""
    with readable(path):
        if path.is_file():
            return path
        if not path.parent.is_dir():
            raise BadInput(f"{path}: there is no folder {path.parent}")
        if path.is_dir():
            raise BadInput(f"{path}: is a folder, not a file; name its files, as {path / '*.csv'}")
        beside = [other.name for other in path.parent.iterdir()]
        raise BadInput(f"{path}: no such file{nearest(path.name, beside)}")


def nearest(name: str, choices: Collection[str]) -> str:
    """Return the end of an error message that offers the choice most like ``name``, if any is."""
    close = get_close_matches(name, sorted(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise BadInput, naming ``path``, for what the system or gzip finds wrong in the ``with``."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error
