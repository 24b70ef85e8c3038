"""The trainer as its parent sees it: a child process that is started, asked, and started again."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final, final

from fedpeft.errors import BadInput, WireError
from fedpeft.wire.frames import LEAVING, TAKEN, Closed, Frame, connected, receive, send

STARTING: Final = 120.0
"""Seconds that a trainer may take until it listens: it loads torch first."""
ENDING: Final = 10.0
"""Seconds in which it may end by itself."""
LOG: Final = "trainer.log"
"""What a trainer says, beside its socket: why it failed, with paths and data, for its user only."""
LARGEST: Final = 1 << 20
"""Bytes beyond which that file begins anew at the next start."""


@final
class TrainerProcess:
    """A trainer that is this process's child, and the connection to it."""

    def __init__(self, settings: Path, path: Path, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._path = path
        self._log = path.parent / LOG
        self._told_before = 0  # bytes of it that are of earlier trainers
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def start(self) -> None:
        """Start the trainer and wait until it listens; BadInput where it ends at once.

        BadInput, too, where another trainer listens there and stays.
        """
        self.stop()
        self._wait_for_another()
        command = [sys.executable, "-m", "fedpeft.deployment.trainer", str(self._settings), "child"]
        # A group of its own: Ctrl-C in a terminal ends the parent, which then ends the trainer.
        # What it says goes to a file: this process's own output may be carried elsewhere.
        with _private(self._log) as log:
            self._told_before = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + STARTING
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BadInput(f"{self._settings}: the trainer did not start: {self._reason()}")
            try:
                self._connection = connected(self._path)
            except Closed:
                time.sleep(0.05)
            else:
                return
        self.stop()
        raise BadInput(f"{self._path}: the trainer does not listen after {STARTING:g} s")

    def _wait_for_another(self) -> None:
        """Wait until nobody listens, as a trainer whose parent was killed does for a moment still.

        Otherwise it would be taken for the one that is started now.
        """
        deadline = time.monotonic() + LEAVING
        while True:
            try:
                connected(self._path).close()
            except Closed:
                return
            if time.monotonic() > deadline:
                raise BadInput(f"{self._path}: {TAKEN}")
            time.sleep(0.05)

    def ask(self, frame: Frame) -> Frame:
        """Return the trainer's answer; a trainer that has died is started again, once.

        WireError where it dies again, as when there is too little memory.
        """
        for _ in range(2):
            if self._connection is None:
                self.start()
            assert self._connection is not None
            try:
                send(self._connection, frame)
                return receive(self._connection)
            except Closed:
                self._say(f"the trainer has ended{self._how()}; starting it again")
                self.stop()
        raise WireError("the site's trainer has died over this request, twice")

    def _how(self) -> str:
        """Return how the trainer ended, where that is known."""
        if self._process is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f" (code {self._process.wait(1.0)})"
        return ""

    def _reason(self) -> str:
        """Return the last line that this trainer has said."""
        told = self._log.read_bytes()[self._told_before :].decode("utf-8", "replace")
        lines = told.splitlines()
        return lines[-1].removeprefix("fedpeft: ") if lines else "it said nothing"

    def stop(self) -> None:
        """End the trainer."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def _private(path: Path) -> IO[bytes]:
    """Return the file at ``path``, open to be added to, which its user alone can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One that has grown large over many starts begins anew.
    large = path.exists() and path.stat().st_size > LARGEST
    kept = 0 if not large else os.O_TRUNC
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | kept, 0o600), "ab")


@contextlib.contextmanager
def trainer_process(
    settings: Path, path: Path, say: Callable[[str], None]
) -> Iterator[TrainerProcess]:
    """Run a trainer for the length of a ``with``."""
    trainer = TrainerProcess(settings, path, say)
    try:
        trainer.start()
        yield trainer
    finally:
        trainer.stop()
