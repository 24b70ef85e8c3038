"""What clients keep between rounds: bytes by client and by version (see ``wire/versions.py``)."""

from typing import final

from fedpeft.errors import Forgotten
from fedpeft.types import NO_MEMORY
from fedpeft.wire.versions import written


@final
class Memories:
    """The memories of the clients of one process.

    A reply may be lost after its client has stored a new memory, and the server then goes on assuming the old one. So a
    client keeps two versions: the newest and the one that it was started from.
    """

    def __init__(self) -> None:
        self._versions: dict[int, dict[int, bytes]] = {}

    def get(self, client: int, version: int) -> bytes:
        """Return a memory of ``client``, empty for ``NO_MEMORY``; Forgotten where it is not here."""
        if version == NO_MEMORY:
            return b""
        own = self._versions.get(client, {})
        if version not in own:
            here = sorted(written(held) for held in own)
            lacks = f"holds no memory of round {written(version)}, only of {here or 'none'}"
            raise Forgotten(f"client {client} {lacks}")
        return own[version]

    def holds(self, client: int, version: int) -> bool:
        """Return whether that version of the client's memory is here."""
        return version in self._versions.get(client, {})

    def put(self, client: int, version: int, blob: bytes, assumed: int = NO_MEMORY) -> None:
        """Store a new memory and forget all others but the ``assumed`` one, from which it was made."""
        own = self._versions.get(client, {})
        self._versions[client] = {v: b for v, b in own.items() if v == assumed} | {version: blob}
