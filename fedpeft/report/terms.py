"""What runs are compared on: a score to reach, a link, a number of rounds, a budget in bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from fedpeft.errors import BadInput
from fedpeft.report.metric import ACCURACY, Metric
from fedpeft.report.summary import Summary

FEDADAPTER_LINK = 1e6
"""Bytes per second: 1 MB/s down and up, as in FedAdapter."""

SLORA_LINK = 5 * 2**20 / 8
"""Bytes per second: SLoRA's 5 Mbit/s. Its Gbit * 1024 / 5 counts in powers of two."""

SHARE_OF_MEDIAN = 0.9
"""The default target, as a share of the median method's final score.

Where less is better the score is divided by it. Of the median and not of the best score: full
fine-tuning alone might reach a share of the best one, and most cells of the table would be empty.
"""


@dataclass(frozen=True)
class Terms:
    """The terms of a comparison; None for a term that the runs' evaluations do not settle.

    ``target``: a score in the runs' metric; ``given``: whether the user chose it. ``bandwidth``:
    bytes per second. ``rounds``: of the equal-rounds view. ``budget``: bytes of the equal-bytes
    view.
    """

    target: float | None
    given: bool
    bandwidth: float
    rounds: int | None
    budget: int | None


def check(target: float | None, bandwidth: float, metric: Metric = ACCURACY) -> None:
    """Raise BadInput for a target that ``metric`` cannot have, or a bandwidth not above 0.

    >>> check(target=35.0, bandwidth=1e6, metric=Metric("perplexity", share=False))
    >>> check(target=35.0, bandwidth=1e6)
    Traceback (most recent call last):
    fedpeft.errors.BadInput: target = 35: accuracy is above 0 and at most 1; did you mean 0.35?
    """
    if target is not None:
        _check_target(target, metric)
    if not bandwidth > 0:  # `bandwidth <= 0` would let NaN pass
        raise BadInput(
            f"bandwidth = {bandwidth:g}: give bytes per second, such as {FEDADAPTER_LINK:g}"
        )


def _check_target(target: float, metric: Metric) -> None:
    if metric.share and not 0 < target <= 1:
        raise BadInput(
            f"target = {target:g}: {metric.label} is above 0 and at most 1; "
            f"did you mean {target / 100:g}?"
        )
    if not math.isfinite(target):
        raise BadInput(f"target = {target:g}: give a finite {metric.label}, such as 10")


def agree(
    methods: Sequence[Sequence[Summary]], target: float | None, bandwidth: float, budget: int | None
) -> Terms:
    """Return the terms for ``methods``, each a sequence of its runs over seeds, at least one.

    ``target`` defaults to ``SHARE_OF_MEDIAN`` of the median method's mean final score (of two
    middle ones the worse). ``budget`` defaults to the total traffic of the cheapest method, taking
    the seed with the most. ``rounds`` is the last round after which every run was evaluated.
    References, which move no bytes, and runs without an evaluation count in none of these. BadInput
    as in ``check``.
    """
    metric = methods[0][0].metric
    check(target, bandwidth, metric)
    is_given = target is not None
    voters = _voters(methods)
    if not voters:
        return Terms(target, is_given, bandwidth, None, budget)
    if target is None:
        target = metric.relaxed(_median_score(voters, metric), SHARE_OF_MEDIAN)
    # With this budget the cheapest method is shown at its end, and every other somewhere before.
    if budget is None:
        budget = min(_most_bytes(runs) for runs in voters)
    rounds = _last_common_round(list(chain.from_iterable(voters)))
    return Terms(target, is_given, bandwidth, rounds, budget)


def _voters(methods: Sequence[Sequence[Summary]]) -> list[list[Summary]]:
    """Return the evaluated runs of every method; of references where there is nothing else."""
    federated: list[list[Summary]] = []
    references: list[list[Summary]] = []
    for method in methods:
        runs = [run for run in method if run.curve]
        if any(run.federated for run in runs):
            federated.append(runs)
        elif runs:
            references.append(runs)
    return federated or references


def _median_score(methods: Sequence[Sequence[Summary]], metric: Metric) -> float:
    """Return the median over methods of the mean final score; of two middle ones the worse."""
    finals = [_mean_final(runs) for runs in methods]
    worst_first = sorted(finals, key=metric.rank, reverse=True)
    # The worse of two middle ones: a score that some method has, and that most of them reach.
    return worst_first[(len(finals) - 1) // 2]


def _mean_final(runs: Sequence[Summary]) -> float:
    return fmean(run.curve[-1].score for run in runs)


def _most_bytes(runs: Sequence[Summary]) -> int:
    return max(run.cost.bytes for run in runs)


def _last_common_round(runs: Sequence[Summary]) -> int | None:
    """Return the last round after which every run was evaluated, None where there is none."""
    common = _evaluated_rounds(runs[0])
    for run in runs[1:]:
        common &= _evaluated_rounds(run)
    return max(common, default=None)


def _evaluated_rounds(run: Summary) -> set[int]:
    return {point.round for point in run.curve}
