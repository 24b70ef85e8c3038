"""What a site remembers between rounds, on its disk: a folder for each run, a file a version."""

import re
import shutil
from pathlib import Path
from typing import Final, final

from fedpeft.deployment.offer import Refusal
from fedpeft.federation.memory import still_needed, used
from fedpeft.types import NO_MEMORY
from fedpeft.wire.durable import write
from fedpeft.wire.messages import is_whole

FOLDER: Final = "memories"
_RUN: Final = re.compile(r"[0-9a-f]{8,64}")


@final
class DiskMemories:
    """The memories of one client, of the last ``most`` runs.

    As in ``federation.memory`` a client keeps the newest version, and those that ``still_needed``
    names, in case its reply is lost.
    """

    def __init__(self, state: Path, client: int, most: int) -> None:
        self._folder = state / FOLDER
        self._client = client
        self._most = most

    def get(self, run: str, version: int) -> bytes | None:
        """Return a memory, empty for ``NO_MEMORY``; None where it is missing, or damaged."""
        if version == NO_MEMORY:
            return b""
        try:
            content = self._path(run, version).read_bytes()
        except FileNotFoundError:
            return None
        # The server sends what is missing anew; with a damaged one it would try for ever.
        return content if is_whole(content) else None

    def put(self, run: str, version: int, content: bytes, assumed: int) -> None:
        """Store a new memory of the run; forget those that it makes useless."""
        path = self._path(run, version)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        # Under secure aggregation it holds the secrets of a round.
        write(path, content, private=True)
        held: list[int] = []
        for other in path.parent.glob(f"client-{self._client}-*.memory"):
            held.append(int(other.stem.rpartition("-")[2]))
        kept = {path}
        for needed in still_needed(held, assumed, version):
            older = self._path(run, needed)
            kept.add(older)
            before = older.read_bytes()
            if (after := used(before)) != before:
                write(older, after, private=True)
        for other in path.parent.glob(f"client-{self._client}-*.memory*"):
            if other not in kept:
                other.unlink(missing_ok=True)
        self._forget_old_runs(path.parent)

    def _path(self, run: str, version: int) -> Path:
        # The name comes from the server, and must not lead out of the folder.
        if not _RUN.fullmatch(run):
            raise Refusal("the run's name is none")
        return self._folder / run / f"client-{self._client}-{version}.memory"

    def _forget_old_runs(self, current: Path) -> None:
        """Remove the folders of all but the latest runs."""
        runs = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in runs[: -self._most]:
            if old != current:
                shutil.rmtree(old, ignore_errors=True)
