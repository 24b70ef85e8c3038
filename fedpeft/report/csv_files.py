"""A comparison as CSV files, with every number there is: per method, per run, and along every run's curve."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from fedpeft.report.comparison import Comparison, Numbers
from fedpeft.report.terms import SLORA_LINK

_NUMBERS = [field.name for field in fields(Numbers)]


def save(compared: Comparison, out: Path) -> list[Path]:
    """Write ``summary.csv``, ``runs.csv`` and ``curves.csv`` to the existing folder ``out`` and return their paths.

    ``runs.csv`` has the fields of ``Numbers`` for every run; ``summary.csv`` their mean over a method's seeds, under
    ``<field>_spread`` their sample standard deviation. An empty cell is a number that does not exist.
    """
    return [
        _write(out / "summary.csv", _summary(compared)),
        _write(out / "runs.csv", _runs(compared)),
        _write(out / "curves.csv", _curves(compared)),
    ]


def _write(path: Path, lines: Iterable[Sequence[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    return path


def _summary(compared: Comparison) -> Iterable[Sequence[object]]:
    terms = compared.terms
    given = ["target", "bandwidth", "equal_rounds", "equal_bytes", "majority"]
    yield ["method", "seeds", *_NUMBERS, *(f"{name}_spread" for name in _NUMBERS), *given]
    values = [terms.target, terms.bandwidth, terms.rounds, terms.budget, compared.majority]
    for line in compared.lines:
        yield [line.label, len(line.runs), *astuple(line.mean), *astuple(line.spread), *values]


def _runs(compared: Comparison) -> Iterable[Sequence[object]]:
    yield ["method", "run", "seed", *_NUMBERS, "lost_reasons"]
    for line in compared.lines:
        for run, numbers in zip(line.runs, line.each, strict=True):
            reasons = "; ".join(f"{reason}: {count}" for reason, count in run.lost.items())
            yield [line.label, run.run.name, run.run.seed, *astuple(numbers), reasons]


def _curves(compared: Comparison) -> Iterable[Sequence[object]]:
    spent = ["megabytes", "modelled_seconds", "modelled_seconds_slora"]
    yield ["method", "run", "seed", "round", *spent, "accuracy", "macro_f1"]
    for line in compared.lines:
        for run in line.runs:
            for point in run.curve:
                cost = point.cost
                spending = [
                    cost.bytes / 1e6,
                    cost.modelled(compared.terms.bandwidth),
                    cost.modelled(SLORA_LINK),
                ]
                yield [
                    line.label,
                    run.run.name,
                    run.run.seed,
                    point.round,
                    *spending,
                    point.accuracy,
                    point.macro_f1,
                ]
