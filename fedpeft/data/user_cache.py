"""Our folder in the user's cache: what took long to make, and can be made again at any time."""

import os
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """Return our folder in the user's cache (XDG Base Directory Specification).

    For a user without a home it is a path that nobody can create.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpeft"
    except RuntimeError:  # Path.home, of a user without a home
        return Path(os.devnull) / "fedpeft"


def keep(path: Path, content: bytes) -> None:
    """Write a file of the cache whole, or not at all where that is not possible.

    It may hold what texts are made of: its user alone can read file and folder.
    """
    # Several processes may get here at once, so each writes a file of its own and renames it.
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        # One that a crash has left may be readable by others, and would stay so.
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o600, exist_ok=False)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
