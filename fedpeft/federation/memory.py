"""What clients keep between rounds: bytes by client and by version (see ``wire/versions.py``)."""

from collections.abc import Iterable
from typing import final

from fedpeft.errors import Forgotten
from fedpeft.types import NO_MEMORY
from fedpeft.wire.messages import decode, encode
from fedpeft.wire.versions import ONCE, lasting, written


@final
class Memories:
    """The memories of the clients of one process.

    A reply may be lost after its client has stored a new memory; the server then still assumes the
    old one. So a client keeps the newest version and those that ``still_needed`` names.

    >>> memories = Memories()
    >>> memories.put(3, version=0, blob=b"first")
    >>> memories.put(3, version=1, blob=b"second", assumed=0)
    >>> memories.get(3, version=0), memories.get(3, version=1)
    (b'first', b'second')

    ``elsewhere``: whether the clients keep them for good on machines of their own. Then nothing is
    held here, and a run that is resumed goes on with what they have.
    """

    def __init__(self, *, elsewhere: bool = False) -> None:
        self.elsewhere = elsewhere
        self._versions: dict[int, dict[int, bytes]] = {}  # client -> version -> memory

    def get(self, client: int, version: int) -> bytes:
        """Return a memory of ``client``, empty for ``NO_MEMORY``; Forgotten where it is missing."""
        if version == NO_MEMORY:
            return b""
        versions = self._versions.get(client, {})
        if version not in versions:
            rounds = sorted(written(held_version) for held_version in versions)
            lacks = f"holds no memory of round {written(version)}, only of {rounds or 'none'}"
            raise Forgotten(f"client {client} {lacks}")
        return versions[version]

    def holds(self, client: int, version: int) -> bool:
        """Return whether that version of the client's memory is here."""
        return version in self._versions.get(client, {})

    def put(self, client: int, version: int, blob: bytes, assumed: int = NO_MEMORY) -> None:
        """Store a new memory, made from the ``assumed`` one; forget those that it makes useless."""
        before = self._versions.get(client, {})
        versions: dict[int, bytes] = {}
        for kept in still_needed(before, assumed, version):
            versions[kept] = used(before[kept])
        versions[version] = blob
        self._versions[client] = versions


def used(memory: bytes) -> bytes:
    """Return a memory without what was for one exchange alone, now that there is a newer one."""
    if f'"{ONCE}'.encode() not in memory:  # no name of its header begins so: nothing to do
        return memory
    return encode(lasting(decode(memory)))


def still_needed(held: Iterable[int], assumed: int, version: int) -> list[int]:
    """Return which of the ``held`` versions a server may still assume once ``version`` is there.

    That is the ``assumed`` one, from which it was made. Where both are of one round, so that round
    has several phases, it is also the newest one of an earlier round: a round without enough
    replies is undone as a whole.

    >>> still_needed([3, 4], assumed=4, version=5), still_needed([4, 5], assumed=5, version=5)
    ([4], [4, 5])
    """
    held = sorted(held)
    needed = {assumed}
    if written(assumed) == written(version):
        needed.add(max((one for one in held if written(one) < written(version)), default=assumed))
    return [one for one in held if one in needed]
