"""Sites without a trainer, many in one process: they answer at once with what they were sent.

    python -m benchmarks.still_sites FOLDER FIRST COUNT

All else is a site's own: its key, TLS, the gate, a session with heartbeats and its polling. ``FOLDER`` is that of
``fedpeft deploy init``. They leave when the process is told to end.
"""

import signal
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Final, Never, final

from fedpeft.deployment.join import gate_of
from fedpeft.deployment.site import read_site
from fedpeft.engines.flower.connector import Asked, Session, forever
from fedpeft.engines.flower.reach import Gate, offered
from fedpeft.ledger import Measured
from fedpeft.wire.messages import Request, Response

EXAMPLES: Final = 8
"""Which every site says that it has."""
LEAVING: Final = 10.0
"""Seconds in which all sites leave."""


@final
class Echo:
    """What all sites of this process answer with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._about: Mapping[str, Any] | None = None
        self._kept: tuple[bytes, bytes] = b"", b""  # digest of the last request, reply to it

    def about(self, gate: Gate) -> Mapping[str, Any]:
        """Return what a site says that it has: it agrees to what the gate offers."""
        with self._lock:
            if self._about is None:
                offer = offered(gate)
                self._about = {
                    "version": version("fedpeft"),
                    "weights": offer["weights"],
                    "agreed": offer["agreed"],
                    "examples": EXAMPLES,
                    "texts": EXAMPLES,
                    "tests": 0,
                }
            return self._about

    def reply(self, request: bytes) -> bytes:
        """Return the reply to a request: its own payload."""
        key = blake2b(request).digest()
        with self._lock:
            assert self._about is not None
            if self._kept[0] != key:  # made once for all: they are sent the same
                asked = Request.decode(request, bytes.fromhex(self._about["agreed"]))
                done = Measured(examples=EXAMPLES, loss=1.0)
                reply = Response(
                    asked.round, asked.payload, done, memory=asked.memory, phase=asked.phase
                )
                self._kept = key, reply.encode()
            return self._kept[1]


@final
class Still:
    """One site."""

    def __init__(self, settings: Path, echo: Echo) -> None:
        self._site = read_site(settings)
        self._gate = gate_of(self._site)
        self._echo = echo
        self._session: Session | None = None

    def be(self) -> None:
        """Be online until ``end``."""
        forever(self._gate, self._answer, 1 << 30, partial(print, flush=True), self._begun)

    def end(self) -> None:
        """Leave."""
        if self._session is not None:
            self._session.end()

    def _begun(self, session: Session) -> None:
        self._session = session

    def _answer(self, asked: Asked) -> bytes | Mapping[str, Any]:
        if asked.kind == "query":
            return {"partition-id": self._site.client, **self._echo.about(self._gate)}
        return self._echo.reply(asked.request)


def main(folder: Path, first: int, count: int) -> None:
    """Be ``count`` sites from number ``first`` on, until a signal ends this process."""
    echo = Echo()
    sites: list[Still] = []
    threads: list[threading.Thread] = []
    for number in range(first, first + count):
        site = Still(folder / f"site-{number}" / "site.toml", echo)
        sites.append(site)
        threads.append(threading.Thread(target=site.be, daemon=True))
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        for site in sites:
            site.end()
        deadline = time.monotonic() + LEAVING
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _leave(_number: int, _frame: FrameType | None) -> Never:
    raise SystemExit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
