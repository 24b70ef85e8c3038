"""One writer at a time: a run's folder is claimed by a lock that ends with its process.

It is the operating system's, ``flock`` on POSIX and ``LockFile`` on Windows: a killed process leaves
the file behind, but no lock on it.
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
"""How often a lock's file may vanish under us, as its last owner clears up, before we give up."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Be the only writer of ``folder`` for the length of a ``with``.

    It is made where it is not there. A folder in which there is nothing, and what had to be made for it, is removed in the end.
    Raises BadInput at once where another process, or another part of this one, has the folder, and
    where it cannot be made or written. Readers need no claim. On a file system that knows no locks
    (some clusters') nothing is guarded.
    """
    made_parents = [parent for parent in folder.parents if not parent.exists()]
    empty = False
    try:
        with _locked(folder, COMMAND):
            empty = never_begun(folder)
            # Left by a command that was killed: is a process of its still at work?
            if (folder / PROCESS).exists():
                with _locked(folder, PROCESS):
                    pass
            yield
    finally:
        if empty:
            _remove_if_empty(folder)
        for parent in made_parents:
            _remove_if_empty(parent)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is in use: as a run, or by another who has claimed it
        folder.rmdir()


@contextmanager
def on_behalf(folder: Path) -> Iterator[None]:
    """Keep a killed command's ``folder`` claimed for as long as its process is at work in it.

    The parent process has claimed it, and its lock would end with it.
    """
    with _locked(folder, PROCESS):
        yield


def never_begun(folder: Path) -> bool:
    """Return whether there are only locks in ``folder``.

    A command left them that was killed before it wrote anything.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return False
    return bool(names) and names <= LOCKS


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock ``name`` in ``folder``, and remove its file in the end."""
    descriptor = _acquire(folder, name)
    try:
        yield
    finally:
        _release(folder / name, descriptor)


def _acquire(folder: Path, name: str) -> int:
    """Lock the file ``name`` in ``folder`` and return its descriptor, which ends the lock."""
    path = folder / name
    reason = "its lock is removed again and again"
    for _ in range(_TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError) as error:
            # Of a folder that its last owner has removed meanwhile: try again.
            reason = str(error.strerror)
            continue
        except (OSError, ValueError) as error:  # ValueError: a name that this system cannot write
            reason = str(error.strerror if isinstance(error, OSError) else error)
            break
        if _is_taken(path, descriptor):
            return descriptor
    if folder.is_dir():
        raise BadInput(
            f"{folder}: cannot be written ({reason}); make the folder writable, with room"
        )
    raise BadInput(f"{folder}: cannot be made ({reason}); choose another place with --runs")


def _is_taken(path: Path, descriptor: int) -> bool:
    """Return whether the open file is locked by us now, or close it.

    BadInput where another holds it.
    """
    try:
        if not _try_lock(descriptor):
            raise BadInput(
                f"{path.parent}: {_holder(descriptor)} is writing this run; "
                "wait until it has ended, or end it, and try again"
            )
        if _is_at(path, descriptor):
            _sign(descriptor)
            return True
    except BaseException:
        os.close(descriptor)
        raise
    # Its last owner has just removed it: what we have locked is no longer there.
    os.close(descriptor)
    return False


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
    """Write down who holds the lock, from the second byte on.

    Windows keeps others from reading the first, which is locked.
    """
    with suppress(OSError):  # a full disk: then the holder has no name
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f" {os.getpid()} {socket.gethostname()}".encode())


def _holder(descriptor: int) -> str:
    """Return who has signed the lock's file, such as ``process 4711 on node3``.

    The machine is left out where it is this one.
    """
    try:
        os.lseek(descriptor, 1, os.SEEK_SET)
        process, host = os.read(descriptor, 300).decode().split()
    except (OSError, ValueError):
        return "another process"
    return f"process {process}" if host == socket.gethostname() else f"process {process} on {host}"


def _release(path: Path, descriptor: int) -> None:
    """Remove the lock's file and end the lock."""
    if sys.platform == "win32":
        # An open file cannot be removed, and neither can one that another has opened meanwhile.
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()
    else:
        # Removed while still held: who has opened it meanwhile sees that it is gone once the lock
        # is theirs.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
