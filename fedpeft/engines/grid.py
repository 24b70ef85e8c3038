"""What crosses a Flower grid: messages that hold raw arrays, one by one; and whose node is whose.

Nodes are not trusted: whatever one of them sends is at most a WireError about that one message.
"""

import contextlib
from typing import Final, final

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.errors import WireError

BYTES: Final = "fedpeft.bytes"
"""Our stype: the data is a message of ``wire``, not a saved NumPy array."""
REASON: Final = 300
"""Characters that are taken down of what a node gives as its reason."""


def record(content: bytes) -> ArrayRecord:
    """Return a record that holds ``content`` as its one array.

    >>> blob(RecordDict({"request": record(b"abc")}), "request")
    b'abc'
    """
    return ArrayRecord({"blob": Array("uint8", (len(content),), BYTES, content)})


def arrays(records: RecordDict, name: str) -> ArrayRecord:
    """Return the arrays of record ``name``, none where it is missing.

    WireError unless all are of the form that ``record`` gives them.
    """
    # Not records.array_records: a cycle in it keeps the blobs until the next garbage collection.
    content = records.get(name, ArrayRecord())
    if not isinstance(content, ArrayRecord):
        raise WireError(f"record {name!r} of a Flower message should hold arrays")
    for array in content.values():
        form = (array.stype, array.dtype, tuple(array.shape))
        expected = (BYTES, "uint8", (len(array.data),))
        if form != expected:
            raise WireError(f"record {name!r} of a Flower message should hold flat uint8 {BYTES}")
    return content


def blob(records: RecordDict, name: str) -> bytes:
    """Return what ``record`` put into record ``name``; WireError where it is missing or other."""
    content = arrays(records, name)
    if content.keys() != {"blob"}:
        raise WireError(f"record {name!r} of a Flower message should hold one array, 'blob'")
    return content["blob"].data


def push(grid: Grid, message: Message) -> str:
    """Send one message and return its id; WireError where Flower refuses it.

    What ``grid`` raises where it is out of reach is not caught: that is nobody's message.
    """
    try:
        sent = next(iter(grid.push_messages([message])), None)
    except Exception as error:
        grid.get_node_ids()  # raises, too, where the grid is out of reach
        raise WireError(f"Flower refused the message ({_line(error)})") from error
    if not sent:
        raise WireError("Flower refused the message")
    return sent


def pull(grid: Grid, sent: str) -> RecordDict | None:
    """Return what was answered to the message with id ``sent``, None if nothing was yet.

    WireError for an error instead of an answer, and for one that cannot be read. What ``grid``
    raises where it is out of reach is not caught.
    """
    # One by one: Flower's own reader raises at a message that it cannot make out, and the others
    # that were asked for with it are gone.
    try:
        messages = [m for m in grid.pull_messages([sent]) if m.metadata.reply_to_message_id == sent]
    except Exception as error:
        grid.get_node_ids()  # raises, too, where the grid is out of reach
        raise WireError(f"the answer cannot be read ({_line(error)})") from error
    if not messages:
        return None
    answer = messages[0]  # a second one is a duplicate
    if answer.has_error():
        raise WireError(_line(answer.error.reason or "") or f"Flower's error {answer.error.code}")
    if not answer.has_content():
        raise WireError("the answer is empty")
    return answer.content


def _line(reason: object) -> str:
    """Return a reason that was given elsewhere as one line that a ledger and a console can bear."""
    text = str(reason)
    if isinstance(reason, Exception):
        text = f"{type(reason).__name__}: {reason}"
    one_line = " ".join(text[:REASON].split())
    return "".join(character if character.isprintable() else "?" for character in one_line)


@final
class Nodes:
    """Which node is which client: every node that joins is asked which partition it holds.

    A node that names no partition of this federation, or one that another node has that is still
    there, is no client.
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
        """Ask the nodes that have joined since the last look, and read what has been answered."""
        before, self._present = self._present, set(self._grid.get_node_ids())
        for node in sorted(self._present - before):  # one that left and came back is asked again
            with contextlib.suppress(WireError):
                self._asked[push(self._grid, Message(RecordDict(), node, MessageType.QUERY))] = node
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
        """Take ``node`` for ``client``, if there is such a client and no other node for it."""
        taken = self._node_of.get(client) in self._present
        if client in self._clients and not taken:
            self._node_of[client] = node


def _partition(content: RecordDict) -> int:
    """Return the partition that a node says it holds; WireError where it does not say so."""
    about = content.get("node")
    partition = about.get("partition-id") if isinstance(about, ConfigRecord) else None
    if not isinstance(partition, int):
        raise WireError("the node does not say which partition it holds")
    return partition
