"""The metric by which runs are compared: which way is better, and how its values are written."""

import math
from dataclasses import dataclass
from typing import final

from fedpeft.ledger import RunRow
from fedpeft.report.names import literal


@final
@dataclass(frozen=True)
class Metric:
    """The primary metric of runs, as the first rows of their ledgers describe it.

    ``share``: whether it is a share of 1, which is written in per cent. Then the other metrics that
    a run reports beside it are shares, too.
    """

    name: str
    higher_is_better: bool = True
    share: bool = True

    @property
    def label(self) -> str:
        """The name for people.

        >>> Metric("macro_f1").label
        'macro F1'
        """
        return spelled(self.name)

    @property
    def direction(self) -> str:
        """Which way is better, in words."""
        return "higher is better" if self.higher_is_better else "lower is better"

    @property
    def trivial_answer(self) -> str:
        """What an answer that ignores the text is called."""
        return "majority class" if self == ACCURACY else "trivial answer"

    def rank(self, score: float) -> float:
        """Return a number that is smaller the better ``score`` is; NaN comes last.

        >>> sorted([9.0, 7.0, 8.0], key=Metric("perplexity", higher_is_better=False).rank)
        [7.0, 8.0, 9.0]
        """
        if math.isnan(score):
            return math.inf  # NaN itself would make any order of a sort possible
        return -score if self.higher_is_better else score

    def reaches(self, score: float, target: float) -> bool:
        """Return whether ``score`` is as good as ``target`` or better; NaN reaches nothing."""
        return score >= target if self.higher_is_better else score <= target

    def gain(self, score: float, baseline: float) -> float:
        """Return by how much ``score`` is better than ``baseline``; below 0 where it is worse.

        >>> Metric("perplexity", higher_is_better=False).gain(score=12.0, baseline=20.0)
        8.0
        """
        return score - baseline if self.higher_is_better else baseline - score

    def relaxed(self, score: float, share: float) -> float:
        """Return a score that is easier to reach than ``score`` by the factor ``share``, below 1.

        >>> Metric("accuracy").relaxed(0.5, share=0.9)
        0.45
        >>> Metric("perplexity", higher_is_better=False).relaxed(18.0, share=0.9)
        20.0
        """
        # Times a factor below 1 goes towards zero, divided by it away from zero.
        return share * score if self.easier_towards_zero(score) else score / share

    def easier_towards_zero(self, score: float) -> bool:
        """Return whether scores between 0 and ``score`` are easier to reach than it is."""
        # So for an accuracy (above 0), and for a log-likelihood (below 0) the other way round.
        return self.higher_is_better == (score > 0)

    def in_unit(self, score: float) -> float:
        """Return ``score`` as it is printed and drawn: a share in per cent."""
        return 100 * score if self.share else score

    def written(self, score: float) -> str:
        """Return ``score`` in digits, without its unit.

        >>> Metric("accuracy").written(0.4567), Metric("perplexity", share=False).written(45.67)
        ('45.7', '45.7')
        """
        return f"{100 * score:.1f}" if self.share else significant(score)

    def with_unit(self, score: float) -> str:
        """Return ``score`` in digits, with its unit where it has one."""
        return f"{self.written(score)} %" if self.share else self.written(score)


ACCURACY = Metric("accuracy")
"""The metric of a classification."""


def metric_of(run: RunRow) -> Metric:
    """Return the metric of ``run``."""
    return Metric(run.metric, run.higher_is_better, run.metric_is_share)


def spelled(name: str) -> str:
    """Return the name of a metric for people.

    >>> spelled("exact_match"), spelled("macro_f1")
    ('exact match', 'macro F1')
    """
    words = literal(name).split("_")
    for index, word in enumerate(words):
        if word == "f1":
            words[index] = "F1"
    return " ".join(words)


def significant(value: float) -> str:
    """Return ``value`` with three significant digits or, from 100 on, as a whole number.

    >>> significant(0.12345), significant(12.0), significant(1234.5)
    ('0.123', '12.0', '1234')
    """
    as_integer = value == 0 or abs(value) >= 99.95  # 99.95 is the first that would round to 100.0
    return f"{value:.0f}" if as_integer else f"{value:#.3g}"
