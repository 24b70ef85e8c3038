"""A comparison as tables of rich: what each method reached at which cost, also on equal terms."""

import math
from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from fedpeft.report import captions, rates
from fedpeft.report.comparison import Comparison, Line
from fedpeft.report.metric import Metric, significant, spelled
from fedpeft.report.names import literal
from fedpeft.report.terms import Terms

Column = tuple[str, Callable[[Line], str]]
"""A heading and what stands under it for one method."""

ABSENT = "-"

COUNT_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
"""Sizes and names of the units for numbers of weights, the largest first."""


def comparison(compared: Comparison) -> Table:
    """Return the main table, made for 120 columns: methods, majority class, captions."""
    metric = compared.metric
    columns = [("method", _name), *_score_columns(compared), *_cost_columns(compared.terms)]
    table = _table(f"Final {metric.label} and its cost", columns, compared.lines)
    if compared.majority is not None:
        table.add_section()
        table.add_row(metric.trivial_answer, metric.written(compared.majority))
    shown: list[str] = []
    for line in _small_print(compared):
        if line:
            shown.append(literal(line))
    table.caption = Text("\n".join(shown))
    return table


def equal_terms(compared: Comparison) -> Table:
    """Return the equal-rounds view and the equal-bytes view side by side."""
    metric, terms = compared.metric, compared.terms
    heading = f"{metric.label} %" if metric.share else metric.label
    rounds = ABSENT if terms.rounds is None else f"{terms.rounds}"
    budget = _megabytes(terms.budget)

    def after_rounds(line: Line) -> str:
        return _score(metric, line.mean.equal_rounds_score, line.spread.equal_rounds_score)

    def within_budget(line: Line) -> str:
        return _score(metric, line.mean.equal_bytes_score, line.spread.equal_bytes_score)

    columns: list[Column] = [
        ("method", _name),
        (f"{heading}\nafter {rounds} rounds", after_rounds),
        ("MB\nby then", lambda line: _megabytes(line.mean.equal_rounds_bytes)),
        (f"{heading}\nwithin {budget} MB", within_budget),
        ("rounds\nby then", lambda line: _rounds(line.mean.equal_bytes_rounds)),
    ]
    table = _table("At equal rounds and at equal bytes", columns, compared.lines)
    table.caption = (
        f"{ABSENT}: no evaluation after exactly that round, "
        "or none before the traffic passed the budget"
    )
    return table


def devices(compared: Comparison) -> Table | None:
    """Return what became of the requests, by method and class of devices; None without a fleet."""
    table = Table(
        title="Requests by class of devices, over all seeds",
        box=box.SIMPLE_HEAD,
        padding=0,
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("method", "device"):
        table.add_column(heading, vertical="bottom")
    for heading in ("clients", "asked", "used", "dropped\nout", "late", "lost\notherwise"):
        table.add_column(heading, justify="right", vertical="bottom")
    for line in compared.lines:
        for name, answers in line.devices.items():
            figures = (
                answers.clients,
                answers.asked,
                answers.used,
                answers.dropped,
                answers.late,
                answers.lost,
            )
            cells = [Text(_name(line)), Text(literal(name)), *map(Text, map(str, figures))]
            table.add_row(*cells)
    return table if table.row_count else None


def _table(title: str, columns: Sequence[Column], lines: Sequence[Line]) -> Table:
    """Return a table whose first column is on the left and may wrap, unlike the numbers."""
    table = Table(
        title=title, box=box.SIMPLE_HEAD, padding=0, title_justify="left", caption_justify="left"
    )
    # Headings and cells are `Text`: rich would read "[b]" in a user's name as markup.
    names, *numbers = [Text(heading) for heading, _ in columns]
    table.add_column(names, justify="left", vertical="bottom", no_wrap=False)
    for heading in numbers:
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for line in lines:
        cells: list[Text] = []
        for _, cell in columns:
            cells.append(Text(cell(line)))
        table.add_row(*cells)
    return table


def _score_columns(compared: Comparison) -> list[Column]:
    """Return what was reached: the metric, the score on clients' own texts, the gain over majority.

    Where clients were not scored by themselves the score at the start has that place, and where
    that was not either, the first of the other metrics.
    """
    metric = compared.metric

    def score(line: Line) -> str:
        return _score(metric, line.mean.score, line.spread.score)

    def start(line: Line) -> str:
        return _score(metric, line.mean.start_score, line.spread.start_score)

    columns: list[Column] = [(_heading(metric.name, metric.share), score)]
    # One more score alone: there are 120 columns; the CSV files have all.
    if any(line.mean.client_score is not None for line in compared.lines):
        columns.append(("on\nown\ntexts", lambda line: _score(metric, line.mean.client_score)))
    elif any(line.mean.start_score is not None for line in compared.lines):
        columns.append(("at\nthe\nstart", start))
    elif compared.others:
        other = compared.others[0]
        heading = _heading(other, metric.share)
        columns.append((heading, lambda line: _score(metric, line.mean.others[other])))
    if compared.majority is not None:
        baseline = metric.trivial_answer.split()[0]
        heading = f"over\n{baseline}" if metric.higher_is_better else f"below\n{baseline}"
        columns.append((heading, lambda line: _gain(metric, line.mean.over_majority)))
    return [*columns, *_privacy_columns(compared)]


def _privacy_columns(compared: Comparison) -> list[Column]:
    """Return a column for every unit of privacy that any run makes a promise to."""
    units: list[Column] = [
        ("ε of\nclients", lambda line: _number(line.mean.epsilon_clients)),
        ("ε of\nrows", lambda line: _number(line.mean.epsilon_examples)),
    ]
    columns: list[Column] = []
    for heading, cell in units:
        if any(cell(line) != ABSENT for line in compared.lines):
            columns.append((heading, cell))
    return columns


def _cost_columns(terms: Terms) -> list[Column]:
    link = f"{terms.bandwidth / 1e6:.3g} MB/s"

    def modelled(line: Line) -> str:
        return _minutes(line.mean.modelled_seconds_to_target)

    def modelled_slora(line: Line) -> str:
        return _minutes(line.mean.modelled_seconds_to_target_slora)

    return [
        ("trained\nweights", _trained),
        ("MB\ndown", lambda line: _megabytes(line.mean.down_bytes)),
        ("MB\nup", lambda line: _megabytes(line.mean.up_bytes)),
        ("rounds\nto\ntarget", lambda line: _rounds(line.mean.rounds_to_target)),
        ("MB\nto\ntarget", lambda line: _megabytes(line.mean.bytes_to_target)),
        (f"modelled\nmin at\n{link}", modelled),
        ("modelled\nmin at\n5 Mbit/s", modelled_slora),
        ("s per\nclient\nround", lambda line: _number(line.mean.seconds_per_client_round)),
        ("peak\nMB", lambda line: _megabytes(line.mean.peak_memory_bytes)),
        ("lost", _lost),
    ]


def _heading(name: str, share: bool) -> str:
    r"""Return the name of a metric, one word a line; the unit has a line only below a single word.

    >>> _heading("accuracy", share=True), _heading("macro_f1", share=True)
    ('accuracy\n%', 'macro\nF1 %')
    """
    words = spelled(name).split()
    if share and len(words) > 1:
        words[-1] += " %"
    elif share:
        words.append("%")
    return "\n".join(words)


def _small_print(compared: Comparison) -> list[str]:
    """Return the lines below the main table; those that do not apply are empty."""
    runs = compared.runs
    return [
        captions.setting(runs),
        captions.provenance(runs),
        captions.target(compared.terms, compared.metric),
        "± sample standard deviation over seeds; "
        "a number to target only where every seed reached it",
        "counted: weights (first round → last), MB (10^6 bytes, all clients); "
        "measured: s per client round, peak MB",
        "modelled min to target: per round the slowest client's bytes / bandwidth "
        "+ its longest training alone",
        captions.stacks(runs),
        captions.personal(compared.lines),
        captions.privacy(runs),
        captions.losses(runs),
        captions.unfinished(runs),
        rates.named(runs),
        rates.warning(runs),
    ]


def _name(line: Line) -> str:
    return literal(line.label)


def _lost(line: Line) -> str:
    lost = 0
    for run in line.runs:
        lost += sum(run.lost.values())
    return f"{lost}"


def _trained(line: Line) -> str:
    """Return the weights trained in the first round and, if they are others, in the last."""
    first, last = line.mean.trained_first, line.mean.trained_last
    return _count(first) if first == last else f"{_count(first)}→{_count(last)}"


def _score(metric: Metric, score: float | None, spread: float | None = None) -> str:
    if score is None:
        return ABSENT
    written = metric.written(score)
    return written if spread is None else f"{written} ± {metric.written(spread)}"


def _gain(metric: Metric, gain: float | None) -> str:
    """Return ``gain`` with its sign: above 0 is better, whichever way the metric goes."""
    if gain is None:
        return ABSENT
    sign = "-" if math.copysign(1, gain) < 0 else "+"  # of -0.0, too
    return sign + metric.written(abs(gain))


def _number(value: float | None) -> str:
    return ABSENT if value is None else significant(value)


def _rounds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"


def _megabytes(size: float | None) -> str:
    return ABSENT if size is None else significant(size / 1e6)


def _minutes(seconds: float | None) -> str:
    return ABSENT if seconds is None else significant(seconds / 60)


def _count(weights: float | None) -> str:
    if weights is None:
        return ABSENT
    for size, name in COUNT_UNITS:
        if weights >= size:
            return f"{significant(weights / size)}{name}"
    return significant(weights)
