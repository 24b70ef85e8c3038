"""Which of Flower's nodes is which client."""

from collections.abc import Callable, Mapping
from typing import final

from flwr.app import ConfigRecord, ConfigRecordValues, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.engines.flower.grid import Unavailable, pull, push
from fedpeft.errors import WireError

Said = Mapping[str, ConfigRecordValues]
"""What a node says of itself."""
Admit = Callable[[int, Said], int]
"""Returns which client a node is, told its number and what it says; WireError where it is none."""


def _partition(_node: int, said: Said) -> int:
    """Return the partition that a node says it holds; WireError where it names none."""
    partition = said.get("partition-id")
    if not isinstance(partition, int):
        raise WireError("the node does not say which partition it holds")
    return partition


@final
class Nodes:
    """Which node is which client: every node that joins is asked which partition it holds.

    A node is no client if it names no partition of this federation, or one that another node holds
    which is still connected. ``question``: what nodes are asked. ``admit``: makes of an answer a
    client. ``on_fault`` is told why a node is none. ``sessions``: returns which nodes are there,
    each with what changes when it leaves and comes back. ``on_look`` is called after every look.
    """

    def __init__(
        self,
        grid: Grid,
        clients: int,
        question: ConfigRecord | None = None,
        admit: Admit = _partition,
        on_fault: Callable[[str], None] = lambda _: None,
        sessions: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        self.question = question
        self.on_look: Callable[[], None] = lambda: None
        self._grid = grid
        self._look_up = sessions or self._ids
        self._clients = range(clients)
        self._admit = admit
        self._on_fault = on_fault
        self._present: Mapping[int, str] = {}  # node -> its session
        self._asked: dict[str, int] = {}  # id of the question -> the node that was asked
        self._unheard: set[int] = set()  # nodes whose question, or whose answer, was lost
        self._node_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._node_of)

    def get(self, client: int) -> int | None:
        """Return the node of ``client``, None where none has joined."""
        return self._node_of.get(client)

    def online(self) -> list[int]:
        """Return the clients whose nodes were there at the last look, in order."""
        return sorted(client for client, node in self._node_of.items() if node in self._present)

    def session(self, client: int) -> str | None:
        """Return the session of the client's node as the last look saw it; None where it is not."""
        node = self._node_of.get(client)
        return None if node is None else self._present.get(node)

    def _ids(self) -> Mapping[int, str]:
        return dict.fromkeys(self._grid.get_node_ids(), "")

    def look(self) -> None:
        """Ask the nodes that have joined since the last look, and read the answers so far."""
        # 1. Ask newcomers. One that left and came back is asked again.
        before, self._present = self._present, self._look_up()
        new = {node for node, _ in self._present.items() - before.items()}
        lost, self._unheard = self._unheard & self._present.keys(), set()
        for node in sorted(new | lost):
            try:
                self._asked[push(self._grid, self._message(node))] = node
            except WireError:
                self._unheard.add(node)
        # 2. Read answers. A node that answers with nonsense is asked no more: it stays no client.
        for question, node in list(self._asked.items()):
            try:
                content = pull(self._grid, question)
                if content is None:
                    continue
                self._assign(node, self._admit(node, _said(content)))
            except Unavailable:
                self._unheard.add(node)
            except WireError as error:
                self._on_fault(str(error))
            del self._asked[question]
        self.on_look()

    def _message(self, node: int) -> Message:
        """Return the question to ``node``."""
        content = RecordDict() if self.question is None else RecordDict({"to": self.question})
        return Message(content, node, MessageType.QUERY)

    def _assign(self, node: int, client: int) -> None:
        """Make ``node`` the node of ``client``, if that client exists and has no other node."""
        # A node that has left holds its partition no more: whoever follows may have it.
        taken = self._node_of.get(client) in self._present
        if client in self._clients and not taken:
            self._node_of[client] = node


def _said(content: RecordDict) -> Said:
    """Return what a node says of itself; nothing where it says nothing that can be read."""
    about = content.get("node")
    return about if isinstance(about, ConfigRecord) else {}
