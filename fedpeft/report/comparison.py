"""Many runs side by side: grouped over seeds, on the same terms, every number computed once."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedpeft.errors import BadInput
from fedpeft.ledger import RunRow
from fedpeft.report.metric import Metric
from fedpeft.report.numbers import Numbers, numbers_of, over_seeds, sample_deviation
from fedpeft.report.summary import Answers, Summary
from fedpeft.report.terms import FEDADAPTER_LINK, Terms, agree

BESIDE: Mapping[str, tuple[str, ...]] = {"accuracy": ("macro_f1",)}
"""Other metrics, by the primary one, that have a column even where nothing was evaluated."""


@dataclass(frozen=True)
class Line:
    """One method: its runs (one per seed), the numbers of each, their mean, their deviation.

    ``spread``: the sample standard deviation. A mean exists only where every seed has the number:
    a mean over just those seeds that reached a target would flatter the method.
    """

    label: str
    runs: tuple[Summary, ...]
    each: tuple[Numbers, ...]
    mean: Numbers
    spread: Numbers

    @property
    def personal(self) -> bool:
        """Whether there is no global model, and scores are means over the clients' own models."""
        return any(run.final is not None and run.final.personal for run in self.runs)

    @property
    def devices(self) -> dict[str, Answers]:
        """What became of the requests to each class of devices, over all runs."""
        together: dict[str, Answers] = {}
        for run in self.runs:
            for name, answers in run.devices.items():
                before = together.get(name, Answers(clients=0))
                together[name] = before + answers
        return together


@dataclass(frozen=True)
class Comparison:
    """Methods on the same data, terms and ``metric``, the best first.

    ``others``: names of the other metrics. ``majority``: the score of an answer that ignores the
    text, None where there is no such answer.
    """

    lines: tuple[Line, ...]
    terms: Terms
    metric: Metric
    others: tuple[str, ...]
    majority: float | None

    @property
    def runs(self) -> tuple[Summary, ...]:
        """Every run, line by line."""
        runs: list[Summary] = []
        for line in self.lines:
            runs.extend(line.runs)
        return tuple(runs)


def compare(
    runs: Sequence[Summary],
    target: float | None = None,
    bandwidth: float = FEDADAPTER_LINK,
    budget: int | None = None,
) -> Comparison:
    """Compare ``runs`` on a score to reach, a link and a budget in bytes; see ``agree``.

    ``bandwidth``: bytes per second. Raises BadInput when there is no run, or when runs are of
    different data, have different metrics or are scored on different splits.
    """
    _check_comparable(runs)
    groups = _by_method(runs)
    terms = agree([group for _, group in groups], target, bandwidth, budget)
    metric = runs[0].metric
    others = _other_metrics(runs) or BESIDE.get(metric.name, ())
    lines = [_line(label, group, terms, others) for label, group in groups]

    # A stable sort: lines with equal scores keep the order of the runs.
    lines.sort(key=lambda line: _rank(line, metric))
    return Comparison(tuple(lines), terms, metric, others, runs[0].run.majority)


def _rank(line: Line, metric: Metric) -> float:
    """Return a number that is smaller the better a line is; one without a score comes last."""
    return math.inf if line.mean.score is None else metric.rank(line.mean.score)


def _check_comparable(runs: Sequence[Summary]) -> None:
    if not runs:
        raise BadInput("report: no runs given; name at least one run's folder")
    splits: set[str] = set()
    for run in runs:
        _check_pair(runs[0], run)
        if run.split is not None:  # a run without an evaluation has none
            splits.add(run.split)
    if len(splits) > 1:
        names = ", ".join(sorted(splits))
        raise BadInput(f"report: runs are scored on different splits ({names}); report them apart")


def _check_pair(first: Summary, other: Summary) -> None:
    one, two = first.run, other.run
    if one.data_digest != two.data_digest:
        raise BadInput(
            f"report: {one.name} is on data {one.data_digest}, {two.name} on {two.data_digest}; "
            "scores on different data do not compare, report them apart"
        )
    if first.metric != other.metric:
        raise BadInput(
            f"report: {one.name} is scored by {_described(first.metric)}, "
            f"{two.name} by {_described(other.metric)}; "
            "different metrics do not compare, report them apart"
        )


def _described(metric: Metric) -> str:
    kind = "a share, " if metric.share else ""
    return f"{metric.name} ({kind}{metric.direction})"


def _other_metrics(runs: Iterable[Summary]) -> tuple[str, ...]:
    """Return the names of all metrics beside the primary one, in the order of the ledgers."""
    names: dict[str, None] = {}  # a set that keeps its order
    for run in runs:
        for point in run.curve:
            names.update(dict.fromkeys(point.others))
    return tuple(names)


def _by_method(runs: Iterable[Summary]) -> list[tuple[str, list[Summary]]]:
    """Group runs by method.

    Where the runs of one method repeat a seed, they differ in something else: they are then grouped
    by their other settings as well, and the name of a run becomes part of each group's label.
    """
    by_method: dict[str, list[Summary]] = {}
    for run in runs:
        by_method.setdefault(run.run.method, []).append(run)
    groups: list[tuple[str, list[Summary]]] = []
    for method, of_method in by_method.items():
        if _seeds_differ(of_method):
            groups.append((method, of_method))
            continue
        for group in _by_settings(of_method):
            name = f"{method} ({group[0].run.name})"
            groups.append((_numbered(name, groups), group))
    return groups


def _numbered(name: str, groups: Iterable[tuple[str, object]]) -> str:
    """Return ``name``, with a number from 2 on where groups before it have that name."""
    count = 1
    for label, _ in groups:
        if label.startswith(name):  # with or without a number
            count += 1
    return f"{name} {count}" if count > 1 else name


def _by_settings(runs: Iterable[Summary]) -> list[list[Summary]]:
    """Group runs that differ in nothing but the seed; where a seed repeats, each stands alone."""
    by_settings: dict[str, list[Summary]] = {}
    for run in runs:
        by_settings.setdefault(_apart_from_seed(run.run), []).append(run)
    groups: list[list[Summary]] = []
    for alike in by_settings.values():
        if _seeds_differ(alike):
            groups.append(alike)
        else:  # the same run more than once: a mean would count it twice
            for run in alike:
                groups.append([run])
    return groups


def _seeds_differ(runs: Sequence[Summary]) -> bool:
    return len({run.run.seed for run in runs}) == len(runs)


def _apart_from_seed(run: RunRow) -> str:
    """Return a text that is the same for runs that differ in nothing but the seed."""
    settings = dict(run.settings)
    settings.pop("seed", None)
    # Sorted, as the order of settings means nothing; `str` for values that JSON lacks.
    return json.dumps([run.name, settings], sort_keys=True, default=str)


def _line(label: str, runs: Sequence[Summary], terms: Terms, others: Sequence[str]) -> Line:
    each = tuple(numbers_of(run, terms, others) for run in runs)
    mean = over_seeds(each, fmean)
    return Line(label, tuple(runs), each, mean, over_seeds(each, sample_deviation))
