"""Bytes that clients move, as the rows of a ledger count them."""

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import final

from fedpeft.ledger import ClientRow


@final
@dataclass(frozen=True)
class Transfers:
    """What some clients moved in some exchanges.

    ``rows``: of the ledger; a client has several in a round that has several exchanges.

    >>> rows = [
    ...     ClientRow(round=0, phase=0, client=3, down=100, up=10),
    ...     ClientRow(round=0, phase=1, client=3, down=20, up=5),
    ...     ClientRow(round=1, phase=0, client=4, down=110, up=10),
    ... ]
    >>> Transfers(rows).down, Transfers(rows).most
    ((120, 110), 135)
    >>> Transfers(rows).in_phase(0).most, Transfers(rows).of({4}).in_phase(1).most
    (120, None)
    """

    rows: Sequence[ClientRow]

    def of(self, clients: Container[int]) -> "Transfers":
        """Return those of ``clients`` alone."""
        return Transfers([row for row in self.rows if row.client in clients])

    def in_phase(self, phase: int) -> "Transfers":
        """Return those of one exchange of every round alone."""
        return Transfers([row for row in self.rows if row.phase == phase])

    @property
    def down(self) -> tuple[int, ...]:
        """Return the most bytes that one client was sent, by round."""
        return self._most_by_round(attrgetter("down"))

    @property
    def up(self) -> tuple[int, ...]:
        """Return the most bytes that one client sent back, by round."""
        return self._most_by_round(attrgetter("up"))

    @property
    def most(self) -> int | None:
        """Return the most bytes of one client in one round, both ways; None without any rows."""
        return max(self._most_by_round(lambda row: row.down + row.up), default=None)

    def _most_by_round(self, size: Callable[[ClientRow], int]) -> tuple[int, ...]:
        """Return the most bytes of one client in each round, all of its exchanges together."""
        rounds: dict[int, Counter[int]] = {}  # round -> client -> bytes
        for row in self.rows:
            rounds.setdefault(row.round, Counter())[row.client] += size(row)
        return tuple(max(bytes_of.values()) for bytes_of in rounds.values())
