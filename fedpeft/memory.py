"""What clients keep between rounds: bytes by client and by the round that wrote them."""

from typing import final

from fedpeft.types import NEVER, WireError


class Forgotten(WireError):
    """A client lacks the memory that a request assumes; the next request has to assume none."""


@final
class Memories:
    """The memories of the clients of one process.

    A reply may be lost after its client has stored a new memory, and the server then goes on assuming the old one. So a
    client keeps two versions: the newest and the one that it was started from.
    """

    def __init__(self) -> None:
        self._versions: dict[int, dict[int, bytes]] = {}

    def get(self, client: int, version: int) -> bytes:
        """Return the memory of ``client`` as of round ``version``, empty for ``NEVER``.

        Forgotten where it is not here.
        """
        if version == NEVER:
            return b""
        own = self._versions.get(client, {})
        if version not in own:
            others = f"only of {sorted(own) or 'none'}"
            raise Forgotten(f"client {client} holds no memory of round {version}, {others}")
        return own[version]

    def holds(self, client: int, version: int) -> bool:
        """Return whether that version of the client's memory is here."""
        return version in self._versions.get(client, {})

    def put(self, client: int, version: int, blob: bytes, assumed: int = NEVER) -> None:
        """Store a new memory and forget all others but the ``assumed`` one, from which it was made."""
        own = self._versions.get(client, {})
        self._versions[client] = {v: b for v, b in own.items() if v == assumed} | {version: blob}
