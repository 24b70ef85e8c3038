"""A comparison as PNG figures: a line per method over rounds, traffic and modelled time."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from fedpeft.errors import BadInput
from fedpeft.report import captions
from fedpeft.report.comparison import Comparison, Line
from fedpeft.report.metric import Metric
from fedpeft.report.names import MOST, literal, plain
from fedpeft.report.numbers import sample_deviation
from fedpeft.report.strokes import Stroke, strokes_for
from fedpeft.report.summary import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes


LONGEST_TITLE = 120
"""Characters that fit above a figure."""


@dataclass(frozen=True)
class View:
    """One figure: its file, the label and the values along x, and whether x is logarithmic."""

    file: str
    label: str
    x: Callable[[Point], float]
    logarithmic: bool


@dataclass(frozen=True)
class Curve:
    """A method's mean over seeds, at every round at which all of its seeds were evaluated.

    ``mean``: of the score, a share in per cent. ``spread``: its sample standard deviation.
    """

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
    """Write ``<metric>_over_{rounds,megabytes,time}.png`` to the existing folder ``out``.

    Returns their paths. A line is the mean over seeds, its band a sample standard deviation either
    way; the dashed line is the majority class, where there is one. A method without any x above 0
    on a logarithmic axis, such as a reference that moves no bytes, is a level line.
    """
    check()
    return [_draw(compared, view, out / view.file) for view in _views(compared)]


def curve(line: Line, x: Callable[[Point], float]) -> Curve:
    """Return the method's curve over ``x``, which is averaged over seeds as well."""
    metric = line.runs[0].metric
    # 1. Group the evaluations of all seeds by round; of several after one round the last counts.
    evaluated: dict[int, list[Point]] = {}
    for run in line.runs:
        latest = {point.round: point for point in run.curve}
        for round_number, point in latest.items():
            evaluated.setdefault(round_number, []).append(point)
    # 2. Average over seeds, x as well: bytes and seconds differ from seed to seed.
    xs: list[float] = []
    means: list[float] = []
    spreads: list[float] = []
    for round_number in sorted(evaluated):
        points = evaluated[round_number]
        if len(points) < len(line.runs):
            continue  # a mean over fewer seeds would jump
        scores = [metric.in_unit(point.score) for point in points]
        xs.append(fmean(map(x, points)))
        means.append(fmean(scores))
        spreads.append(sample_deviation(scores) or 0.0)  # a single seed has no band
    return Curve(tuple(xs), tuple(means), tuple(spreads))


def _views(compared: Comparison) -> Iterable[View]:
    bandwidth = compared.terms.bandwidth
    link = f"{bandwidth / 1e6:.3g} MB/s"
    # Whoever writes a task names its metric, and not every name can be a file's.
    metric = re.sub(r"[^\w-]", "_", compared.metric.name)
    return (
        View(f"{metric}_over_rounds.png", "rounds", lambda point: point.round, logarithmic=False),
        View(
            f"{metric}_over_megabytes.png",
            "MB moved by all clients, down and up",
            _megabytes,
            logarithmic=True,
        ),
        View(
            f"{metric}_over_time.png",
            f"modelled minutes: per round the slowest transfer at {link} + the slowest training",
            lambda point: point.cost.modelled(bandwidth) / 60,
            logarithmic=True,
        ),
    )


def _megabytes(point: Point) -> float:
    return point.cost.bytes / 1e6


def _draw(compared: Comparison, view: View, path: Path) -> Path:
    from matplotlib.figure import Figure  # noqa: PLC0415  (optional, and slow to import)

    figure = Figure(figsize=(9, 5), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    # 1. Lines and bands. The scale comes first: matplotlib's margins depend on it.
    if view.logarithmic:
        axes.set_xscale("log")
    for line, stroke in zip(compared.lines, strokes_for(compared.lines), strict=True):
        _draw_line(axes, line, stroke, view, compared.metric)
    if compared.majority is not None:
        _draw_majority(axes, compared.majority, compared.metric)
    # 2. Labels, last: the ticks depend on the limits that the lines have set.
    if view.logarithmic:
        _label_decades(axes)
    _label_axes(axes, compared, view)
    _add_legend(axes, compared)
    figure.savefig(path)
    return path


def _draw_line(axes: "Axes", line: Line, stroke: Stroke, view: View, metric: Metric) -> None:
    drawn = curve(line, view.x)
    if line.mean.score is None or not drawn.x:
        return
    label = f"{literal(line.label, MOST)}  {metric.written(line.mean.score)}"
    # A logarithmic axis has no place for 0.
    shown = _above_zero(drawn) if view.logarithmic else drawn
    if not shown.x:
        axes.axhline(drawn.mean[-1], color=stroke.colour, linestyle=stroke.style, label=label)
        return
    axes.plot(
        shown.x,
        shown.mean,
        color=stroke.colour,
        linestyle=stroke.style,
        marker=stroke.marker,
        markersize=3.5,
        label=label,
    )
    low: list[float] = []
    high: list[float] = []
    for mean, spread in zip(shown.mean, shown.spread, strict=True):
        low.append(mean - spread)
        high.append(mean + spread)
    axes.fill_between(shown.x, low, high, color=stroke.colour, alpha=0.15, linewidth=0)


def _above_zero(drawn: Curve) -> Curve:
    """Return the part of a curve whose x is above 0."""
    xs: list[float] = []
    means: list[float] = []
    spreads: list[float] = []
    for x, mean, spread in zip(drawn.x, drawn.mean, drawn.spread, strict=True):
        if x > 0:
            xs.append(x)
            means.append(mean)
            spreads.append(spread)
    return Curve(tuple(xs), tuple(means), tuple(spreads))


def _draw_majority(axes: "Axes", majority: float, metric: Metric) -> None:
    axes.axhline(
        metric.in_unit(majority),
        color="#777777",
        linestyle="--",
        linewidth=1,
        label=f"{metric.trivial_answer}  {metric.written(majority)}",
    )


def _label_decades(axes: "Axes") -> None:
    """Write plain numbers along a logarithmic x.

    They stand at every power of ten and, where these are few, at its 2 and 5 as well.
    """
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415

    low, high = axes.get_xlim()
    # Within two decades there are few powers of ten, at worst none.
    multiples = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=multiples))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())  # else short axes get labels such as 2 x 10^1


def _label_axes(axes: "Axes", compared: Comparison, view: View) -> None:
    metric = compared.metric
    title = literal(captions.setting(compared.runs), LONGEST_TITLE)
    plain(axes.set_title(title, loc="left", fontsize=12, pad=12))
    axes.set_xlabel(view.label)
    direction = "" if metric.higher_is_better else f" ({metric.direction})"
    plain(axes.set_ylabel(_with_unit(metric) + direction))
    if metric.share:
        axes.set_ylim(bottom=0)  # differences between shares look as large as they are
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(axes: "Axes", compared: Comparison) -> None:
    seeds = max(len(line.runs) for line in compared.lines)
    heading = f"final {_with_unit(compared.metric)}"
    if seeds > 1:
        heading += f"\n(mean of {seeds} seeds,\nband ± 1 s.d.)"
    # Numbers are placeholders: matplotlib leaves lines with a label like "_name" out of a legend,
    # as it labels its own lines so. The names are put in below.
    numbers = [f"{index}" for index in range(len(axes.lines))]
    legend = axes.legend(
        axes.lines,
        numbers,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        title=heading,
        alignment="left",
    )
    plain(legend.get_title())
    for text, line in zip(legend.get_texts(), axes.lines, strict=True):
        text.set_text(str(line.get_label()))
        plain(text)


def _with_unit(metric: Metric) -> str:
    return f"{metric.label}, %" if metric.share else metric.label
