"""The last reply of a site, kept on disk: a request that comes again is not worked on again.

A reply may be lost on its way, and Flower delivers none twice. A server that resumes, or plays a
round again, then sends the same request once more.
"""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, final

from fedpeft.wire.durable import write

FILE: Final = "last.reply"


@final
class LastReply:
    """The last reply that was sent, by what was asked."""

    def __init__(self, state: Path) -> None:
        self._path = state / FILE

    @staticmethod
    def key(to: Any, request: bytes) -> str:
        """Return what tells requests apart: to whom, for which run and round, and all their bytes.

        >>> LastReply.key({"client": 1}, b"abc") == LastReply.key({"client": 1}, b"abd")
        False
        """
        about = json.dumps(to, sort_keys=True, default=repr).encode()
        return blake2b(about + b"\0" + request, digest_size=16).hexdigest()

    def get(self, key: str) -> bytes | None:
        """Return the reply to the request of ``key``; None where it was not the last one."""
        try:
            content = self._path.read_bytes()
        except OSError:
            return None
        length = len(key.encode())
        return content[length:] if content[:length] == key.encode() else None

    def put(self, key: str, reply: bytes) -> None:
        """Keep a reply instead of the one before; OSError as the disk gives it."""
        write(self._path, key.encode() + reply, private=True)
