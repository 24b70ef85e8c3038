"""The files that a path or a pattern names, and helpful errors where there are none."""

import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from glob import glob
from pathlib import Path

from fedpeft.errors import BadInput


def matching(pattern: Path) -> list[Path]:
    """Return the file ``pattern``, or those that it matches by ``*``, ``?``, ``[...]`` or ``**``.

    They are sorted. Files and folders that exist are taken literally, so brackets in their names do
    no harm; a folder stands for itself. Raises BadInput where there is no file.
    """
    with readable(pattern):
        if pattern.exists():
            return [pattern]
        # Only what lies below the deepest folder that exists can be a pattern.
        root = pattern.parent
        while not root.is_dir() and root != root.parent:
            root = root.parent
        relative = str(pattern.relative_to(root))
        if set("*?[").isdisjoint(relative):
            return [existing(pattern)]
        files: list[Path] = []
        for name in glob(relative, root_dir=root, recursive=True):
            if (root / name).is_file():
                files.append(root / name)
    if not files:
        raise BadInput(f"{pattern}: no file matches this pattern")
    return sorted(files)


def existing(path: Path) -> Path:
    """Return ``path`` if it is a file; else raise BadInput that offers the most similar name."""
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
    """Return the end of an error message: the choice most similar to ``name``, empty without."""
    # Sorted, so that among equally similar choices the answer is always the same.
    close = get_close_matches(name, sorted(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors of the system and of gzip in the ``with`` into BadInput that names ``path``."""
    try:
        yield
    # BadGzipFile is an OSError; a gzip that is cut off raises EOFError.
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error
