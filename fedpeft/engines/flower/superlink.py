"""A SuperLink on this machine's loopback: started, watched, started again, and stopped.

In the open distribution its Control API has no authentication, so nothing but the gate may reach
its port from outside. It gets TLS material of its own, made at every start, as Flower asks for TLS
where sites have keys; a secret keeps the tasks of a run from other local users.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from fedpeft.errors import BadInput

LOOPBACK: Final = "127.0.0.1"
STARTING: Final = 90.0
"""Seconds that a SuperLink may take until it listens."""
AT_ONCE: Final = 5.0
"""Seconds; a program that ends sooner has not come up."""
WAITS: Final = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further start of a program that had been up and now ends at once."""
FIRST: Final = 2
"""Further starts of one that was not up yet: that of a killed server may be at its port still."""
PROGRAM: Final = (
    "from fedpeft.wire.lifeline import end_with_parent; end_with_parent(); "
    "from flwr.superlink.cli import flower_superlink; flower_superlink()"
)
"""Run by this very Python, so that it is the flwr that was checked; it ends with the server."""

Say = Callable[[str], None]


@final
@dataclass(frozen=True)
class Link:
    """A running SuperLink: its port on the loopback, the CA of its certificate, its secret."""

    port: int
    ca: bytes
    secret: bytes

    @property
    def address(self) -> str:
        """Return host and port as Flower writes them."""
        return f"{LOOPBACK}:{self.port}"


def free_port() -> int:
    """Return a port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def write_private(path: Path, content: bytes) -> None:
    """Write a file that its user alone can read, from its first moment on."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def surroundings(folder: Path) -> dict[str, str]:
    """Return the environment of Flower's programs: offline, quiet, with a home in ``folder``."""
    # A proxy of the user's must not be asked for the loopback.
    passed_over = [*filter(None, os.environ.get("NO_PROXY", "").split(",")), LOOPBACK, "localhost"]
    return {
        **os.environ,
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_PROXY": ",".join(dict.fromkeys(passed_over)),
        "no_proxy": ",".join(dict.fromkeys(passed_over)),
    }


@contextlib.contextmanager
def superlink(
    folder: Path, port: int, *, database: bool, tls: Callable[[Path], bytes], say: Say
) -> Iterator[Link]:
    """Run a SuperLink for the length of a ``with``; one that dies is started again.

    ``folder`` is made private. ``port``: 0 for one that is free. ``tls``: writes ``link.crt`` and
    ``link.key`` for the loopback, and ``link-ca.crt``, into a folder, and returns the CA's
    certificate. BadInput where it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    ca = tls(folder)
    secret = secrets.token_bytes(32)
    write_private(folder / "secret", secret)
    chosen = port or free_port()
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        f"--host={LOOPBACK}",
        f"--port={chosen}",
        f"--ssl-certfile={folder / 'link.crt'}",
        f"--ssl-keyfile={folder / 'link.key'}",
        f"--ssl-ca-certfile={folder / 'link-ca.crt'}",
        "--enable-supernode-auth",
        "--isolation=process",
        f"--superexec-auth-secret-file={folder / 'secret'}",
    ]
    if database:
        command.append(f"--database={folder / 'link.db'}")
    with watched(command, folder / "superlink.log", surroundings(folder), "SuperLink", say) as it:
        wait_for(chosen, it, folder / "superlink.log")
        yield Link(chosen, ca, secret)


def wait_for(port: int, program: "Program", log: Path) -> None:
    """Wait until ``program`` listens on ``port`` of the loopback; BadInput where it does not."""
    deadline = time.monotonic() + STARTING
    while time.monotonic() < deadline and not program.given_up.is_set():
        try:
            socket.create_connection((LOOPBACK, port), 1.0).close()
        except OSError:
            time.sleep(0.1)
        else:
            program.up.set()
            return
    raise BadInput(f"{log}: what should listen on port {port} does not; its last lines say why")


@contextlib.contextmanager
def watched(
    command: list[str],
    log: Path,
    environment: dict[str, str],
    name: str,
    say: Say,
    first: bytes = b"",
) -> Iterator["Program"]:
    """Run a program for the length of a ``with``; started again when it ends.

    ``log``: where its output goes. ``first``: a line that it reads from its standard input. One
    that does not come up is soon given up. One that had been up and does not come up any more,
    after all of ``WAITS``, ends this process as Ctrl-C does: nobody could reach it, and the run can
    be resumed.
    """
    program = Program(command, log, environment, name, say, first)
    program.start()
    watching = threading.Thread(target=program.watch, daemon=True)
    watching.start()
    try:
        yield program
    finally:
        # First nobody starts it any more.
        program.stopping.set()
        watching.join()
        program.stop()


@final
class Program:
    """A program that is watched.

    ``up``: set once it has come up. ``given_up``: set when it is not started again. ``stopping``:
    set when it is not to be.
    """

    def __init__(
        self,
        command: list[str],
        log: Path,
        environment: dict[str, str],
        name: str,
        say: Say,
        first: bytes,
    ) -> None:
        self._command = command
        self._log = log
        self._environment = environment
        self._name = name
        self._say = say
        self._first = first
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self.up = threading.Event()
        self.given_up = threading.Event()
        self.stopping = threading.Event()

    def start(self) -> None:
        """Start it; its output is appended to the log."""
        self._began = time.monotonic()
        with self._log.open("ab") as log:
            # A group of its own: Ctrl-C in a terminal ends the server, which then ends this.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already
            self._process.stdin.write(self._first)
            self._process.stdin.flush()  # and left open: it ends where this process does

    def watch(self) -> None:
        """Start it again whenever it ends, until it does not come up any more."""
        in_vain = 0
        while not self.stopping.is_set():
            assert self._process is not None
            try:
                code = self._process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
            if self.stopping.is_set():
                return
            if time.monotonic() - self._began < AT_ONCE:
                in_vain += 1
            else:
                in_vain = 0
                self.up.set()
            if in_vain > (len(WAITS) if self.up.is_set() else FIRST):
                self.given_up.set()
                self._say(f"the {self._name} ends at once (code {code}); see {self._log}")
                if self.up.is_set():
                    signal.raise_signal(signal.SIGINT)
                return
            self._say(f"the {self._name} has ended (code {code}); starting it again")
            self._close()
            if in_vain and self.stopping.wait(WAITS[in_vain - 1]):
                return
            self.start()

    def stop(self) -> None:
        """End it."""
        if self._process is None or self._process.poll() is not None:
            self._close()
            return
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        """Close our end of its standard input."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
