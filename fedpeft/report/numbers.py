"""The numbers of a run or of a method: one line of the CSV files."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import stdev
from typing import Any

from fedpeft.report.summary import Summary
from fedpeft.report.terms import SLORA_LINK, Terms

Rule = Callable[[Sequence[float]], float | None]
"""How the same number of several seeds becomes one."""


@dataclass(frozen=True)
class Numbers:
    """One line of the CSV files, in their order; None where there is no such number.

    ``score``: the runs' metric; ``others``: the other metrics by name, as they are in the ledgers.
    ``over_majority``: by how much the score is better than an answer that ignores the text.
    ``start_score``: the score before the first round. ``client_score``: of each client's model on
    the client's own texts, the mean; ``client_worst_tenth_score``: of the worst tenth of clients.
    ``seconds_to_target``: the measured training of every round's slowest client, summed.
    ``network_...`` and ``modelled_...``: seconds at the comparison's bandwidth or at SLoRA's; the
    modelled training is that of clients that train alone. ``equal_rounds_...``: the evaluation
    after the terms' round. ``equal_bytes_...``: the last evaluation within the terms' budget.
    """

    # What was reached.
    score: float | None = None
    best_score: float | None = None
    others: Mapping[str, float | None] = field(default_factory=dict)
    over_majority: float | None = None
    start_score: float | None = None
    client_score: float | None = None
    client_worst_tenth_score: float | None = None
    # What it cost: counted (rounds, steps, weights, bytes), measured (seconds, peak memory) and
    # modelled (seconds on a network).
    rounds: float | None = None
    client_steps: float | None = None
    trained_first: float | None = None
    trained_last: float | None = None
    down_bytes: float | None = None
    up_bytes: float | None = None
    seconds_per_client_round: float | None = None
    peak_memory_bytes: float | None = None
    lost: float | None = None
    network_seconds: float | None = None
    network_seconds_slora: float | None = None
    # What it cost until the first evaluation that reached the target.
    rounds_to_target: float | None = None
    bytes_to_target: float | None = None
    seconds_to_target: float | None = None
    modelled_seconds_to_target: float | None = None
    modelled_seconds_to_target_slora: float | None = None
    # What was reached at equal cost.
    equal_rounds_score: float | None = None
    equal_rounds_bytes: float | None = None
    equal_bytes_score: float | None = None
    equal_bytes_rounds: float | None = None
    # What it told of whole clients, and of single examples, by differential privacy.
    epsilon_clients: float | None = None
    epsilon_examples: float | None = None

    def columns(self, metric: str) -> dict[str, float | None]:
        """Return the numbers by the headings of the CSV files, in order.

        >>> list(Numbers(others={"macro_f1": 0.5}).columns("accuracy"))[:4]
        ['accuracy', 'best_accuracy', 'macro_f1', 'over_majority']
        """
        columns: dict[str, float | None] = {}
        for part in fields(self):
            if part.name == "others":
                columns.update(self.others)
            else:
                # `best_score` becomes `best_accuracy`, and so on.
                columns[part.name.replace("score", metric)] = getattr(self, part.name)
        return columns


def numbers_of(run: Summary, terms: Terms, others: Sequence[str]) -> Numbers:
    """Return the numbers of one run: those that every run has, then those that it may lack."""
    # Every run has the other metrics' columns, if only empty: all lines need the same headings.
    numbers = Numbers(
        others=dict.fromkeys(others),
        rounds=run.rounds,
        client_steps=run.steps,
        trained_first=run.trained_first,
        trained_last=run.trained_last,
        down_bytes=run.down,
        up_bytes=run.up,
        seconds_per_client_round=run.seconds,
        peak_memory_bytes=run.peak_memory,
        lost=sum(run.lost.values()),
        network_seconds=run.cost.network(terms.bandwidth),
        network_seconds_slora=run.cost.network(SLORA_LINK),
        epsilon_clients=_epsilon(run, "client"),
        epsilon_examples=_epsilon(run, "example"),
    )
    numbers = _scores(numbers, run)
    numbers = _to_target(numbers, run, terms)
    return _on_equal_terms(numbers, run, terms)


def _epsilon(run: Summary, unit: str) -> float | None:
    """Return the epsilon that a run ended with for this unit of privacy; None without a promise."""
    row = run.privacy.get(unit)
    return None if row is None else row.epsilon


def _scores(numbers: Numbers, run: Summary) -> Numbers:
    final, best, majority = run.final, run.best, run.run.majority
    if final is None or best is None:
        return numbers
    return replace(
        numbers,
        score=final.score,
        best_score=best.score,
        others={**numbers.others, **final.others},
        over_majority=None if majority is None else run.metric.gain(final.score, majority),
        start_score=run.start and run.start.score,
        client_score=final.client_score,
        client_worst_tenth_score=final.client_worst_tenth,
    )


def _to_target(numbers: Numbers, run: Summary, terms: Terms) -> Numbers:
    reached = run.reached(terms.target)
    if reached is None:
        return numbers
    return replace(
        numbers,
        rounds_to_target=reached.round,
        bytes_to_target=reached.cost.bytes,
        seconds_to_target=reached.cost.slowest_seconds,
        modelled_seconds_to_target=reached.cost.modelled(terms.bandwidth),
        modelled_seconds_to_target_slora=reached.cost.modelled(SLORA_LINK),
    )


def _on_equal_terms(numbers: Numbers, run: Summary, terms: Terms) -> Numbers:
    after_rounds, within_budget = run.after(terms.rounds), run.within(terms.budget)
    if after_rounds is not None:
        numbers = replace(
            numbers,
            equal_rounds_score=after_rounds.score,
            equal_rounds_bytes=after_rounds.cost.bytes,
        )
    if within_budget is not None:
        numbers = replace(
            numbers,
            equal_bytes_score=within_budget.score,
            equal_bytes_rounds=within_budget.round,
        )
    return numbers


def over_seeds(each: Sequence[Numbers], rule: Rule) -> Numbers:
    """Return ``rule`` of every number over the seeds; None where a seed lacks it."""
    # Field by field, so that a number that is added to `Numbers` needs no line here.
    combined: dict[str, Any] = {}
    for part in fields(Numbers):
        if part.name != "others":
            combined[part.name] = _of_all([getattr(one, part.name) for one in each], rule)
    others: dict[str, float | None] = {}
    for name in each[0].others:
        others[name] = _of_all([one.others[name] for one in each], rule)
    return Numbers(**combined, others=others)


def sample_deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None for a single value, or if one is not finite.

    >>> sample_deviation([1.0, 3.0, 5.0]), sample_deviation([1.0])
    (2.0, None)
    """
    # The NaN or infinity of a run that diverged has no deviation.
    finite = all(map(math.isfinite, values))
    return stdev(values) if finite and len(values) > 1 else None


def _of_all(values: Sequence[float | None], rule: Rule) -> float | None:
    """Return ``rule`` of the values; None where one is missing."""
    present: list[float] = []
    for value in values:
        if value is None:
            return None
        present.append(value)
    return rule(present)
