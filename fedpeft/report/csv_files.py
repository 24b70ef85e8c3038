"""A comparison as CSV files with every number: per method, per run, along every run's curve."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedpeft.report.comparison import Comparison
from fedpeft.report.rates import rate_of
from fedpeft.report.summary import Point, Summary
from fedpeft.report.terms import SLORA_LINK

Cells = Sequence[object]
"""One line of a file."""


def save(compared: Comparison, out: Path) -> list[Path]:
    """Write ``summary.csv``, ``runs.csv`` and ``curves.csv`` to the existing folder ``out``.

    Returns their paths. ``runs.csv`` has the fields of ``Numbers`` for every run, with the metric's
    name in place of ``score``, then its learning rate and where that is from. ``summary.csv`` has
    their means over a method's seeds and, as ``<field>_spread``, their sample standard deviations.
    An empty cell is a number that does not exist. Metrics are as they are in the ledgers, shares as
    shares of 1. ``devices.csv`` has what became of the requests by run and class of devices; it is
    written where there is a fleet.
    """
    written = [
        _write(out / "summary.csv", _summary(compared)),
        _write(out / "runs.csv", _runs(compared)),
        _write(out / "curves.csv", _curves(compared)),
    ]
    if any(run.devices for run in compared.runs):
        written.append(_write(out / "devices.csv", _devices(compared)))
    return written


def _write(path: Path, lines: Iterable[Cells]) -> Path:
    # The same bytes on every system: no newline translation, and "\n" for csv's own "\r\n".
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    return path


def _summary(compared: Comparison) -> Iterator[Cells]:
    metric, terms = compared.metric.name, compared.terms
    means = list(compared.lines[0].mean.columns(metric))
    spreads = [f"{name}_spread" for name in means]
    # The terms are the same on every line, so that a line can be read without the others.
    term_headings = ["target", "bandwidth", "equal_rounds", "equal_bytes", "majority"]
    yield ["method", "seeds", *means, *spreads, *term_headings]
    term_values = [terms.target, terms.bandwidth, terms.rounds, terms.budget, compared.majority]
    for line in compared.lines:
        mean, spread = line.mean.columns(metric), line.spread.columns(metric)
        yield [line.label, len(line.runs), *mean.values(), *spread.values(), *term_values]


def _runs(compared: Comparison) -> Iterator[Cells]:
    metric = compared.metric.name
    headings = compared.lines[0].mean.columns(metric)
    yield ["method", "run", "seed", *headings, "lost_reasons", "lr", "rate_from"]
    for line in compared.lines:
        for run, numbers in zip(line.runs, line.each, strict=True):
            cells = numbers.columns(metric).values()
            rate = rate_of(run.run)
            chosen = [None, None] if rate is None else [rate.lr, rate.origin]
            yield [line.label, run.run.name, run.run.seed, *cells, _reasons(run), *chosen]


def _devices(compared: Comparison) -> Iterator[Cells]:
    counts = ["clients", "asked", "used", "dropped_out", "late", "lost_otherwise"]
    yield ["method", "run", "seed", "device", *counts]
    for line in compared.lines:
        for run in line.runs:
            for name, answers in run.devices.items():
                yield [
                    line.label,
                    run.run.name,
                    run.run.seed,
                    name,
                    answers.clients,
                    answers.asked,
                    answers.used,
                    answers.dropped,
                    answers.late,
                    answers.lost,
                ]


def _reasons(run: Summary) -> str:
    """Return why replies of a run were lost, with how many of them."""
    parts: list[str] = []
    for reason, count in run.lost.items():
        parts.append(f"{reason}: {count}")
    return "; ".join(parts)


def _curves(compared: Comparison) -> Iterator[Cells]:
    spent = ["megabytes", "modelled_seconds", "modelled_seconds_slora"]
    metrics = [compared.metric.name, *compared.others]
    yield ["method", "run", "seed", "round", *spent, *metrics]
    for line in compared.lines:
        for run in line.runs:
            for point in run.curve:
                yield [line.label, run.run.name, run.run.seed, *_evaluation(point, compared)]


def _evaluation(point: Point, compared: Comparison) -> Cells:
    cost = point.cost
    return [
        point.round,
        cost.bytes / 1e6,
        cost.modelled(compared.terms.bandwidth),
        cost.modelled(SLORA_LINK),
        point.score,
        *map(point.others.get, compared.others),
    ]
