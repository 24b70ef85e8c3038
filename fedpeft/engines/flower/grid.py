"""What crosses a Flower grid: messages that hold raw arrays, one by one.

Nodes are not trusted: whatever one of them sends is at most a WireError about that one message.
"""

import contextlib
from collections.abc import Iterable
from typing import Final

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedpeft.errors import WireError

BYTES: Final = "fedpeft.bytes"
"""Our stype: the data is a message of ``wire``, not a saved NumPy array."""
FAILED: Final = 2
"""Flower's code for an app that raised."""
REASON: Final = 300
"""Characters of a node's error text that reach the ledger: nodes could send megabytes."""

COMPLETING: Final = 3
"""How often a message is sent once more, of which not all parts have certainly arrived."""
GONE: Final = frozenset({3, 5})
"""Flower's codes where a message was lost, or its node has left, with nobody at fault."""


class Unavailable(WireError):
    """A node has left, or its message was lost on the way: it may be asked again."""


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
    """Return the bytes that ``record`` put into record ``name``; WireError for anything else."""
    content = arrays(records, name)
    if content.keys() != {"blob"}:
        raise WireError(f"record {name!r} of a Flower message should hold one array, 'blob'")
    return content["blob"].data


def push(grid: Grid, message: Message) -> str:
    """Send one message and return its id; WireError where Flower refuses it.

    Errors of a ``grid`` that is out of reach are not caught: they concern no single message.
    """
    try:
        # One message, one id; a refused message has an empty id or none.
        sent = next(iter(_pushed(grid, message)), None)
    except Exception as error:
        grid.get_node_ids()  # raises, too, where the grid is out of reach
        raise WireError(f"Flower refused the message ({_line(error)})") from error
    if not sent:
        raise WireError("Flower refused the message")
    return sent


def _pushed(grid: Grid, message: Message) -> Iterable[str]:
    """Send one message whole, and return Flower's ids.

    A SuperLink that is killed between taking a part and saying so refuses that part when it comes
    again, and the node waits for the others. The same message, sent again, is completed.
    """
    for _ in range(COMPLETING):
        with contextlib.suppress(ObjectPushError):
            return grid.push_messages([message])
    return grid.push_messages([message])


def pull(grid: Grid, sent: str) -> RecordDict | None:
    """Return the answer to the message with id ``sent``, None if there is none yet.

    WireError for an error instead of an answer, and for an answer that cannot be read. Errors of a
    ``grid`` that is out of reach are not caught.
    """
    # One by one: Flower raises at a message that it cannot read, and all other messages of the
    # same call are then lost.
    try:
        answer = _first_answer(grid.pull_messages([sent]), sent)
    except Exception as error:
        grid.get_node_ids()  # raises, too, where the grid is out of reach
        raise WireError(f"the answer cannot be read ({_line(error)})") from error
    if answer is None:
        return None
    if answer.has_error():
        code = answer.error.code
        kind = Unavailable if code in GONE else WireError
        raise kind(_line(answer.error.reason or "") or f"Flower's error {code}")
    if not answer.has_content():
        raise WireError("the answer is empty")
    return answer.content


def _first_answer(messages: Iterable[Message], sent: str) -> Message | None:
    """Return the first message that answers ``sent``; a second one is a duplicate."""
    for message in messages:
        if message.metadata.reply_to_message_id == sent:
            return message
    return None


def _line(reason: object) -> str:
    """Return somebody else's reason as one printable line, for the ledger and the console."""
    text = str(reason)
    if isinstance(reason, Exception):
        text = f"{type(reason).__name__}: {reason}"
    one_line = " ".join(text[:REASON].split())
    return "".join(character if character.isprintable() else "?" for character in one_line)
