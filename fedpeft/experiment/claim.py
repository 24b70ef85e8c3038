"""One writer at a time: a run's folder is claimed by a system lock that ends with its process.

The lock is ``flock`` on POSIX and ``LockFile`` on Windows: a killed process leaves the file, but no
lock on it. The library ``filelock`` is not used, as its versions differ in what matters here:
whether a second process empties the file, whether the file is removed, and what happens on a file
system without locks.
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

# What the system reports where another has the lock, and where it knows no locks at all.
_HELD: Final = frozenset({errno.EAGAIN, errno.EACCES, errno.EDEADLK})
_NO_LOCKS_HERE: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
_TRIES: Final = 100
"""How often a lock's file or folder may be removed under us by its last owner until we give up."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Be the only writer of ``folder`` for the length of a ``with``; a missing folder is made.

    In the end an empty folder is removed, and so are the folders above it that were made for it.
    Raises BadInput at once where another process, or another part of this one, has the folder, and
    where it cannot be made or written. Readers need no claim. On a file system that knows no locks
    (as on some clusters) nothing is guarded.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]  # the innermost first
    empty = False
    try:
        with _locked(folder, COMMAND):
            empty = never_begun(folder)
            _take_from_processes(folder)
            try:
                yield
            finally:
                with suppress(BadInput):
                    _take_from_processes(folder)
    finally:
        removable = [folder, *missing] if empty else missing
        for path in removable:
            with suppress(OSError):  # it is in use: as a run, or by another who has claimed it
                path.rmdir()


@contextmanager
def on_behalf(folder: Path) -> Iterator[None]:
    """Hold ``folder``, which the parent process has claimed, should the parent be killed."""
    with _locked(folder, PROCESS):
        yield


def _take_from_processes(folder: Path) -> None:
    """Remove the lock that a killed process has left; BadInput where it is still at work."""
    if (folder / PROCESS).exists():
        with _locked(folder, PROCESS):
            pass


def is_written(folder: Path) -> bool:
    """Return whether a process writes ``folder`` now.

    Where a lock cannot be tried, it is taken for held as long as its file is there.
    """
    for name in LOCKS:
        try:
            descriptor = os.open(folder / name, os.O_RDWR)
        except PermissionError:
            return True
        except OSError:
            continue
        try:
            # Held for the moment until it is closed, and only where nobody else holds it.
            if not _try_lock(descriptor, unknown=False):
                return True
        finally:
            os.close(descriptor)
    return False


def never_begun(folder: Path) -> bool:
    """Return whether ``folder`` holds locks alone, as after a command that was killed early on."""
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
    """Return the descriptor of the locked file ``name``; the lock lasts until it is closed."""
    # Its owner removes the file when it ends, so a file that we have opened may be gone by the time
    # we lock it. Then we try again.
    path = folder / name
    reason = "its lock is removed again and again"
    for _ in range(_TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError) as error:
            reason = str(error.strerror)
            continue  # its last owner has perhaps removed the folder this very moment
        except (OSError, ValueError) as error:  # ValueError: a name that this system cannot write
            reason = str(error.strerror if isinstance(error, OSError) else error)
            break
        if _is_taken(path, descriptor):
            return descriptor
    if folder.is_dir():
        raise BadInput(
            f"{folder}: cannot be written ({reason}); make it writable, with room",
        )
    raise BadInput(f"{folder}: cannot be made ({reason}); choose another place with --runs")


def _is_taken(path: Path, descriptor: int) -> bool:
    """Return whether the open file is locked by us now; close it where it is not.

    Raises BadInput where others hold the lock.
    """
    try:
        if not _try_lock(descriptor):
            holder = _holder(descriptor)
            remedy = "wait until it has ended, or end it, and try again"
            raise BadInput(f"{path.parent}: {holder} is writing this run; {remedy}")
        if _is_at(path, descriptor):
            _sign(descriptor)
            return True
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)  # its last owner has just removed the file: what we locked has no name
    return False


def _try_lock(descriptor: int, *, unknown: bool = True) -> bool:
    """Lock the file, or only its first byte (Windows), and return whether that could be done.

    ``unknown``: what to return where the system knows no locks.
    """
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return unknown  # better unguarded than no run at all
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
    """Write down who holds the lock, from the second byte on: Windows hides a locked first one."""
    with suppress(OSError):  # a full disk: then the holder has no name
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f" {os.getpid()} {socket.gethostname()}".encode())


def _holder(descriptor: int) -> str:
    """Return who has signed the file, such as ``process 4711``, and where if it is not here."""
    try:
        os.lseek(descriptor, 1, os.SEEK_SET)
        # 300 bytes hold any signature: a process id, and a host's name of 255 bytes at most.
        process_id, host = os.read(descriptor, 300).decode().split()
    except (OSError, ValueError):
        return "another process"
    process = f"process {process_id}"
    return process if host == socket.gethostname() else f"{process} on {host}"


def _release(path: Path, descriptor: int) -> None:
    """Remove the lock's file and end the lock."""
    if sys.platform == "win32":
        # An open file cannot be removed, and so neither can one that another has opened meanwhile.
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()
    else:
        # Removed while it is still locked: who has opened it meanwhile finds out when it is theirs.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
