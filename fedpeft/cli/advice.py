"""``fedpeft advise`` in the terminal: methods that fit, those that do not and why, and sources."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedpeft.experiment.advise import Advice, Judged
from fedpeft.experiment.findings import Study
from fedpeft.report.names import literal


@contextmanager
def told_on(err: Console) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows which method is tried, on a terminal; elsewhere nothing is."""
    if not err.is_terminal:
        yield lambda _: None
        return
    with err.status("reading data and model") as status:
        yield lambda method: status.update(f"trying {literal(method)}")


def view(advice: Advice) -> RenderableType:
    """Return all of it, made for 120 columns."""
    parts: list[RenderableType] = [Text("\n".join(_setting(advice))), ""]
    if advice.fitting:
        parts.append(_table(advice))
    else:
        parts.append("No method fits.")
    parts.append(Text("\n".join(_sources(advice))))
    if advice.left_out:
        parts.append(Text("\n".join(["", "Left out", *_left_out(advice)])))
    return Group(*parts)


def _setting(advice: Advice) -> list[str]:
    return [
        f"{literal(advice.name)}: {advice.task}, {literal(advice.data)}, {literal(advice.model)} "
        f"({advice.parameters / 1e6:.3g} M weights), {advice.clients} clients, "
        f"{advice.clients_per_round} a round, {advice.rounds} rounds",
        *advice.skew.lines(),
    ]


def _table(advice: Advice) -> Table:
    """Return the methods that fit."""
    table = Table(title="Methods that fit", box=box.SIMPLE_HEAD, padding=0, title_justify="left")
    table.add_column("\n\nmethod", vertical="bottom")
    headings = ["counted\nMB down\na round", "\nMB up\na round", "\nweights\ntrained"]
    headings += ["measured\ns a\nstep", "\npeak\nMB"]
    for name in advice.fleet or ("",):
        headings.append(f"modelled\ns a round\n{literal(name)}")
    for study in advice.studies:
        headings.append(f"found\n{study.metric}\n[{study.name}]")
    for heading in headings:
        table.add_column(Text(heading), justify="right", vertical="bottom", no_wrap=True)
    for one in advice.fitting:
        table.add_row(*_cells(one, advice))
    return table


def _cells(one: Judged, advice: Advice) -> list[Text]:
    cells = [one.method]
    if one.cost is not None:
        cost = one.cost
        down, up = [size / 1e6 for size in cost.down], [size / 1e6 for size in cost.up]
        trained = [_weights(number) for number in cost.trained]
        cells += [_course(down), _course(up), "→".join(dict.fromkeys(trained))]
        memory = f"{cost.peak_memory / 1e6:.0f}" if cost.peak_memory else "-"
        least, most = cost.step_seconds[0], cost.step_seconds[-1]
        cells += [f"{cost.step:.2g} ({least:.2g}-{most:.2g})", memory]
        for seconds in one.seconds:
            cells.append("-" if seconds is None else f"{seconds:.3g}")
    for study in advice.studies:
        cells.append(study.scores.get(one.method, "-"))
    return [Text(literal(cell)) for cell in cells]


def _course(numbers: list[float]) -> str:
    """Return the first and the last of some numbers, and the largest where it is another one.

    >>> _course([0.5, 0.5]), _course([2.0, 1.0]), _course([1.0, 3.0, 2.0])
    ('0.5', '2→1', '1→2, at most 3')
    """
    first, last, most = f"{numbers[0]:.3g}", f"{numbers[-1]:.3g}", f"{max(numbers):.3g}"
    course = first if first == last else f"{first}→{last}"
    return course + ("" if most in (first, last) else f", at most {most}")


def _weights(number: int) -> str:
    """Return a number of weights with three digits.

    >>> _weights(81_428), _weights(22_700_000)
    ('81.4k', '22.7M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _sources(advice: Advice) -> list[str]:
    """Return where the figures come from, a line each."""
    steps = {one.cost.timed_steps for one in advice.methods if one.cost is not None}
    measured = f"{max(steps)} steps" if steps else "no steps"
    lines = [
        f"counted: MB (10^6 bytes) of the client with most of them, first → last of "
        f"{advice.rehearsed} rounds played here; schedules are shortened",
        f"measured here: median of {measured} of one client alone (fastest-slowest round); peak of "
        "this process, model and data",
        f"  included; {advice.machine}",
        _model(advice),
    ]
    if levels := [one.method for one in advice.methods if one.levels]:
        lines.append(f"weak clients get as much as any other from {', '.join(levels)}")
    if advice.studies:
        lines.append("found under like skew (total variation of two clients):")
        for study in advice.studies:
            lines += _cited(study)
    else:
        lines.append(f"found: no run of {advice.task} under like skew is on record")
    if advice.others:
        lines.append("under other skew, not shown:")
        for study in advice.others:
            lines.append(f"  {study.name}: {study.command}; {study.page}; {_variation(study)}")
    return lines


def _model(advice: Advice) -> str:
    rate = advice.limits.rate
    link = f"most bytes at {rate / 1e6:.3g} MB/s" if rate is not None else "no time for transfers"
    if not advice.fleet:
        return f"modelled: s a step x steps of the client with most of them, and {link}"
    if rate is None:
        link = "most bytes at its bandwidth"
    return f"modelled: step_seconds of the class x its most steps, and {link}; nobody is slow"


def _cited(study: Study) -> list[str]:
    seeds = "1 seed" if study.seeds == 1 else f"{study.seeds} seeds"
    metric = f"{study.metric} {study.unit}".strip()
    return [
        f"  [{study.name}] {metric}: {study.command}; {study.page}, {study.section!r}",
        f"    {study.data}, {study.model}, {study.clients} clients, {study.clients_per_round} a "
        f"round, {study.rounds} rounds, {seeds}, {_variation(study)}; rates {study.rates}",
    ]


def _variation(study: Study) -> str:
    if study.total_variation is None:
        return "no labels"
    return f"variation {study.total_variation:.2f}"


def _left_out(advice: Advice) -> list[str]:
    return [f"  {one.method}: {literal(one.out or '')}" for one in advice.left_out]
