"""A comparison as rich tables: what each method reached at which cost, and the same at equal rounds and equal bytes."""

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from fedpeft.report import captions as words
from fedpeft.report.comparison import Comparison, Line
from fedpeft.report.names import literal
from fedpeft.report.terms import Terms

Column = tuple[str, Callable[[Line], str]]
"""A heading and what stands under it for one method."""

ABSENT = "-"


def comparison(compared: Comparison) -> Table:
    """Return the main table, made for 120 columns: a row per method, then the majority class, then the small print."""
    table = _table("Final accuracy and its cost", _columns(compared.terms), compared.lines)
    table.add_section()
    table.add_row("majority class", f"{100 * compared.majority:.1f}")
    table.caption = Text("\n".join(literal(line) for line in _small_print(compared) if line))
    return table


def equal_terms(compared: Comparison) -> Table:
    """Return the equal-rounds view and the equal-bytes view side by side."""
    terms = compared.terms
    rounds = ABSENT if terms.rounds is None else f"{terms.rounds}"
    columns: list[Column] = [
        ("method", lambda line: literal(line.label)),
        (
            f"accuracy %\nafter {rounds} rounds",
            lambda line: _percent(
                line.mean.equal_rounds_accuracy, line.spread.equal_rounds_accuracy
            ),
        ),
        ("MB\nby then", lambda line: _megabytes(line.mean.equal_rounds_bytes)),
        (
            f"accuracy %\nwithin {_megabytes(terms.budget)} MB",
            lambda line: _percent(line.mean.equal_bytes_accuracy, line.spread.equal_bytes_accuracy),
        ),
        ("rounds\nby then", lambda line: _rounds(line.mean.equal_bytes_rounds)),
    ]
    table = _table("At equal rounds and at equal bytes", columns, compared.lines)
    table.caption = f"{ABSENT}: no evaluation after exactly that round, or none before the traffic passed the budget"
    return table


def _table(title: str, columns: Sequence[Column], lines: Sequence[Line]) -> Table:
    table = Table(
        title=title, box=box.SIMPLE_HEAD, padding=0, title_justify="left", caption_justify="left"
    )
    for place, (heading, _) in enumerate(columns):
        table.add_column(
            Text(heading),
            justify="right" if place else "left",
            vertical="bottom",
            no_wrap=place > 0,
        )
    for line in lines:
        table.add_row(*(Text(cell(line)) for _, cell in columns))
    return table


def _columns(terms: Terms) -> list[Column]:
    link = f"{terms.bandwidth / 1e6:.3g} MB/s"
    return [
        ("method", lambda line: literal(line.label)),
        ("accuracy\n%", lambda line: _percent(line.mean.accuracy, line.spread.accuracy)),
        ("macro\nF1 %", lambda line: _percent(line.mean.macro_f1)),
        ("over\nmajority", lambda line: _gain(line.mean.over_majority)),
        (
            "trained\nweights",
            lambda line: _trained(line.mean.trained_first, line.mean.trained_last),
        ),
        ("MB\ndown", lambda line: _megabytes(line.mean.down_bytes)),
        ("MB\nup", lambda line: _megabytes(line.mean.up_bytes)),
        ("rounds\nto\ntarget", lambda line: _rounds(line.mean.rounds_to_target)),
        ("MB\nto\ntarget", lambda line: _megabytes(line.mean.bytes_to_target)),
        (f"modelled\nmin at\n{link}", lambda line: _minutes(line.mean.modelled_seconds_to_target)),
        (
            "modelled\nmin at\n5 Mbit/s",
            lambda line: _minutes(line.mean.modelled_seconds_to_target_slora),
        ),
        ("s per\nclient\nround", lambda line: _number(line.mean.seconds_per_client_round)),
        ("peak\nMB", lambda line: _megabytes(line.mean.peak_memory_bytes)),
        ("lost", lambda line: f"{sum(sum(run.lost.values()) for run in line.runs)}"),
    ]


def _small_print(compared: Comparison) -> list[str]:
    runs = compared.runs
    slowest = "modelled min to target: per round the slowest client's bytes / bandwidth"
    return [
        words.setting(runs),
        words.provenance(runs),
        words.target(compared.terms),
        "± sample standard deviation over seeds; a number to target only where every seed reached it",
        "counted: weights (first round → last), MB (10^6 bytes, all clients); measured: s per client round, peak MB",
        f"{slowest} + its longest training alone",
        words.stacks(runs),
        words.losses(runs),
        words.unfinished(runs),
    ]


def _percent(share: float | None, spread: float | None = None) -> str:
    if share is None:
        return ABSENT
    return f"{100 * share:.1f}" if spread is None else f"{100 * share:.1f} ± {100 * spread:.1f}"


def _gain(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:+.1f}"


def _number(value: float | None) -> str:
    """Return ``value`` with three significant digits or, from 100 on, as a whole number."""
    if value is None:
        return ABSENT
    return f"{value:.0f}" if value == 0 or value >= 99.95 else f"{value:#.3g}"


def _rounds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"


def _megabytes(size: float | None) -> str:
    return _number(None if size is None else size / 1e6)


def _minutes(seconds: float | None) -> str:
    return _number(None if seconds is None else seconds / 60)


def _count(weights: float | None) -> str:
    if weights is None:
        return ABSENT
    unit, name = next(
        ((unit, name) for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if weights >= unit),
        (1, ""),
    )
    return f"{_number(weights / unit)}{name}"


def _trained(first: float | None, last: float | None) -> str:
    return _count(first) if first == last else f"{_count(first)}→{_count(last)}"
