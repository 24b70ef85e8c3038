"""Frames: what two processes of one user say to each other over a socket of the system.

A frame is the length of a JSON header in 4 bytes, the length of a body in 8, the header, the body.
Both lengths are bounded before anything is read, and nothing is executed: no pickle.
"""

import contextlib
import json
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from fedpeft.errors import BadInput, WireError

if sys.platform != "win32":
    import fcntl

HEADER: Final = 1 << 20
"""Bytes of a header at most."""
BODY: Final = 1 << 34
"""Bytes of a body at most, where the caller sets no closer bound."""
SOCKET_PATH: Final = 100
"""Characters of a socket's path at most: the system has room for 108, macOS for 104."""

LEAVING: Final = 15.0
"""Seconds in which whoever listens at a path may end, before another one is refused."""
TAKEN: Final = "another process listens there; is the site running twice?"

_LENGTHS: Final = struct.Struct("<IQ")
_PIECE: Final = 1 << 20


class Closed(Exception):
    """The other side has closed the socket, or has gone."""


@final
@dataclass(frozen=True)
class Frame:
    """One message: a JSON object, and bytes that nobody on the way looks at."""

    header: Mapping[str, Any]
    body: bytes = field(default=b"", repr=False)


def send(connection: socket.socket, frame: Frame) -> None:
    """Send a frame; Closed where nobody is there any more."""
    header = json.dumps(frame.header).encode()
    if len(header) > HEADER:
        raise WireError(f"a header of {len(header)} bytes cannot be sent; at most {HEADER}")
    try:
        connection.sendall(_LENGTHS.pack(len(header), len(frame.body)) + header)
        connection.sendall(frame.body)
    except OSError as error:
        raise Closed(str(error)) from error


def receive(connection: socket.socket, most: int = BODY) -> Frame:
    """Read a frame with a body of at most ``most`` bytes.

    WireError for a frame of another form, Closed where the other side has gone.

    >>> one, other = socket.socketpair()
    >>> send(one, Frame({"kind": "train"}, b"abc"))
    >>> frame = receive(other)
    >>> frame.header, frame.body
    ({'kind': 'train'}, b'abc')
    >>> one.close(); other.close()
    """
    header_length, body_length = _LENGTHS.unpack(_exactly(connection, _LENGTHS.size))
    if header_length > HEADER or body_length > most:
        raise WireError(
            f"a frame of {header_length} and {body_length} bytes; at most {HEADER} and {most}"
        )
    header = _exactly(connection, header_length)
    body = _exactly(connection, body_length)
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise WireError("the header of a frame is no JSON") from error
    if not isinstance(content, dict):
        raise WireError("the header of a frame is no JSON object")
    return Frame(content, body)


def _exactly(connection: socket.socket, count: int) -> bytes:
    """Return the next ``count`` bytes; memory grows with what arrives, not with what is claimed."""
    content = bytearray()
    while len(content) < count:
        try:
            piece = connection.recv(min(_PIECE, count - len(content)))
        except OSError as error:
            raise Closed(str(error)) from error
        if not piece:
            raise Closed("the other side has closed the socket")
        content += piece
    return bytes(content)


def connected(path: Path) -> socket.socket:
    """Return a connection to the socket at ``path``; Closed where nobody listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise Closed(f"nobody listens at {path} ({error.strerror})") from error
    return connection


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen on a socket at ``path`` that its user alone can reach; remove it in the end.

    Its folder gets mode 0700, the socket 0600. BadInput where the path is too long, where it cannot
    be made, and where another process listens there and does not end within ``LEAVING`` seconds.
    """
    if len(str(path)) > SOCKET_PATH:
        raise BadInput(
            f"{path}: is too long for the path of a socket ({SOCKET_PATH} characters); "
            "choose a shorter `state`"
        )
    with contextlib.ExitStack() as undo:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.parent.chmod(0o700)
            undo.enter_context(_alone(path))
            path.unlink(missing_ok=True)  # one that was killed has left it
            server = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            undo.callback(path.unlink, missing_ok=True)
            _bind(server, path)
        except OSError as error:
            raise BadInput(f"{path}: cannot be made ({error.strerror})") from error
        yield server


def _bind(server: socket.socket, path: Path) -> None:
    """Let ``server`` listen at ``path``, its user's alone from its first moment on."""
    before = os.umask(0o177)
    try:
        server.bind(str(path))
    finally:
        os.umask(before)
    server.listen()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock beside a socket's path for the length of a ``with``.

    The system takes it off a process that is killed, so that the next one need not guess.
    """
    assert sys.platform != "win32"  # which has no such sockets either
    with path.with_name(f"{path.name}.lock").open("ab") as lock:
        deadline = time.monotonic() + LEAVING
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise BadInput(f"{path}: {TAKEN}") from error
                time.sleep(0.05)
        yield


def is_own(connection: socket.socket) -> bool:
    """Return whether the process on the other side is of the same user, as the kernel says it."""
    name = getattr(socket, "SO_PEERCRED", None)  # Linux alone; elsewhere the socket's mode guards
    if name is None:
        return True
    size = struct.calcsize("3i")
    _process, user, _group = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, name, size)
    )
    return bool(user == os.getuid())


def check_private(path: Path, what: str) -> None:
    """Raise BadInput where others than its user may read the file at ``path``."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise BadInput(f"{path}: {what} cannot be read ({error.strerror})") from error
    if os.name == "posix" and mode & 0o077:
        raise BadInput(
            f"{path}: {what} can be read by others (mode {mode:o}); make it yours: chmod 600 {path}"
        )
