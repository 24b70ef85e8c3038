"""Who is asked in a round: drawn alike or by size, from all clients or those that are there."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from math import inf, log1p
from pathlib import Path
from typing import Final, Literal, final

from fedpeft.errors import BadInput
from fedpeft.federation.server import sample
from fedpeft.seeds import uniform
from fedpeft.types import Client

Sampling = Literal["uniform", "size"]
"""How a cohort is drawn."""


def sample_by_size(
    clients: Sequence[Client], count: int, seed: int, round_number: int
) -> list[Client]:
    """Return ``count`` of the ``clients``, in their order, drawn by their examples.

    One after another is drawn without replacement, each time with probabilities in proportion to
    the examples of those that are left. Clients without examples are drawn last.

    >>> clients = [Client(0, examples=10**9), Client(1, examples=1)]
    >>> [client.id for client in sample_by_size(clients, 1, seed=0, round_number=0)]
    [0]
    """

    # Algorithm A-ES (Efraimidis and Spirakis 2006): with an exponential time at rate w_k for each
    # client, the first to come are a draw without replacement in proportion to w_k. Each time is
    # drawn by the client's name, so who else is there does not change it.
    def arrival(client: Client) -> tuple[float, int]:
        draw = uniform(seed, "cohort", round_number, client.id)  # in [0, 1)
        return (-log1p(-draw) / client.examples if client.examples else inf), client.id

    chosen = {client.id for client in sorted(clients, key=arrival)[:count]}
    return [client for client in clients if client.id in chosen]


SAMPLERS: Final[
    Mapping[Sampling, Callable[[Sequence[Client], int, int, int], Sequence[Client]]]
] = {
    "uniform": sample,
    "size": sample_by_size,
}
"""The ways of drawing a cohort."""


@final
@dataclass(frozen=True)
class Trace:
    """Which clients are there in which rounds.

    ``spans``: (client, its first round, its last round). ``digest``: 16 hex digits of the file.

    >>> trace = Trace(((4, 0, 2), (7, 2, 9)))
    >>> [client.id for client in trace.there([Client(4), Client(7)], round_number=2)]
    [4, 7]
    """

    spans: tuple[tuple[int, int, int], ...]
    digest: str = ""

    def there(self, clients: Sequence[Client], round_number: int) -> list[Client]:
        """Return those of ``clients`` that are there in a round, in their order."""
        present: set[int] = set()
        for client, first, last in self.spans:
            if first <= round_number <= last:
                present.add(client)
        return [client for client in clients if client.id in present]


COLUMNS: Final = ("client", "from", "to")
"""The columns of a trace file."""


def read_trace(path: Path, names: Sequence[str], rounds: int) -> Trace:
    """Return the trace in a CSV file with the columns client, from and to.

    A client is called by its name among ``names`` or by its number there, rounds count from 0 and
    ``to`` is included. BadInput, with file and line, for what cannot be read, for clients that are
    not there, and where one of the ``rounds`` has nobody.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"federation.trace = {str(path)!r}: cannot be read: {error}") from error
    numbers = {str(number): number for number in range(len(names))}
    numbers |= {name: number for number, name in enumerate(names)}  # a name goes before a number
    try:
        spans = tuple(_spans(path, text, numbers, names))
    except csv.Error as error:
        raise BadInput(f"{path}: is no CSV file: {error}") from error
    _check_rounds(path, spans, rounds)
    return Trace(spans, sha256(content).hexdigest()[:16])


def _check_rounds(path: Path, spans: Sequence[tuple[int, int, int]], rounds: int) -> None:
    """Raise BadInput where one of the ``rounds`` has nobody."""
    with_somebody: set[int] = set()
    for _, first, last in spans:
        with_somebody.update(range(first, min(last, rounds - 1) + 1))
    for round_number in range(rounds):
        if round_number not in with_somebody:
            raise BadInput(
                f"{path}: no client is there in round {round_number} of rounds 0 to {rounds - 1}; "
                "add a line with a client that is, or choose fewer federation.rounds"
            )


def _spans(
    path: Path, text: str, numbers: Mapping[str, int], names: Sequence[str]
) -> Iterator[tuple[int, int, int]]:
    """Yield (client, first round, last round) of every line of a trace file."""
    reader = csv.DictReader(StringIO(text, newline=""), skipinitialspace=True)
    headings = reader.fieldnames or ()
    if sorted(headings) != sorted(COLUMNS):
        found = ", ".join(headings) or "nothing"
        raise BadInput(f"{path}: line 1 must name the columns client, from, to, not {found}")
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():  # too many fields, or too few
            raise BadInput(f"{where}: write three fields, client, from and to")
        if row["client"] not in numbers:
            raise BadInput(
                f"{where}: client {row['client']!r} is not one of {len(names)} clients; "
                f"write a number from 0 to {len(names) - 1} or a name, as {names[0]!r}"
            )
        first, last = _round(where, "from", row["from"]), _round(where, "to", row["to"])
        if last < first:
            raise BadInput(f"{where}: to = {last} comes before from = {first}")
        yield numbers[row["client"]], first, last


def _round(where: str, column: str, text: str) -> int:
    """Return the round that ``text`` names."""
    if not text.strip().isdecimal() or len(text) > len(str(2**62)):
        raise BadInput(f"{where}: {column} = {text!r:.30}: write the number of a round, from 0 up")
    return int(text)
