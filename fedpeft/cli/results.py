"""The commands for what a run does and has learnt: watch, export, predict, report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedpeft.cli.interrupts import ended_as_interrupted
from fedpeft.cli.options import Bandwidth, Folder, NewFolder, Target
from fedpeft.cli.output import out, say, write_report


def watch(run: Folder) -> None:
    """Follow a run that another process trains, here or on sites, until it ends."""
    from fedpeft.cli.watch import follow

    with ended_as_interrupted():
        follow(run, out)


def export(
    run: Folder,
    folder: NewFolder,
    merge: Annotated[
        bool, typer.Option("--merge", help="The whole model with the adapters merged in.")
    ] = False,
) -> None:
    """Write what a run has learnt as a peft adapter, or merged as a transformers model."""
    from fedpeft.experiment.trained import open_run
    from fedpeft.models.export import refuse_existing

    refuse_existing(folder)  # before the model is loaded
    open_run(run, say).export(folder, merge=merge)
    say(str(folder))


def predict(
    run: Folder,
    texts: Annotated[list[str], typer.Argument(help="Texts.", show_default=False)],
    context: Annotated[
        str | None,
        typer.Option(
            help="The second text of each pair, or the one with the answers.", show_default=False
        ),
    ] = None,
    before: Annotated[
        bool, typer.Option("--before", help="Also what the model said before it was tuned.")
    ] = False,
) -> None:
    """Answer texts with what a run has learnt: their labels, the names in them, or answers."""
    from fedpeft.experiment.trained import open_run
    from fedpeft.report.names import literal

    trained = open_run(run, say)
    answers: Sequence[Any] = trained.predict(texts, context)  # named tuples
    columns, rows = [*answers[0]._fields], [[*answer] for answer in answers]
    if before:
        columns += [f"{name} before" for name in columns]
        earlier = trained.untuned().predict(texts, context)
        rows = [[*row, *answer] for row, answer in zip(rows, earlier, strict=True)]
    table = Table(box=None)
    for heading in (*columns, "text"):
        table.add_column(heading, overflow="fold")  # nothing of a long answer is cut off
    for text, row in zip(texts, rows, strict=True):
        cells: list[Text | str] = []
        for value in row:
            cells.append(f"{value:.3f}" if isinstance(value, float) else Text(literal(str(value))))
        table.add_row(*cells, Text(text))
    out.print(table)


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders, or a folder of them.", show_default=False)
    ],
    to: Annotated[Path, typer.Option(help="Where CSV and PNG files go.")] = Path("report"),
    target: Target = None,
    bandwidth: Bandwidth = 1e6,
) -> None:
    """Report on runs: tables here; CSV and PNG files in a folder."""
    from fedpeft.experiment.run_folder import runs_in

    runs: list[Path] = []
    for folder in folders:
        runs += runs_in(folder)
    write_report(runs, to, target, bandwidth)
