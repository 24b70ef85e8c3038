"""The seam of wrappers: settings that turn a method into another method."""

from typing import ClassVar, Protocol, runtime_checkable

from fedpeft.privacy.accountant import Promise
from fedpeft.types import Method


class Wrapper(Protocol):
    """The settings of a wrapper: a frozen dataclass with the fields of a ``[[wrap]]`` table."""

    paper: ClassVar[str]

    def around(self, method: Method, owner: str) -> Method:
        """Return a method that does what ``method`` does, and the wrapper's part.

        ``owner``: a name that no other wrapper of the run has. The wrapper stores its server state
        in the slice of ``State.server`` under that name (see ``State.slice_of``). The method inside
        never sees that slice.
        """
        ...


@runtime_checkable
class NeedsReplies(Wrapper, Protocol):
    """A wrapper with which rounds of few replies change nothing."""

    @property
    def least(self) -> int:
        """Return the fewest replies of a round that changes anything."""
        ...


@runtime_checkable
class Prolonging(Wrapper, Protocol):
    """A wrapper whose rounds go on after the clients have trained.

    ``later``: the exchanges of a round in which they do not train.
    """

    later: ClassVar[int]


@runtime_checkable
class Promising(Wrapper, Protocol):
    """A wrapper that makes releases differentially private; the run accounts for them."""

    @property
    def clip(self) -> float:
        """The bound on what a unit adds, at the start."""
        ...

    @property
    def promise(self) -> Promise:
        """What it promises."""
        ...


def later_exchanges(wrapper: Wrapper) -> int:
    """Return the exchanges of a round that ``wrapper`` adds to those of the method inside."""
    # As with ``promising``: others need not know of this protocol.
    return wrapper.later if isinstance(wrapper, Prolonging) else 0


def promising(wrapper: Wrapper) -> Promising | None:
    """Return ``wrapper`` where it promises something, otherwise None."""
    # The one place that looks at a wrapper's kind: others need not know of this protocol.
    return wrapper if isinstance(wrapper, Promising) else None
