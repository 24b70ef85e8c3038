"""What a run had spent by some moment, in bytes and in modelled seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.ledger import ClientRow


@dataclass(frozen=True)
class Cost:
    """What a run had spent by some moment.

    ``bytes``: all traffic, down and up. ``slowest_bytes``: the most bytes that one client moved in
    a round, down and up, summed over rounds. ``slowest_seconds``: the longest measured training of
    a client in a round, summed over rounds. ``slowest_alone``: the same for clients that train
    alone, as on a machine of their own. A round of several phases counts as several here.

    >>> first, second = Cost(bytes=6, slowest_bytes=4), Cost(bytes=7, slowest_bytes=5)
    >>> (first + second).slowest_bytes
    9
    """

    bytes: int = 0
    slowest_bytes: int = 0
    slowest_seconds: float = 0.0
    slowest_alone: float = 0.0

    def __add__(self, later: "Cost") -> "Cost":
        return Cost(
            bytes=self.bytes + later.bytes,
            slowest_bytes=self.slowest_bytes + later.slowest_bytes,
            slowest_seconds=self.slowest_seconds + later.slowest_seconds,
            slowest_alone=self.slowest_alone + later.slowest_alone,
        )

    def network(self, bandwidth: float) -> float:
        """Return the modelled seconds on the network, ``bandwidth`` bytes per second down and up.

        Every client has a link of its own, so the clients of a round transfer side by side and the
        slowest one counts. SLoRA's printed minutes fit Gbit * 1024 / 5 + rounds * s_per_epoch
        (methods.md, section 1 [D]): all the traffic of its tables through one link of 5 Mbit/s.
        Those tables count the traffic of one client, not of all [D]: down and up in 250 rounds,
        11.68 M weights of ALBERT are its 174 Gbit and 66.97 M of DistilBERT its 997. So where all
        messages of a round have one size, as in SLoRA, its formula is this one at ``SLORA_LINK``.
        They differ where sizes differ (SLoRA's knows no slowest client) and in its constant
        s_per_epoch, which ``modelled`` measures.
        """
        return self.slowest_bytes / bandwidth

    def modelled(self, bandwidth: float) -> float:
        """Return the modelled seconds so far: ``network`` plus each round's longest training alone.

        Alone, as every client is modelled with a machine of its own. The shared seconds of clients
        side by side would make methods that can be stacked look faster than the others.
        """
        return self.network(bandwidth) + self.slowest_alone


def cost_of(asked: Sequence[ClientRow]) -> Cost:
    """Return the cost of the rounds of these rows: bytes of all clients, times of the slowest."""
    # An exchange ends with its slowest client, so maxima within one and sums over all: one a round,
    # or one a phase of it. Lost clients count, too: their bytes were moved.
    by_exchange: dict[tuple[int, int], Cost] = {}
    for row in asked:
        moved = row.down + row.up
        exchange = row.round, row.phase
        before = by_exchange.get(exchange, Cost())
        by_exchange[exchange] = Cost(
            bytes=before.bytes + moved,
            slowest_bytes=max(before.slowest_bytes, moved),
            slowest_seconds=max(before.slowest_seconds, row.measured.seconds),
            slowest_alone=max(before.slowest_alone, row.measured.seconds_alone),
        )
    total = Cost()
    for cost in by_exchange.values():
        total += cost
    return total
