"""One writer at a time: a run's folder is claimed by a lock of the operating system, which ends with its process.

``flock`` on POSIX and ``LockFile`` on Windows: a killed process leaves the file behind, but no lock on it.
"""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fedpeft.errors import BadInput

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

COMMAND: Final = "writer.lock"
"""Locked by the command that writes a run's folder, from before anything slow until its end."""
PROCESS: Final = "process.lock"
"""Locked by a process that writes on behalf of a command, which might outlive it for a moment."""
LOCKS: Final = frozenset({COMMAND, PROCESS})

_HELD: Final = frozenset({errno.EAGAIN, errno.EACCES, errno.EDEADLK})
_NO_LOCKS_HERE: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
_TRIES: Final = 100
"""How often a lock's file or folder may vanish under us, as its last owner clears up, before we give up."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Be the only writer of ``folder`` for the length of a ``with``; it is made where it is not there.

    What had to be made and is still empty in the end is removed again. Raises BadInput at once where another process, or
    another part of this one, has the folder, and where it cannot be made or written. Readers need no claim. On a file
    system that knows no locks (some clusters') nothing is guarded.
    """
    made = _to_be_made(folder)
    try:
        with _locked(folder, COMMAND):
            if (folder / PROCESS).exists():
                with _locked(folder, PROCESS):  # refused while a process of a killed command is still at work
                    pass
            yield
    finally:
        for place in made:
            with suppress(OSError):  # not empty: it has become a run, or another has claimed it
                place.rmdir()


@contextmanager
def on_behalf(folder: Path) -> Iterator[None]:
    """Keep ``folder``, which the parent process has claimed, from being claimed anew should the parent be killed."""
    with _locked(folder, PROCESS):
        yield


def never_begun(folder: Path) -> bool:
    """Return whether all there is in ``folder`` is what a command left that was killed before it wrote anything."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return bool(names) and names <= LOCKS


def _to_be_made(folder: Path) -> list[Path]:
    """Return ``folder`` and those above it that are not there yet, innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    return [folder] if never_begun(folder) else missing


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock ``name`` in ``folder``, and remove its file in the end."""
    descriptor = _acquire(folder, name)
    try:
        yield
    finally:
        _release(folder / name, descriptor)


def _acquire(folder: Path, name: str) -> int:
    """Return the descriptor of the locked file ``name`` in ``folder``; the lock lasts until it is closed."""
    path = folder / name
    for _ in range(_TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the folder has just been removed by its last owner
        except (OSError, ValueError) as error:  # ValueError: a name that this system cannot write
            raise BadInput(_unwritable(folder, error)) from error
        try:
            free = _try_lock(descriptor)
            if free and _is_at(path, descriptor):
                _sign(descriptor)
                return descriptor
            if not free:
                raise BadInput(f"{folder}: {_holder(path)} is writing this run; wait for its end, or end it, and try again")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file has just been removed by its last owner: what we locked is no longer there
    raise BadInput(f"{folder}: another process is writing this run; wait for its end, or end it, and try again")


def _unwritable(folder: Path, error: OSError | ValueError) -> str:
    reason = error.strerror if isinstance(error, OSError) else error
    if folder.is_dir():
        return f"{folder}: cannot be written ({reason}); make the folder writable, with room"
    return f"{folder}: cannot be made ({reason}); choose another place with --runs"


def _try_lock(descriptor: int) -> bool:
    """Lock the file, or only its first byte (Windows), and return whether that could be done."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return True
        if error.errno in _HELD:
            return False
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether the open file is the one that ``path`` names."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write down who holds the lock, from the second byte on: Windows keeps others from reading the first."""
    with suppress(OSError):  # a full disk: then the holder has no name
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f" {os.getpid()} {socket.gethostname()}".encode())


def _holder(path: Path) -> str:
    """Return who has signed the lock at ``path``, such as ``process 4711``; its machine, too, where that is not this one."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(1)
            number, host = file.read(300).decode().split()
    except (OSError, ValueError):
        return "another process"
    return f"process {number}" if host == socket.gethostname() else f"process {number} on {host}"


def _release(path: Path, descriptor: int) -> None:
    """Remove the lock's file and end the lock."""
    if sys.platform == "win32":  # an open file cannot be removed, and neither can one that another has opened meanwhile
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()
    else:  # removed while still held: who has opened it meanwhile sees that it is gone once the lock is theirs
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
