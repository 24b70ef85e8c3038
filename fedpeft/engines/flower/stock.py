"""The way of Flower's own programs, through its public interface alone.

``flower-supernode`` starts a process for every message. That process is thin: it passes the message
to the site's trainer, which is there already (``fedpeft trainer site.toml``), and its answer back.
"""

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpeft.engines.flower.engine import FlowerEngine
from fedpeft.engines.flower.grid import FAILED, blob, record
from fedpeft.engines.flower.nodes import Admit, Nodes, Said
from fedpeft.engines.flower.sites import CLIENTS, engine_for
from fedpeft.errors import WireError
from fedpeft.wire.frames import Closed, Frame, connected, receive, send

TRAINER: Final = "trainer"
"""In a node's settings, the path of its trainer's socket."""

client_app = ClientApp()


@client_app.query()
def about(message: Message, context: Context) -> Message:
    """Answer the question what the site has for a run."""
    try:
        to = _to(message)
        said = _asked(context, Frame({"kind": "about", "config": to.get("config")}))
    except WireError as error:
        return Message(Error(FAILED, str(error)), reply_to=message)
    header = {"partition-id": said.header["client"], **said.header}
    header.pop("trains", None)  # for a connector that says it
    return Message(RecordDict({"node": ConfigRecord(header)}), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Pass a request to the trainer, and its reply back."""
    try:
        frame = Frame({"kind": "handle", **_to(message)}, blob(message.content, "request"))
        reply = _asked(context, frame)
    except WireError as error:
        return Message(Error(FAILED, str(error)), reply_to=message)
    return Message(RecordDict({"answer": record(reply.body)}), reply_to=message)


def _to(message: Message) -> Mapping[str, object]:
    """Return who is asked for what; WireError where a message does not say."""
    to = message.content.get("to")
    if not isinstance(to, ConfigRecord):
        raise WireError("the message does not say for whom it is")
    return dict(to)


def _asked(context: Context, frame: Frame) -> Frame:
    """Return the trainer's answer; WireError with words that the server may read."""
    try:
        connection: socket.socket = connected(Path(str(context.node_config[TRAINER])))
        with connection:
            send(connection, frame)
            answer = receive(connection)
    except (Closed, KeyError) as error:
        raise WireError("the site's trainer does not answer") from error
    if "error" in answer.header:
        raise WireError(str(answer.header["error"]))
    return answer


@final
@dataclass(frozen=True)
class StockSites:
    """The sites behind a grid of Flower's: they are known by what they say alone."""

    grid: Grid

    def number_of(self, node: int, said: Said) -> int:
        """Return the client's number that a node says it has; WireError where it says none."""
        del node
        number = said.get("partition-id")
        if not isinstance(number, int):
            raise WireError("it does not say which client it is")
        return number

    def engine(
        self,
        question: Mapping[str, str],
        admit: Admit,
        on_fault: Callable[[str], None],
        deadline: float,
        window: int,
    ) -> FlowerEngine:
        """Return an engine for the sites, none of which has been asked yet; see ``Sites``."""
        about = ConfigRecord(dict(question))
        nodes = Nodes(self.grid, CLIENTS, about, admit, on_fault)
        return engine_for(self.grid, nodes, question["config"], deadline, window)


def make_server_app(serve: Callable[[StockSites, Mapping[str, object]], None]) -> ServerApp:
    """Return the app of the server: ``serve`` gets its sites, and the settings of ``flwr run``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(StockSites(grid), dict(context.run_config))

    return app
