"""A comparison as PNG figures: accuracy over rounds, over traffic and over modelled time, a line per method."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from fedpeft.errors import BadInput
from fedpeft.report import captions as words
from fedpeft.report.comparison import Comparison, Line
from fedpeft.report.names import MOST, literal, plain
from fedpeft.report.summary import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Stroke:
    """How a line looks."""

    colour: str
    style: str
    marker: str


# Okabe and Ito (2008), with Tol's wine for the yellow and the black; past seven methods the dashes change.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
STYLES = ("-", "--", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREYS = ("#333333", "#999999", "#666666")

LONGEST_TITLE = 120
"""Characters that fit above a figure."""


@dataclass(frozen=True)
class View:
    """One figure: its file, what is along x, and whether x is logarithmic."""

    file: str
    label: str
    x: Callable[[Point], float]
    logarithmic: bool


@dataclass(frozen=True)
class Curve:
    """A method's mean over seeds at every round all of them were evaluated after; accuracies in per cent."""

    x: tuple[float, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]


def check() -> None:
    """Raise BadInput, with what to install, when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401, PLC0415
    except ImportError as error:
        raise BadInput(
            "figures need matplotlib: pip install 'fedpeft[plots]', or ask for a report without"
        ) from error


def save(compared: Comparison, out: Path) -> list[Path]:
    """Write ``accuracy_over_{rounds,megabytes,time}.png`` to the existing folder ``out`` and return their paths.

    Lines are means over seeds, bands a sample standard deviation either way, the dashes the majority class. A method
    without any x above 0 on a logarithmic axis, such as a reference that moves no bytes, is a level line.
    """
    check()
    return [_draw(compared, view, out / view.file) for view in _views(compared.terms.bandwidth)]


def curve(line: Line, x: Callable[[Point], float]) -> Curve:
    """Return the method's curve over ``x``, which is averaged over seeds as well."""
    by_round = [{point.round: point for point in run.curve} for run in line.runs]
    common = sorted(set.intersection(*(set(points) for points in by_round)))
    columns = [[points[number] for points in by_round] for number in common]
    accuracies = [[100 * point.accuracy for point in column] for column in columns]
    return Curve(
        x=tuple(fmean(x(point) for point in column) for column in columns),
        mean=tuple(fmean(column) for column in accuracies),
        spread=tuple(stdev(column) if len(column) > 1 else 0.0 for column in accuracies),
    )


def _views(bandwidth: float) -> Iterable[View]:
    link = f"{bandwidth / 1e6:.3g} MB/s"
    return (
        View("accuracy_over_rounds.png", "rounds", lambda point: point.round, logarithmic=False),
        View(
            "accuracy_over_megabytes.png",
            "MB moved by all clients, down and up",
            _megabytes,
            logarithmic=True,
        ),
        View(
            "accuracy_over_time.png",
            f"modelled minutes: per round the slowest transfer at {link} + the slowest training",
            lambda point: point.cost.modelled(bandwidth) / 60,
            logarithmic=True,
        ),
    )


def _megabytes(point: Point) -> float:
    return point.cost.bytes / 1e6


def _strokes(lines: Sequence[Line]) -> list[Stroke]:
    """Return a stroke per line, the same in every figure: colours for methods, dotted greys for references."""
    strokes, methods, references = [], 0, 0
    for line in lines:
        if any(run.federated for run in line.runs):
            again, place = divmod(methods, len(PALETTE))
            strokes.append(Stroke(PALETTE[place], STYLES[again % len(STYLES)], MARKERS[place]))
            methods += 1
        else:
            strokes.append(Stroke(GREYS[references % len(GREYS)], ":", "."))
            references += 1
    return strokes


def _draw(compared: Comparison, view: View, path: Path) -> Path:
    from matplotlib.figure import Figure  # noqa: PLC0415  (optional, and slow to import)

    figure = Figure(figsize=(9, 5), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    if view.logarithmic:
        axes.set_xscale("log")
    for line, stroke in zip(compared.lines, _strokes(compared.lines), strict=True):
        _plot(axes, line, stroke, view)
    majority = 100 * compared.majority
    axes.axhline(
        majority,
        color="#777777",
        linestyle="--",
        linewidth=1,
        label=f"majority class  {majority:.1f}",
    )
    if view.logarithmic:
        _label_decades(axes)
    _dress(axes, compared, view)
    figure.savefig(path)
    return path


def _plot(axes: "Axes", line: Line, stroke: Stroke, view: View) -> None:
    drawn = curve(line, view.x)
    if line.mean.accuracy is None or not drawn.x:
        return
    label = f"{literal(line.label, MOST)}  {100 * line.mean.accuracy:.1f}"
    shown = [at for at, x in enumerate(drawn.x) if x > 0 or not view.logarithmic]
    if not shown:
        axes.axhline(drawn.mean[-1], color=stroke.colour, linestyle=stroke.style, label=label)
        return
    x, mean, spread = (
        [column[at] for at in shown] for column in (drawn.x, drawn.mean, drawn.spread)
    )
    axes.plot(
        x,
        mean,
        color=stroke.colour,
        linestyle=stroke.style,
        marker=stroke.marker,
        markersize=3.5,
        label=label,
    )
    low = [centre - width for centre, width in zip(mean, spread, strict=True)]
    high = [centre + width for centre, width in zip(mean, spread, strict=True)]
    axes.fill_between(x, low, high, color=stroke.colour, alpha=0.15, linewidth=0)


def _label_decades(axes: "Axes") -> None:
    """Write plain numbers along a logarithmic x: at every power of ten, also at its 2 and 5 where there are few."""
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _dress(axes: "Axes", compared: Comparison, view: View) -> None:
    title = literal(words.setting(compared.runs), LONGEST_TITLE)
    plain(axes.set_title(title, loc="left", fontsize=12, pad=12))
    axes.set_xlabel(view.label)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    seeds = max(len(line.runs) for line in compared.lines)
    heading = "final accuracy, %" + (
        f"\n(mean of {seeds} seeds,\nband ± 1 s.d.)" if seeds > 1 else ""
    )
    # By numbers at first: a legend leaves out what is called "_so", as matplotlib calls its own.
    numbers = [f"{number}" for number in range(len(axes.lines))]
    legend = axes.legend(
        axes.lines,
        numbers,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        title=heading,
        alignment="left",
    )
    for text, line in zip(legend.get_texts(), axes.lines, strict=True):
        text.set_text(str(line.get_label()))
        plain(text)
