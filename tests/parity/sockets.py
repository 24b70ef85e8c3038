"""Sites behind real sockets in this process: the connector's half, the trainer's half, and a grid that joins them."""

import contextlib
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

from flwr.app import Error, Message, RecordDict

from fedpeft.deployment import trainer as trainers
from fedpeft.deployment.join import Answering
from fedpeft.deployment.site import Site
from fedpeft.engines.flower.connector import replied
from fedpeft.engines.flower.grid import FAILED
from fedpeft.errors import WireError
from fedpeft.wire.frames import Frame, connected, listening, receive, send
from tests.parity.here import Here, Node


@final
@dataclass
class Asker:
    """What a connector asks its trainer through: a connection, as to a child process."""

    path: Path

    def ask(self, frame: Frame) -> Frame:
        with connected(self.path) as connection:
            send(connection, frame)
            return receive(connection)


@final
@dataclass
class Behind:
    """A site whose trainer listens on a socket."""

    site: Site
    said: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def answer(self, message: Message) -> Message:
        """Answer a message as the connector does."""
        asker: Any = Asker(self.site.socket)
        answering = Answering(self.site, asker, self.said.append)
        content: RecordDict | Error
        try:
            content = replied(answering, message.metadata.message_type, message.content)
        except WireError as error:
            content = Error(FAILED, str(error))
        return Message(content, reply_to=message)


@contextlib.contextmanager
def behind_sockets(sites: Iterable[Site]) -> Iterator[list[Behind]]:
    """Let a trainer listen for each site, in a thread of its own."""
    with contextlib.ExitStack() as stack:
        behind: list[Behind] = []
        for site in sites:
            one = Behind(site)
            server = stack.enter_context(listening(site.socket))
            trainer = trainers.Trainer(site, one.errors.append)
            thread = threading.Thread(target=_serve, args=(trainer, server), daemon=True)
            thread.start()
            behind.append(one)
        yield behind


def _serve(trainer: trainers.Trainer, server: Any) -> None:
    with contextlib.suppress(OSError):  # the socket is closed at the end of the test
        trainers.serve(trainer, server, 1 << 30)


def own_site(client: int, folder: Path, models: Mapping[str, str], **changes: Any) -> Site:
    """Return the settings of a site whose state has a short path, as sockets need one."""
    state = Path(tempfile.mkdtemp(prefix="fp"))
    settings: dict[str, Any] = {
        "client": client,
        "server": "localhost:1",
        "ca": folder / "ca.crt",
        "key": folder / "site.key",
        "data": {"train": str(folder / "train.jsonl")},
        "models": dict(models),
        "machine": {"device": "cpu", "precision": "fp32", "attention": "eager", "threads": 1},
        "state": state,
    }
    if (folder / "test.jsonl").exists():
        settings["data"]["test"] = str(folder / "test.jsonl")
    return Site(**{**settings, **changes})


class Answers(Protocol):
    """A site as a grid reaches it."""

    site: Site

    def answer(self, message: Message) -> Message: ...


def grid_of(sites: Iterable[Answers]) -> Here:
    """Return a grid whose nodes, numbered from 100, are these sites."""
    handlers = {100 + number: one for number, one in enumerate(sites)}
    grid = Here({node: Node.holding(one.site.client) for node, one in handlers.items()})

    def app(message: Message, _context: Any) -> Message:
        return handlers[message.metadata.dst_node_id].answer(message)

    grid._app = app  # type: ignore[assignment]
    return grid
