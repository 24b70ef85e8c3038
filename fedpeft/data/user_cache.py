"""The folder in which this package keeps, between runs, what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return our folder in the user's cache (XDG Base Directory Specification).

    For a user without a home it is a path that nobody can create.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpeft"
    except RuntimeError:  # Path.home, of a user without a home
        return Path(os.devnull) / "fedpeft"
