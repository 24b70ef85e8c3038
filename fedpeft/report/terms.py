"""What runs are compared on: an accuracy to reach, a link, a number of rounds, a budget in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median_low

from fedpeft.errors import BadInput
from fedpeft.report.summary import Summary

FEDADAPTER_LINK = 1e6
"""Bytes per second: 1 MB/s down and up, as in FedAdapter."""

SLORA_LINK = 5 * 2**20 / 8
"""Bytes per second: SLoRA's 5 Mbit/s. Its Gbit * 1024 / 5 counts in powers of two."""

SHARE_OF_MEDIAN = 0.9
"""The target accuracy, when none is given, as a share of the median method's final accuracy.

A share of the best one would be full fine-tuning's alone to reach, and most cells of the table empty.
"""


@dataclass(frozen=True)
class Terms:
    """The terms of a comparison; None where the runs, lacking evaluations, leave one open.

    ``target``: an accuracy; ``given``: whether the user chose it. ``bandwidth``: bytes per second. ``rounds``: of the
    equal-rounds view. ``budget``: bytes of the equal-bytes view.
    """

    target: float | None
    given: bool
    bandwidth: float
    rounds: int | None
    budget: int | None


def check(target: float | None, bandwidth: float) -> None:
    """Raise BadInput for a target that is no share of 1, or a bandwidth that is not positive."""
    if target is not None and not 0 < target <= 1:
        raise BadInput(
            f"target = {target:g}: an accuracy is above 0 and at most 1; did you mean {target / 100:g}?"
        )
    if bandwidth <= 0:
        raise BadInput(
            f"bandwidth = {bandwidth:g}: give bytes per second, such as {FEDADAPTER_LINK:g}"
        )


def agree(
    methods: Sequence[Sequence[Summary]], target: float | None, bandwidth: float, budget: int | None
) -> Terms:
    """Return the terms for ``methods``, each a sequence of its runs over seeds.

    ``target`` defaults to ``SHARE_OF_MEDIAN`` of the median method's mean final accuracy (of two middle ones the
    lower), ``budget`` to the total traffic of the cheapest method, of its seeds the most; ``rounds`` is the last round
    after which every run was evaluated. References, which move no bytes, have no say in these, nor have runs without an
    evaluation. BadInput as in ``check``.
    """
    check(target, bandwidth)
    evaluated = [[run for run in method if run.final] for method in methods]
    voting = [method for method in evaluated if any(run.federated for run in method)] or list(
        filter(None, evaluated)
    )
    given = target is not None
    if not voting:
        return Terms(target, given, bandwidth, None, budget)
    runs = [run for method in voting for run in method]
    median = median_low(fmean(run.curve[-1].accuracy for run in method) for method in voting)
    common = set.intersection(*({point.round for point in run.curve} for run in runs))
    return Terms(
        target=SHARE_OF_MEDIAN * median if target is None else target,
        given=given,
        bandwidth=bandwidth,
        rounds=max(common, default=None),
        budget=min(max(run.cost.bytes for run in method) for method in voting)
        if budget is None
        else budget,
    )
