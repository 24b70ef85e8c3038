"""Which of Flower's nodes is which client."""

import contextlib
from typing import final

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.engines.flower.grid import pull, push
from fedpeft.errors import WireError


@final
class Nodes:
    """Which node is which client: every node that joins is asked which partition it holds.

    A node is no client if it names no partition of this federation, or one that another node holds
    which is still connected.
    """

    def __init__(self, grid: Grid, clients: int) -> None:
        self._grid = grid
        self._clients = range(clients)
        self._present: set[int] = set()
        self._asked: dict[str, int] = {}  # id of the question -> the node that was asked
        self._node_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._node_of)

    def get(self, client: int) -> int | None:
        """Return the node of ``client``, None where none has joined."""
        return self._node_of.get(client)

    def look(self) -> None:
        """Ask the nodes that have joined since the last look, and read the answers so far."""
        # 1. Ask newcomers. One that left and came back is asked again.
        before, self._present = self._present, set(self._grid.get_node_ids())
        for node in sorted(self._present - before):
            with contextlib.suppress(WireError):
                self._asked[push(self._grid, Message(RecordDict(), node, MessageType.QUERY))] = node
        # 2. Read answers. A node that answers with nonsense is asked no more: it stays no client.
        for question, node in list(self._asked.items()):
            try:
                content = pull(self._grid, question)
                if content is None:
                    continue
                self._assign(node, _partition(content))
            except WireError:
                pass
            del self._asked[question]

    def _assign(self, node: int, client: int) -> None:
        """Make ``node`` the node of ``client``, if that client exists and has no other node."""
        # A node that has left holds its partition no more: whoever follows may have it.
        taken = self._node_of.get(client) in self._present
        if client in self._clients and not taken:
            self._node_of[client] = node


def _partition(content: RecordDict) -> int:
    """Return the partition that a node says it holds; WireError where it names none."""
    about = content.get("node")
    partition = about.get("partition-id") if isinstance(about, ConfigRecord) else None
    if not isinstance(partition, int):
        raise WireError("the node does not say which partition it holds")
    return partition
