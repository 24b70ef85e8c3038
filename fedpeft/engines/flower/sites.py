"""A server of sites: the gate, the SuperLink behind it, and runs that reach the sites."""

import base64
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

from fedpeft.engines.flower.claim import claimed_run, register
from fedpeft.engines.flower.engine import FlowerEngine
from fedpeft.engines.flower.gate import TAKEN_IN, public_key
from fedpeft.engines.flower.nodes import Admit, Nodes, Said
from fedpeft.engines.flower.superlink import (
    Link,
    free_port,
    superlink,
    surroundings,
    wait_for,
    watched,
)
from fedpeft.errors import BadInput, WireError

CLIENTS: Final = 1 << 31
"""Clients' numbers are below it."""

OFFER: Final = "offer.json"
"""In the server's state: what is offered, for sites that ask the gate before they join."""
AWAY: Final = 90.0
"""Seconds for which a site that has left may come back within a round."""
POLL: Final = 0.15
"""Seconds between two looks for answers."""

Say = Callable[[str], None]
Files = frozenset[tuple[str, int, int, int]]
"""Name, number, size and time of files."""


@final
@dataclass(frozen=True)
class Door:
    """How sites reach the server.

    ``certificate`` and ``key``: of the gate, PEM files. ``sites``: the folder of public keys.
    ``state``: the folder of the SuperLink. ``embedded``: whether the gate is started here.
    """

    host: str
    port: int
    certificate: Path
    key: Path
    sites: Path
    state: Path
    database: bool
    embedded: bool
    link_port: int


@final
class Server:
    """A running server of sites."""

    def __init__(self, door: Door, link: Link, port: int, say: Say) -> None:
        self.port = port
        self._door = door
        self._link = link
        self._say = say
        self._numbers: dict[bytes, int] = {}
        self._files: Files = frozenset()  # those that the numbers were read from

    def admit_new(self) -> None:
        """Let in the sites whose keys have been put into the folder, and no longer the others."""
        # Called several times a second: reading many keys costs far more than a look at the files.
        files = files_in(self._door.sites)
        if files == self._files:
            return
        numbers = numbers_of(self._door.sites)
        if numbers != self._numbers:
            register(self._link, {key: f"site {number}" for key, number in numbers.items()})
        self._numbers, self._files = numbers, files
        write_taken_in(self._door.state, numbers)

    @contextlib.contextmanager
    def run(self) -> "Iterator[Sites]":
        """Begin a run that lasts as long as the ``with``, and yield what reaches its sites."""
        with claimed_run(self._link) as grid:
            yield Sites(grid, self)

    def number_of(self, key: bytes) -> int | None:
        """Return the client's number that a public key stands for; None where it has none."""
        return self._numbers.get(key)


@final
@dataclass(frozen=True)
class Sites:
    """The sites as a run of Flower's reaches them."""

    grid: HttpGrid
    server: Server

    def number_of(self, node: int, said: Said) -> int:
        """Return the client's number that a node's key stands for; WireError where it has none.

        What it ``said`` of itself has to agree.
        """
        number = None
        for info in self.grid.get_nodes():
            if info.node_id == node:
                number = self.server.number_of(bytes(info.public_key))
        if number is None:
            raise WireError("its key is not registered")
        client = said.get("partition-id")
        if client != number:
            raise WireError(f"it has the key of site {number}, and says that it is {client!r:.20}")
        return number

    def sessions(self) -> dict[int, str]:
        """Return which nodes are online, and since when."""
        return {info.node_id: info.last_activated_at for info in self.grid.get_nodes()}

    def engine(
        self, question: Mapping[str, str], admit: Admit, on_fault: Say, deadline: float, window: int
    ) -> FlowerEngine:
        """Return an engine for the sites, none of which has been asked yet.

        ``question``: what each is asked first; its ``config`` goes with every request.
        ``deadline``: seconds in which a site has to answer. ``window``: sites at work at once.
        """
        about = ConfigRecord(dict(question))
        nodes = Nodes(self.grid, CLIENTS, about, admit, on_fault, self.sessions)
        return engine_for(self.grid, nodes, question["config"], deadline, window)


def engine_for(grid: Grid, nodes: Nodes, config: str, deadline: float, window: int) -> FlowerEngine:
    """Return the engine of a federation over a network, none of whose nodes comes or goes at once.

    ``config``: goes with every request.
    """
    return FlowerEngine(
        grid,
        threading.Event(),
        nodes,
        config,
        patience=deadline,
        window=window,
        poll=POLL,
        away=AWAY,
    )


def files_in(sites: Path) -> Files:
    """Return what tells whether keys in a folder have come, gone, or become others."""
    found: set[tuple[str, int, int, int]] = set()
    for path in sites.glob("*.pub"):
        with contextlib.suppress(FileNotFoundError):  # removed since
            about = path.stat()
            found.add((path.name, about.st_ino, about.st_size, about.st_mtime_ns))
    return frozenset(found)


def write_taken_in(state: Path, keys: Iterable[bytes]) -> None:
    """Write down which keys the SuperLink has, for sites that ask the gate why they have to wait.

    Without room on the disk it is left: a site then takes a key that is new for one in use.
    """
    told = [base64.b64encode(key).decode("ascii") for key in keys]
    temporary = state / f"{TAKEN_IN}.tmp"
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(told), encoding="ascii")
        temporary.replace(state / TAKEN_IN)


def numbers_of(sites: Path) -> dict[bytes, int]:
    """Return public key -> client's number of all keys in a folder, such as ``site-0.pub``.

    BadInput for a file whose name ends in no number, for a number or a key that is there twice, and
    for what is no key.
    """
    numbers: dict[bytes, int] = {}
    for path in sorted(sites.glob("*.pub")):
        digits = path.stem[len(path.stem.rstrip("0123456789")) :]
        if not digits or int(digits) >= CLIENTS:
            raise BadInput(f"{path}: call it after the client's number, such as site-0.pub")
        try:
            key = public_key(path)
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: is no public key of a site ({error})") from error
        if key in numbers or int(digits) in numbers.values():
            raise BadInput(f"{path}: its key, or its number {digits}, is that of another file, too")
        numbers[key] = int(digits)
    return numbers


@contextlib.contextmanager
def serving(door: Door, tls: Callable[[Path], bytes], say: Say) -> Iterator[Server]:
    """Run the SuperLink, and the gate in front of it, for the length of a ``with``.

    ``tls``: see ``superlink``. BadInput where one of them does not start.
    """
    numbers_of(door.sites)
    with (
        superlink(door.state, door.link_port, database=door.database, tls=tls, say=say) as link,
        _gate(door, link, say) as port,
    ):
        server = Server(door, link, port, say)
        server.admit_new()
        yield server


@contextlib.contextmanager
def _gate(door: Door, link: Link, say: Say) -> Iterator[int]:
    """Run the gate for the length of a ``with``, where it is ours, and yield its port."""
    if not door.embedded:
        say(f"the SuperLink is at {link.address}; put a proxy for /v1/fleet/ in front of it")
        yield link.port
        return
    port = door.port or free_port()
    settings = {
        "link": link.address,
        "ca": str(door.state / "link-ca.crt"),
        "sites": str(door.sites),
        "offer": str(door.state / OFFER),
        "host": door.host,
        "port": port,
        "certificate": str(door.certificate),
        "key": str(door.key),
    }
    command = [sys.executable, "-m", "fedpeft.engines.flower.gate"]
    log = door.state / "gate.log"
    first = json.dumps(settings).encode() + b"\n"
    with watched(command, log, surroundings(door.state), "gate", say, first) as program:
        if door.host in ("127.0.0.1", "localhost", "0.0.0.0", "::"):
            wait_for(port, program, log)
        program.up.set()
        yield port
