"""Many runs side by side: grouped over seeds, on the same terms, every number computed once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev

from fedpeft.errors import BadInput
from fedpeft.ledger import RunRow
from fedpeft.report.summary import Summary
from fedpeft.report.terms import FEDADAPTER_LINK, SLORA_LINK, Terms, agree


@dataclass(frozen=True)
class Numbers:
    """One line of the CSV files, in their order; None where there is no such number.

    Accuracies and F1 are shares of 1. ``seconds_to_target`` is the measured training of every round's slowest client,
    ``network_...`` and ``modelled_...`` are seconds at the comparison's bandwidth or at SLoRA's;
    the training that is modelled is that of clients alone. ``equal_rounds_...`` is the evaluation
    after the terms' round, ``equal_bytes_...`` the last one within the terms' budget.
    """

    accuracy: float | None
    best_accuracy: float | None
    macro_f1: float | None
    over_majority: float | None
    rounds: float | None
    client_steps: float | None
    trained_first: float | None
    trained_last: float | None
    down_bytes: float | None
    up_bytes: float | None
    seconds_per_client_round: float | None
    peak_memory_bytes: float | None
    lost: float | None
    network_seconds: float | None
    network_seconds_slora: float | None
    rounds_to_target: float | None
    bytes_to_target: float | None
    seconds_to_target: float | None
    modelled_seconds_to_target: float | None
    modelled_seconds_to_target_slora: float | None
    equal_rounds_accuracy: float | None
    equal_rounds_bytes: float | None
    equal_bytes_accuracy: float | None
    equal_bytes_rounds: float | None


@dataclass(frozen=True)
class Line:
    """One method: its runs (one per seed), the numbers of each, their mean and their sample standard deviation.

    A mean exists only where every seed has the number: a mean over the seeds that reached a target would flatter.
    """

    label: str
    runs: tuple[Summary, ...]
    each: tuple[Numbers, ...]
    mean: Numbers
    spread: Numbers


@dataclass(frozen=True)
class Comparison:
    """Methods on the same data and terms, the most accurate first. ``majority``: share of the commonest label."""

    lines: tuple[Line, ...]
    terms: Terms
    majority: float

    @property
    def runs(self) -> tuple[Summary, ...]:
        """Every run, line by line."""
        return tuple(run for line in self.lines for run in line.runs)


def compare(
    runs: Sequence[Summary],
    target: float | None = None,
    bandwidth: float = FEDADAPTER_LINK,
    budget: int | None = None,
) -> Comparison:
    """Compare ``runs`` on an accuracy to reach, a link in bytes per second and a budget in bytes; see ``agree``.

    Raises BadInput when there is no run, or when runs are of different data or scored on different splits.
    """
    _check_comparable(runs)
    groups = _by_method(runs)
    terms = agree([group for _, group in groups], target, bandwidth, budget)
    lines = [_line(label, group, terms) for label, group in groups]
    lines.sort(
        key=lambda line: -1.0 if line.mean.accuracy is None else line.mean.accuracy, reverse=True
    )
    return Comparison(tuple(lines), terms, runs[0].run.majority or 0.0)


def _check_comparable(runs: Sequence[Summary]) -> None:
    if not runs:
        raise BadInput("report: no runs given; name at least one run's folder")
    first = runs[0].run
    for run in runs:
        if run.run.data_digest != first.data_digest:
            raise BadInput(
                f"report: {first.name} is on data {first.data_digest}, {run.run.name} on {run.run.data_digest}; "
                "accuracies on different data do not compare, report them apart"
            )
    splits = sorted({run.split for run in runs if run.split is not None})
    if len(splits) > 1:
        raise BadInput(
            f"report: runs are scored on different splits ({', '.join(splits)}); report them apart"
        )


def _by_method(runs: Sequence[Summary]) -> list[tuple[str, list[Summary]]]:
    """Group runs by method; where those of one repeat a seed, by their other settings too, named after the run as well."""
    methods: dict[str, list[Summary]] = {}
    for run in runs:
        methods.setdefault(run.run.method, []).append(run)
    groups: list[tuple[str, list[Summary]]] = []
    for method, group in methods.items():
        if len({run.run.seed for run in group}) == len(group):
            groups.append((method, group))
            continue
        alike: dict[str, list[Summary]] = {}
        for run in group:
            alike.setdefault(_apart_from_seed(run.run), []).append(run)
        for some in alike.values():
            for runs_of_one in (
                [some]
                if len({run.run.seed for run in some}) == len(some)
                else [[run] for run in some]
            ):
                name = f"{method} ({runs_of_one[0].run.name})"
                again = sum(label.startswith(name) for label, _ in groups)
                groups.append((f"{name} {again + 1}" if again else name, runs_of_one))
    return groups


def _apart_from_seed(run: RunRow) -> str:
    """Return what runs have in common that differ in nothing but the seed."""
    settings = {name: value for name, value in run.settings.items() if name != "seed"}
    return json.dumps([run.name, settings], sort_keys=True, default=str)


def _line(label: str, runs: Sequence[Summary], terms: Terms) -> Line:
    each = tuple(_numbers(run, terms) for run in runs)
    return Line(
        label, tuple(runs), each, _combined(each, fmean), _combined(each, _sample_deviation)
    )


def _numbers(run: Summary, terms: Terms) -> Numbers:
    final, reached = run.final, None if terms.target is None else run.reached(terms.target)
    level, afford = run.after(terms.rounds), run.within(terms.budget)
    return Numbers(
        accuracy=final and final.accuracy,
        best_accuracy=max((point.accuracy for point in run.curve), default=None),
        macro_f1=final and final.macro_f1,
        over_majority=final and final.accuracy - (run.run.majority or 0.0),
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
        rounds_to_target=reached and reached.round,
        bytes_to_target=reached and reached.cost.bytes,
        seconds_to_target=reached and reached.cost.slowest_seconds,
        modelled_seconds_to_target=reached and reached.cost.modelled(terms.bandwidth),
        modelled_seconds_to_target_slora=reached and reached.cost.modelled(SLORA_LINK),
        equal_rounds_accuracy=level and level.accuracy,
        equal_rounds_bytes=level and level.cost.bytes,
        equal_bytes_accuracy=afford and afford.accuracy,
        equal_bytes_rounds=afford and afford.round,
    )


def _combined(each: Sequence[Numbers], rule: Callable[[Sequence[float]], float | None]) -> Numbers:
    """Return ``rule`` of every number over the seeds; None where a seed lacks it."""

    def column(name: str) -> float | None:
        values = [getattr(numbers, name) for numbers in each]
        return None if None in values else rule(values)

    return Numbers(**{field.name: column(field.name) for field in fields(Numbers)})


def _sample_deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
