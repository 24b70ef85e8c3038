"""Names are literal text in every table and picture, whatever characters the user gave them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console, RenderableType

from fedpeft.cli import progress
from fedpeft.data import Dataset, Rows, by_key
from fedpeft.data import view as client_data
from fedpeft.report import figures, tables
from fedpeft.report.comparison import compare
from fedpeft.report.names import literal

from .test_report import simple

MATHS = ["$\\frac{$", "$5-$10", "back\\slash\\"]
MARKUP = ["[/x]", "[bold]b[/]", ":fire:"]
CONTROL = ["a\tb\nc", "\x1b[31mred"]
ODD = [*MATHS, *MARKUP, *CONTROL, "_hidden by matplotlib", "ü 猫"]

LONG = "long " * 60


def printed(renderable: RenderableType) -> str:
    console = Console(width=200, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def dataset(names: list[str]) -> Dataset:
    """Return a data set that is called, labelled and keyed by ``names``; each has two rows."""
    texts = tuple(f"text {row}" for row in range(2 * len(names)))
    rows = Rows.of_texts(texts, (*names, *names), (*names, *names))
    return Dataset(f"data/{names[0]}", rows, rows, rows)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    found: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        found.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


@given(st.text())
def test_a_name_becomes_one_printable_line(name: str) -> None:
    shown = literal(name)
    assert "\n" not in shown
    assert len((shown + "x").splitlines()) == 1
    if name.isprintable():
        assert shown == name
    assert literal(name, 10) == (shown if len(shown) <= 10 else shown[:9] + "…")


def test_what_would_act_on_the_terminal_is_written_out() -> None:
    assert literal("a\tb\r\n\x1b[0m") == r"a\tb\r\n\x1b[0m"
    assert literal("\x85\u2028\u202e\ud800") == r"\x85\u2028\u202e\ud800"
    assert literal("\\n $x$ [b] ü 猫 \u200d") == "\\n $x$ [b] ü 猫 \u200d"


@pytest.mark.parametrize("name", ODD)
def test_a_partitions_table_shows_names_as_they_are(name: str) -> None:
    data = dataset([name, "other"])
    lines = printed(client_data.table(data, by_key(data))).splitlines()
    assert f"data/{literal(name)}: 2 clients" in lines[0]
    own = next(line for line in lines[2:] if line.strip().startswith(literal(name)))
    assert own.rstrip().endswith(f"{literal(name)} 100%")


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_a_partitions_picture_shows_names_as_they_are(tmp_path: Path, drawn: list[Figure]) -> None:
    for names in ([*ODD, LONG], ["$\\frac{$", LONG]):
        data = dataset(names)
        client_data.picture(data, by_key(data), tmp_path / "who.png")
        axes = drawn.pop().axes[0]
        shown = [literal(name, 40) for name in sorted(names)]
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            assert [label.get_text() for label in labels] == shown
            assert not any(label.get_parse_math() for label in labels)
        assert axes.get_title(loc="left").startswith(f"data/{literal(names[0])}: who holds what")
        assert axes.get_window_extent().width > 20
        assert axes.get_window_extent().height > 20


def test_a_picture_of_thousands_of_clients_is_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    data = dataset([f"user {number}" for number in range(2500)])
    few = replace(data, train=replace(data.train, labels=("a", "b") * 2500))
    client_data.picture(few, by_key(few), tmp_path / "who.png")
    names = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert names == sorted(few.train.keys[:2500])[::11]  # 2500 = 10.4 * 240


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_a_reports_figures_show_names_as_they_are(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = []
    for place, name in enumerate([*ODD, LONG]):
        run = simple(tmp_path / f"{place}", "lora", [0.5 - place / 100, 0.9 - place / 100], 1)
        about = replace(run.run, name=f"{place}", method=name, data=f"data/{ODD[0]}")
        runs.append(replace(run, run=about))
    figures.save(compare(runs), tmp_path)
    for figure in drawn:
        axes = figure.axes[0]
        legend = axes.get_legend()
        assert legend is not None
        texts = [text.get_text() for text in legend.get_texts()]
        names = enumerate([*ODD, LONG])
        methods = [f"{literal(name, 40)}  {90 - place:.1f}" for place, name in names]
        assert texts == [*methods, "majority class  25.0"]
        assert axes.get_title(loc="left").startswith(f"{literal(ODD[0])} · minilm")
        assert not any(text.get_parse_math() for text in legend.get_texts())
        assert axes.get_window_extent().width > 200


@pytest.mark.parametrize("name", ODD)
def test_a_reports_tables_show_names_as_they_are(name: str, tmp_path: Path) -> None:
    runs = []
    for place, method in enumerate((name, "other")):
        run = simple(tmp_path, f"lora{place}", [0.5], 1)
        runs.append(replace(run, run=replace(run.run, method=method, data=f"data/{name}")))
    compared = compare(runs)
    for table in (tables.comparison(compared), tables.equal_terms(compared)):
        lines = [line.strip() for line in printed(table).splitlines()]
        assert any(line.startswith(f"{literal(name)} ") for line in lines)
    last = literal(Path(name).name)  # of a path its last part
    assert f"{last} · minilm" in printed(tables.comparison(compared))


@pytest.mark.parametrize("name", ["[/x]", ":fire:", "$x$"])
def test_a_progress_bar_shows_names_as_they_are(name: str) -> None:
    console = Console(width=120, force_terminal=True, color_system=None)
    with console.capture() as capture, progress.progress_bars(console) as watch:
        watch(name)
    assert name in capture.get()
