"""Replies in the order in which their clients were asked, within bounded memory."""

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from os import SEEK_END
from typing import IO, final

from fedpeft.errors import BadInput
from fedpeft.types import Client, Lost, Reply

HELD = 256 * 2**20
"""Bytes of replies before their turn that are held in memory."""


def in_order(
    asked: Sequence[Client],
    outcomes: Iterable[Reply | Lost],
    most: int = HELD,
) -> Iterator[Reply | Lost]:
    """Yield ``outcomes`` in the order of ``asked``; a client that never answers is lost.

    Replies that come before their turn wait in memory up to ``most`` bytes, beyond that in a
    temporary file. Replies of clients that were not asked, and second replies, are ignored.
    BadInput where the disk is full.

    >>> first, second = Client(0), Client(1)
    >>> replies = [Reply(second, b"early"), Reply(first, b"late")]
    >>> [reply.blob for reply in in_order([first, second], replies)]
    [b'late', b'early']
    """
    waiting = deque(asked)
    unanswered = {client.id for client in asked}
    with tempfile.SpooledTemporaryFile(most) as file:  # in memory until it is longer than that
        early = _Early(file)
        for outcome in outcomes:
            client = outcome.client.id
            if client not in unanswered:
                continue
            unanswered.remove(client)
            if client != waiting[0].id:
                early.put(outcome)
                continue
            waiting.popleft()
            yield outcome
            # Replies that came earlier and waited for this one alone.
            while waiting and waiting[0].id in early:
                yield early.take(waiting.popleft().id)
        # The engine has nothing more to say: whoever is missing by now never answers.
        for silent in waiting:
            yield early.take(silent.id) if silent.id in early else Lost(silent, "no answer")


@final
class _Early:
    """Outcomes before their turn, by client; their bytes are in ``file``."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        # Client -> the outcome without its bytes, where these begin in the file, how many they are.
        self._held: dict[int, tuple[Reply | Lost, int, int]] = {}

    def __contains__(self, client: int) -> bool:
        return client in self._held

    def put(self, outcome: Reply | Lost) -> None:
        """Hold back an outcome."""
        try:
            if not self._held:  # nothing in the file is needed any more
                self._file.seek(0)
                self._file.truncate()
            begin = self._file.seek(0, SEEK_END)
            self._file.write(outcome.blob)
        except OSError as error:
            where = f"{tempfile.gettempdir()}: has no room for replies before their turn"
            raise BadInput(f"{where} ({error.strerror}); make some, or set TMPDIR") from error
        self._held[outcome.client.id] = replace(outcome, blob=b""), begin, len(outcome.blob)

    def take(self, client: int) -> Reply | Lost:
        """Return the outcome of ``client`` as it was, and hold it no more."""
        outcome, begin, size = self._held.pop(client)
        # The bytes stay in the file until `put` finds that nothing in it is waited for.
        self._file.seek(begin)
        return replace(outcome, blob=self._file.read(size))
