"""Flower carries the bytes: an engine for the server.

A message holds the request as one raw ``uint8`` array, and names the client, the configuration and
the version of the memory that it is for. The answer holds the reply as one raw array.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, final

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.engines.flower.grid import Unavailable, blob, pull, push, record
from fedpeft.engines.flower.nodes import Nodes
from fedpeft.errors import BadInput, WireError
from fedpeft.ledger import LATE
from fedpeft.types import Client, Lost, Reply

MARGIN: Final = 5.0
"""Seconds for which Flower keeps a request beyond our patience."""
LOOK: Final = 1.0
"""Seconds between two looks for nodes that are away."""


@final
@dataclass(frozen=True)
class Pending:
    """A client that has until ``deadline`` to answer, in seconds of the monotonic clock.

    ``until``: how long its node may be away, before it counts as lost; None as long as it has not
    been. ``session``: that of its node when it was asked.
    """

    client: Client
    deadline: float
    until: float | None = None
    session: str | None = None


@final
@dataclass
class _Round:
    """Who has been asked in an exchange and has not answered.

    ``asked``: id of the message -> who was asked. ``away``: clients whose nodes have left, or have
    not come yet, with the reason. ``looked``: when nodes were looked for.
    """

    request: Callable[[Client], bytes]
    asked: dict[str, Pending] = field(default_factory=dict)
    away: list[tuple[Pending, str]] = field(default_factory=list)
    looked: float = 0.0

    def __len__(self) -> int:
        return len(self.asked) + len(self.away)


@final
@dataclass(frozen=True)
class FlowerEngine:
    """An engine whose clients sit behind a Flower grid.

    ``ended``: set when the grid is gone. ``nodes``: the node of each client. ``config``: what a
    node builds its worker from. ``patience``: seconds until a request is lost. ``window``: requests
    under way at once, which bounds memory. ``poll``: seconds between two looks for answers (1 or
    more over a network). ``away``: seconds for which a node that has left may come back, and is
    then asked again, counted from when it first was away; 0 where it is lost at once.
    """

    grid: Grid
    ended: threading.Event
    nodes: Nodes
    config: str
    patience: float = 3600.0
    window: int = 2
    poll: float = 0.02
    away: float = 0.0

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Send every client its request, ``window`` at a time, and yield the answers as they come.

        A client is lost, with the reason, if it has no node, if Flower refuses its request, or if
        no readable answer comes within ``patience``; later and second answers are ignored. Nodes
        that have joined since the last exchange are asked which client they are, and take part from
        the next exchange on. RuntimeError where the grid is gone; the grid's own error where it is
        out of reach.
        """
        self.nodes.look()
        under_way = _Round(request, looked=time.monotonic())
        # Refilled one by one: a slow client holds up one slot only.
        for client in clients:
            yield from self._ask(Pending(client, time.monotonic() + self.patience), under_way)
            while len(under_way) >= self.window:
                yield from self._look(under_way)
        while len(under_way):
            yield from self._look(under_way)

    def _ask(self, pending: Pending, under_way: _Round) -> Iterator[Lost]:
        """Send a client its request and note it as asked, or as away, or yield it as lost."""
        client = pending.client
        node = self.nodes.get(client.id)
        if node is None:
            yield from self._put_off(pending, under_way, "no node has joined for this client")
            return
        left = pending.deadline - time.monotonic()
        message = self._message(client, node, under_way.request(client), left)
        try:
            sent = push(self.grid, message)
            under_way.asked[sent] = replace(pending, session=self.nodes.session(client.id))
        except WireError as error:
            yield from self._put_off(pending, under_way, str(error))

    def _put_off(self, pending: Pending, under_way: _Round, reason: str) -> Iterator[Lost]:
        """Note a client as away, or yield it as lost where it has been away for too long."""
        now = time.monotonic()
        until = now + self.away if pending.until is None else pending.until
        if now < min(until, pending.deadline):
            under_way.away.append((replace(pending, until=until), reason))
        else:
            yield Lost(pending.client, reason)

    def _message(self, client: Client, node: int, request: bytes, seconds: float) -> Message:
        """Return the message to ``node`` that holds a request and names its client."""
        # Past our patience the answer is of no use, and Flower need not keep the message either. It
        # keeps it a little longer, so that it is never the first to say that the time is over.
        to = ConfigRecord({"config": self.config, "client": client.id, "memory": client.memory})
        content = RecordDict({"to": to, "request": record(request)})
        return Message(content, node, MessageType.TRAIN, ttl=max(1.0, seconds + MARGIN))

    def _look(self, under_way: _Round) -> Iterator[Reply | Lost]:
        """Wait a moment; yield the outcomes so far, and take their requests off ``under_way``."""
        # The event doubles as the clock: the wait ends early when the simulation does.
        if self.ended.wait(self.poll):
            raise RuntimeError("the Flower simulation ended while clients were at work")
        yield from self._ask_again(under_way)
        for sent, pending in list(under_way.asked.items()):  # a copy, as entries are removed
            try:
                content = pull(self.grid, sent)
                reply = None if content is None else blob(content, "answer")
                if reply is None and self._has_restarted(pending):
                    raise Unavailable("its node has left and come back")
                # The clock is read after the look: an answer that is there is never too late.
                if reply is None and time.monotonic() >= pending.deadline:
                    raise WireError(f"{LATE} {self.patience:g} s")
            except Unavailable as error:
                del under_way.asked[sent]
                yield from self._put_off(pending, under_way, str(error))
                continue
            except WireError as error:
                del under_way.asked[sent]
                yield Lost(pending.client, str(error))
                continue
            if reply is not None:
                del under_way.asked[sent]
                yield Reply(pending.client, reply)

    def _has_restarted(self, pending: Pending) -> bool:
        """Return whether a client's node is in another session than when it was asked."""
        # Flower delivers no message twice, and tells of a lost one only when its time is over.
        now = self.nodes.session(pending.client.id)
        return self.away > 0 and now is not None and now != pending.session

    def _ask_again(self, under_way: _Round) -> Iterator[Lost]:
        """Every ``LOOK`` seconds, look for the nodes that are away, and ask those that are back."""
        if self.away <= 0 or time.monotonic() - under_way.looked < LOOK:
            return
        self.nodes.look()
        under_way.looked = time.monotonic()
        waiting, under_way.away = under_way.away, []
        online = set(self.nodes.online())
        for pending, reason in waiting:
            if pending.client.id in online:
                yield from self._ask(pending, under_way)
            else:
                yield from self._put_off(pending, under_way, reason)


def connect(
    grid: Grid,
    ended: threading.Event,
    clients: int,
    config: str,
    joining: float = 300.0,
) -> FlowerEngine:
    """Return the engine once all ``clients`` have a node, or after ``joining`` seconds.

    A client that is missing then neither holds up the run nor ends it: its replies are lost, each
    with a line in the ledger, until its node joins after all. ``min_replies`` decides whether the
    other clients are enough. Only a run without any node ends with BadInput: it could record
    nothing but losses.
    """
    nodes = Nodes(grid, clients)
    deadline = time.monotonic() + joining
    nodes.look()
    while len(nodes) < clients and time.monotonic() < deadline:
        if ended.wait(0.05):
            raise RuntimeError(f"the Flower simulation ended with {len(nodes)} of {clients} nodes")
        nodes.look()
    if len(nodes) == 0:
        raise BadInput(
            f"engine.kind = 'flower': no node joined within {joining:g} s; "
            "start the nodes first, each with the partition-id of its client"
        )
    return FlowerEngine(grid, ended, nodes, config)
