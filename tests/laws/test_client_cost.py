"""What a rehearsal costs a client is worked out again from its rows."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from fedpeft.experiment.timing import Timing
from fedpeft.experiment.transfers import Transfers
from fedpeft.ledger import ClientRow, Measured

ASKED = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 4)))
"""(round, phase, client) of every request."""


@st.composite
def ledgers(draw: st.DrawFn) -> list[ClientRow]:
    """Return rows in a ledger's order, one for each client that was asked in an exchange."""
    sizes = st.integers(0, 1000)
    return [
        ClientRow(round=number, phase=phase, client=client, down=draw(sizes), up=draw(sizes))
        for number, phase, client in sorted(draw(ASKED))
    ]


@given(ledgers())
def test_a_rounds_bytes_are_those_of_the_client_with_most_of_them_in_all_exchanges(
    rows: list[ClientRow],
) -> None:
    down: list[int] = []
    up: list[int] = []
    for number in sorted({row.round for row in rows}):
        of_round = [row for row in rows if row.round == number]
        clients = {row.client for row in of_round}
        down.append(max(sum(row.down for row in of_round if row.client == k) for k in clients))
        up.append(max(sum(row.up for row in of_round if row.client == k) for k in clients))
    assert (Transfers(rows).down, Transfers(rows).up) == (tuple(down), tuple(up))


@given(ledgers(), st.sets(st.integers(0, 4)), st.integers(0, 2))
def test_the_most_bytes_are_both_ways_in_one_round_or_one_exchange(
    rows: list[ClientRow], clients: set[int], phase: int
) -> None:
    def most(some: Sequence[ClientRow]) -> int | None:
        sums: dict[tuple[int, int], int] = {}
        for row in some:
            key = row.client, row.round
            sums[key] = sums.get(key, 0) + row.down + row.up
        return max(sums.values(), default=None)

    theirs = [row for row in rows if row.client in clients]
    assert Transfers(rows).of(clients).most == most(theirs)
    there = [row for row in theirs if row.phase == phase]
    assert Transfers(rows).of(clients).in_phase(phase).most == most(there)


def test_the_first_round_warms_up_but_its_memory_counts() -> None:
    """Two steps a round: 1 + 3 s are 2 s a step, 0.5 + 0.5 s are half a second."""
    rounds = [timed((9.0, 70)), timed((1.0, 50), (3.0, 60)), timed((0.5, 40), (0.5, 40))]
    timing = Timing(rounds, steps=2)
    assert timing.step_seconds == (0.5, 2.0)
    assert timing.timed_steps == 4
    assert timing.peak_memory == 70


def test_a_single_round_counts() -> None:
    timing = Timing([timed((6.0, 70))], steps=3)
    assert timing.step_seconds == (2.0,)
    assert timing.timed_steps == 3


def timed(*exchanges: tuple[float, int]) -> list[ClientRow]:
    """Return the rows of a round: seconds and peak memory of each exchange."""
    rows: list[ClientRow] = []
    for phase, (seconds, memory) in enumerate(exchanges):
        measured = Measured(seconds=seconds, peak_memory=memory)
        rows.append(ClientRow(round=0, phase=phase, client=0, down=0, up=0, measured=measured))
    return rows
