"""Bytes that reach the disk whole or not at all."""

import os
from pathlib import Path


def write(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file whole or not at all: under a temporary name, to the disk, then renamed.

    ``private``: its user alone can read it, from its first moment on. I/O errors raise OSError.
    """
    # In the same folder: a rename is atomic only within one file system.
    temporary = path.with_name(path.name + ".tmp")
    try:
        if private:
            # One that a crash has left may be readable by others, and would stay so.
            temporary.unlink(missing_ok=True)
            temporary.touch(mode=0o600, exist_ok=False)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            # Before the rename, or a power cut could leave the new name with empty content.
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError:
        # A full disk must not keep half a file that nobody will read.
        temporary.unlink(missing_ok=True)
        raise


def sync(folder: Path) -> None:
    """Make the names in ``folder`` durable, where the system lets a folder be opened."""
    # Windows cannot open a folder and has no other call for this.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
