"""What this repository has found of methods, each score with the run that it comes from."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated, Final, final

from annotated_types import Ge, Le

from fedpeft.experiment.checking import checked

ALIKE: Final = 0.15
"""Largest difference in the total variation of two clients between partitions of like skew."""


@final
@dataclass(frozen=True)
class Study:
    """Runs of several methods in one federation, as a page of the docs has them.

    ``name``: by which tables refer to it. ``command``: how it is run again. ``page`` and
    ``section``: where its table stands. ``total_variation``: of the labels of two clients, as
    ``fedpeft partition`` tells it for this data; None where there are no labels. ``rates``: how the
    learning rates were chosen. ``unit`` is written behind a score. ``scores``: by method, the final
    one as it is printed there.
    """

    name: str
    task: str
    data: str
    model: str
    clients: int
    clients_per_round: int
    rounds: int
    command: str
    page: str
    section: str
    metric: str
    unit: str
    rates: str
    scores: dict[str, str]
    higher_is_better: bool = True
    seeds: int = 1
    total_variation: Annotated[float, Ge(0), Le(1)] | None = None

    def place(self, method: str) -> int | None:
        """Return how many methods of the study are better, and one; None where it was not run.

        The number before a score's spread decides.
        """
        if method not in self.scores:
            return None
        sign = 1 if self.higher_is_better else -1
        own = sign * _number(self.scores[method])
        return 1 + sum(sign * _number(score) > own for score in self.scores.values())


@cache
def studies() -> tuple[Study, ...]:
    """Return all studies of ``findings.toml``, in its order."""
    text = (files("fedpeft.experiment") / "findings.toml").read_text(encoding="utf-8")
    return tuple(
        checked(Study, table, f"study[{index}]")
        for index, table in enumerate(tomllib.loads(text)["study"])
    )


def of_like_skew(
    known: Sequence[Study], task: str, total_variation: float | None
) -> tuple[Study, ...]:
    """Return the studies of a task whose clients differ as much, within ``ALIKE``; nearest first.

    Without labels there is no skew to compare, and so there are none.
    """
    distances: list[tuple[float, int]] = []
    for index, study in enumerate(known):
        if study.task != task or study.total_variation is None or total_variation is None:
            continue
        distance = abs(study.total_variation - total_variation)
        if distance <= ALIKE:
            distances.append((distance, index))
    return tuple(known[index] for _, index in sorted(distances))


def _number(score: str) -> float:
    """``58.5 ± 5.6`` -> 58.5."""
    return float(score.split(maxsplit=1)[0])
