"""The seam of wrappers: settings that turn a method into another method."""

from typing import ClassVar, Protocol

from fedpeft.types import Method


class Wrapper(Protocol):
    """The settings of a wrapper: a frozen dataclass whose fields are those of a ``[[wrap]]`` table."""

    paper: ClassVar[str]

    def around(self, method: Method, owner: str) -> Method:
        """Return a method that does what ``method`` does, and the wrapper's part.

        What the wrapper keeps on the server is kept in the slice of ``State.server`` that belongs
        to ``owner``, a name of its own within the run (see ``State.slice_of``); the method inside
        never sees it.
        """
        ...
