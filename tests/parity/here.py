"""A Flower grid in this process, whose nodes may misbehave; it takes the place of a simulation."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Never, final

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # flwr reads it once, when it is imported

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.engines.flower.app import client_app
from tests.tiny import bert, small, worker

Answering = Callable[[Message], list[Message]]
"""What becomes of an answer on its way: nothing, another one, several."""


@final
@dataclass
class Node:
    """A node; in its context are what it says of its partition and the state that its app keeps."""

    context: Context

    @classmethod
    def holding(cls, partition: object) -> "Node":
        """Return a fresh node."""
        about: Any = {"partition-id": partition}
        return cls(Context(1, 1, about, RecordDict(), {}))


@final
@dataclass
class Here(Grid):
    """A grid whose nodes are in this process, and answer as soon as they are asked.

    Something may happen to messages of the type ``spoilt``. By node, ``spoil``: what becomes of
    the answer; ``refused``: what Flower says instead of an id; ``torn``: nodes whose answers Flower
    cannot read. ``gone``: whether the grid is out of reach. ``asked``: node and type of what was
    pushed.
    """

    nodes: dict[int, Node]
    spoilt: str = MessageType.TRAIN
    spoil: dict[int, Answering] = field(default_factory=dict)
    refused: dict[int, Callable[[], list[str | None]]] = field(default_factory=dict)
    torn: set[int] = field(default_factory=set)
    gone: bool = False
    asked: list[tuple[int, str]] = field(default_factory=list)
    _answers: dict[str, list[Message]] = field(default_factory=dict)
    _torn: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._app = client_app(lambda _: worker(small("lora"), bert()))

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are there."""
        self._reach()
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Any:
        """Let a node answer one message at once; return its id, or what is said if refused."""
        self._reach()
        [message] = messages
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        self.asked.append((node, kind))
        spoilt = kind == self.spoilt
        if spoilt and node in self.refused:
            return self.refused[node]()
        number = f"message {len(self.asked)}"
        message.metadata.__dict__["_message_id"] = number
        answer = self._app(message, self.nodes[node].context)
        self._answers[number] = [answer]
        if spoilt and node in self.spoil:
            self._answers[number] = self.spoil[node](answer)
        if spoilt and node in self.torn:
            self._torn.add(number)
        return [number]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that have come to these messages, each once."""
        self._reach()
        found: list[Message] = []
        for number in message_ids:
            found += self._answers.pop(number, [])
            if number in self._torn:
                raise ValueError("Unexpected set of `children`.")
        return found

    def _reach(self) -> None:
        if self.gone:
            raise ConnectionError("nobody there")

    def set_run(self, run: object) -> Never:
        """Do nothing: it is not asked for."""
        raise NotImplementedError

    @property
    def run(self) -> Never:
        """Do nothing: it is not asked for."""
        raise NotImplementedError

    def create_message(self, *_: object, **__: object) -> Never:
        """Do nothing: it is not asked for."""
        raise NotImplementedError

    def send_and_receive(self, *_: object, **__: object) -> Never:
        """Do nothing: it is not asked for."""
        raise NotImplementedError


def grid(partitions: Sequence[object] = (0, 1, 2)) -> Here:
    """Return a grid with a node for each of ``partitions``, numbered from 100."""
    return Here({100 + number: Node.holding(held) for number, held in enumerate(partitions)})
