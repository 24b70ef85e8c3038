"""The differential privacy of a run: who is drawn in secret, and a row a round of what it cost.

All that is accounted for is in the ledger, which a resumed run reads again: which clients were
asked, and with what probability.
"""

import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from fedpeft.errors import BadInput
from fedpeft.experiment.config import Config
from fedpeft.experiment.server_side import ServerSide
from fedpeft.experiment.wrapping import wrappers
from fedpeft.ledger import ClientRow, PrivacyRow, Row
from fedpeft.privacy.accountant import (
    EVERYBODY,
    Promise,
    check_installed,
    epsilon,
    epsilon_of_one_rate,
)
from fedpeft.types import Client, State, TrainsRepeatedly
from fedpeft.wrappers.dp import CLIP
from fedpeft.wrappers.wrapper import Promising, later_exchanges, promising


def promises(config: Config) -> dict[str, Promising]:
    """Return the wrappers of a run that promise differential privacy, by their owner's name."""
    found: dict[str, Promising] = {}
    for owner, wrapper in wrappers(config.told_wraps()).items():
        one = promising(wrapper)
        if one is not None:
            found[owner] = one
    return found


def draws_in_secret(config: Config) -> bool:
    """Return whether nobody may know who takes part in a round."""
    kinds = [one.promise for one in promises(config).values()]
    return any(promise.unit == "client" and promise.sampled for promise in kinds)


def trainings(config: Config) -> int:
    """Return how often a client trains in one round of a run, at most."""
    method = replace(config, wrap=()).build_method()
    # The one place that looks at a method's kind: most need not know of this protocol.
    return method.trainings if isinstance(method, TrainsRepeatedly) else 1


def exchanges(config: Config) -> int:
    """Return how often a client is asked in one round of a run, at most."""
    found = wrappers(config.told_wraps()).values()
    return trainings(config) + sum(later_exchanges(wrapper) for wrapper in found)


def check_privacy(config: Config) -> None:
    """Raise BadInput where what a run promises cannot be accounted for, or kept."""
    found = promises(config)
    if not found:
        return
    check_installed()
    if draws_in_secret(config) and config.federation.min_replies > 1:
        raise BadInput(
            f"federation.min_replies = {config.federation.min_replies}: with wrap.sampling = "
            "'poisson' of dp, whether a round is silent would tell how many were drawn; choose 1"
        )
    if draws_in_secret(config) and config.server.metrics is not None:
        raise BadInput(
            f"server.metrics = {config.server.metrics}: counts replies, and with wrap.sampling = "
            "'poisson' of dp nobody may know how many were drawn; leave it out"
        )
    _check_draw(config)
    of_examples = [one for one in found.values() if one.promise.unit == "example"]
    if of_examples and config.training.steps is None:
        raise BadInput(
            "training.steps is missing: with wrap.name = 'dpsgd' a client's number of steps must "
            "not depend on its number of examples, as it does with training.epochs"
        )


def _check_draw(config: Config) -> None:
    """Raise BadInput where clients are drawn in another way than is accounted for."""
    federation = config.federation
    if federation.sampling != "uniform":
        raise BadInput(
            f"federation.sampling = {federation.sampling!r}: who is asked would tell how many "
            "examples a client holds, and differential privacy (dp, dpsgd) hides them; choose "
            "'uniform'"
        )
    if draws_in_secret(config) and federation.trace is not None:
        raise BadInput(
            f"federation.trace = {str(federation.trace)!r}: with wrap.sampling = 'poisson' of dp "
            "every client has to have the same chance in every round; leave it out, or choose "
            "'cohort'"
        )


def privacy_notes(config: Config, clients: Sequence[Client]) -> list[str]:
    """Return what is to be said of promises that are worth little, a line each."""
    counts = {
        "client": len(clients),
        "example": min((client.examples for client in clients), default=0),
    }
    notes: list[str] = []
    for wrapper in promises(config).values():
        promise = wrapper.promise
        count = counts[promise.unit]
        if count and promise.delta * count >= 1:
            whose = "clients" if promise.unit == "client" else "rows of the smallest client"
            notes.append(
                f"wrap.delta = {promise.delta:g}: a promise that gives one of {count} {whose} away "
                f"would keep it; choose well below {1 / count:.2g}"
            )
    return notes


def drawn_in_secret(clients: Sequence[Client], count: int) -> list[Client]:
    """Return who takes part: each client by itself, so that ``count`` of them are expected.

    The draw is from the operating system, and nothing of it is kept: neither from the run's seed
    nor from a checkpoint can it be repeated.
    """
    random = secrets.SystemRandom()
    probability = rate(count, len(clients))
    return [client for client in clients if random.random() < probability]


def rate(count: int, clients: int) -> float:
    """Return the probability of taking part in a round of ``count`` of so many ``clients``.

    >>> rate(4, 20), rate(4, 3)
    (0.2, 1.0)
    """
    return min(1.0, count / max(1, clients))


@final
@dataclass
class Accounts:
    """Adds up what the rounds of a run have told of clients, or of their examples.

    ``asked``: how often each client was asked to train; a client that was lost counts, too.
    ``sampled``: sampling probability -> rounds, where clients are drawn in secret. ``holds``: on
    how many rows each client trains, where it says so. ``probability``: of taking part in the round
    under way, where clients are drawn in secret.
    """

    side: ServerSide
    asked: Counter[int]
    sampled: Counter[float]
    holds: dict[int, int]
    probability: float = 1.0

    @staticmethod
    def of(side: ServerSide, ledger: Iterable[Row]) -> "Accounts":
        """Return the accounts of a run as its ``ledger`` leaves them."""
        accounts = Accounts(side, Counter(), Counter(), {})
        for row in ledger:
            accounts.add(row)
        return accounts

    def add(self, row: Row) -> None:
        """Take account of a row of the ledger."""
        match row:
            case ClientRow(client=client, phase=0, measured=measured):
                self.asked[client] += 1
                if measured.examples:
                    # Of a client whose data change, as they were when each row weighed most.
                    fewest = self.holds.get(client, measured.examples)
                    self.holds[client] = min(fewest, measured.examples)
            case PrivacyRow(unit="client", sampling=float(probability)):
                self.sampled[probability] += 1
            case _:
                pass

    def drawn_from(self, clients: int) -> None:
        """Take note that a round's clients were drawn from so many."""
        self.probability = rate(self.side.config.federation.clients_per_round, clients)

    def rows(self, state: State) -> list[PrivacyRow]:
        """Return the rows of the round that led to ``state``, one a promise."""
        found: list[PrivacyRow] = []
        for owner, wrapper in promises(self.side.config).items():
            bound = float(state.slice_of(owner).get(CLIP, wrapper.clip))
            of_unit = self._of_clients if wrapper.promise.unit == "client" else self._of_examples
            found.append(of_unit(wrapper.promise, state.round, bound))
        return found

    def _of_clients(self, promise: Promise, rounds: int, bound: float) -> PrivacyRow:
        """Return the row of a promise to whole clients."""
        probability = None
        if promise.sampled:
            probability = self.probability
            releases = self.sampled + Counter({probability: 1})
        else:
            # A public draw hides nothing: rounds cost those that are in them, and nobody else.
            releases = Counter({EVERYBODY: max(self.asked.values(), default=0)})
        return PrivacyRow(
            round=rounds,
            unit="client",
            epsilon=epsilon(promise.noise, promise.delta, releases),
            delta=promise.delta,
            noise=promise.noise,
            clip=bound,
            releases=releases.total(),
            sampling=probability,
        )

    def _of_examples(self, promise: Promise, rounds: int, bound: float) -> PrivacyRow:
        """Return the row of a promise to single examples: of the client that it holds worst for."""
        training = self.side.config.training
        # See ``check_privacy``; what a client has chosen while it probed was trained for, too.
        steps = (training.steps or 0) * trainings(self.side.config)
        known = {client.id: client.examples for client in self.side.clients} | self.holds
        costs: dict[tuple[float, int], float] = {}
        for client_id, rounds_asked in self.asked.items():
            # Of a client whose number of examples is not known, all may be in every step.
            probability = rate(training.batch_size, known.get(client_id, 0))
            costs[probability, rounds_asked * steps] = 0.0
        for probability, releases in worst(costs):
            costs[probability, releases] = epsilon_of_one_rate(
                promise.noise, promise.delta, probability, releases
            )
        (probability, releases), most = max(
            costs.items(), key=lambda item: item[1], default=((EVERYBODY, 0), 0.0)
        )
        return PrivacyRow(
            round=rounds,
            unit="example",
            epsilon=most,
            delta=promise.delta,
            noise=promise.noise,
            clip=bound,
            releases=releases,
            sampling=probability,
        )


def worst(costs: Mapping[tuple[float, int], object]) -> list[tuple[float, int]]:
    """Return the pairs (probability, releases) of which no other has more of both.

    >>> worst({(0.1, 10): 0, (0.2, 10): 0, (0.1, 30): 0, (0.05, 20): 0})
    [(0.2, 10), (0.1, 30)]
    """
    front: list[tuple[float, int]] = []
    for probability, releases in sorted(costs, reverse=True):
        if not front or releases > front[-1][1]:
            front.append((probability, releases))
    return front
