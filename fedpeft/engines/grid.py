"""What crosses a Flower grid: messages that hold raw arrays, one by one; and who plays whom.

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
    """Return a record that holds ``content`` as its one array."""
    return ArrayRecord({"blob": Array("uint8", (len(content),), BYTES, content)})


def arrays(records: RecordDict, name: str) -> ArrayRecord:
    """Return the arrays of record ``name``, none where it is missing.

    WireError unless all are of the form that ``record`` gives them.
    """
    # Not records.array_records: a cycle in it keeps the blobs until the next garbage collection.
    found = records.get(name, ArrayRecord())
    if not isinstance(found, ArrayRecord):
        raise WireError(f"record {name!r} of a Flower message should hold arrays")
    for array in found.values():
        form = (array.stype, array.dtype, tuple(array.shape))
        due = (BYTES, "uint8", (len(array.data),))
        if form != due:
            raise WireError(f"record {name!r} of a Flower message should hold flat uint8 {BYTES}")
    return found


def blob(records: RecordDict, name: str) -> bytes:
    """Return what ``record`` put into record ``name``; WireError where it is missing or other."""
    found = arrays(records, name)
    if found.keys() != {"blob"}:
        raise WireError(f"record {name!r} of a Flower message should hold one array, 'blob'")
    return found["blob"].data


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


def _line(said: object) -> str:
    """Return what was said elsewhere as one line that a ledger and a console can bear."""
    text = f"{type(said).__name__}: {said}" if isinstance(said, Exception) else str(said)
    shown = " ".join(text[:REASON].split())
    return "".join(character if character.isprintable() else "?" for character in shown)


@final
class Nodes:
    """Which node plays which client: every node that joins is asked which partition it holds.

    A node that names no partition of this federation, or one that another node has that is still
    there, plays nobody.
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
                self._seat(node, _partition(content))
            except WireError:
                pass
            del self._asked[question]

    def _seat(self, node: int, client: int) -> None:
        taken = self._node_of.get(client) in self._present
        if client in self._clients and not taken:
            self._node_of[client] = node


def _partition(content: RecordDict) -> int:
    about = content.get("node")
    partition = about.get("partition-id") if isinstance(about, ConfigRecord) else None
    if not isinstance(partition, int):
        raise WireError("the node does not say which partition it holds")
    return partition
