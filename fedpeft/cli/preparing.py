"""The commands that help before a run: methods, config, init, partition, advise."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.cli.catalogue import catalogue
from fedpeft.cli.options import Config, Set
from fedpeft.cli.output import say, wide


def methods() -> None:
    """List the methods."""
    table = Table("name", "what it does", "paper", box=None)
    for entry in catalogue():
        table.add_row(Text(entry.name), Text(entry.purpose), Text(entry.paper))
    wide().print(table)


def explain(
    name: Annotated[
        str,
        typer.Argument(help="A section, such as training, or a method; default: all of them."),
    ] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As a page of Markdown: docs/config.md.")
    ] = False,
) -> None:
    """Explain the fields of a configuration: what they take, their defaults, what they mean."""
    from fedpeft.experiment import reference

    described = [reference.section(name)] if name else reference.sections()
    if markdown:
        typer.echo(reference.page(described), nl=False)
        return
    for one in described:
        table = Table("field", "takes", "default", "meaning", box=None)
        for field in one.fields:
            # As ``Text``, since rich takes brackets in plain strings for markup.
            takes, meaning = Text(field.takes), Text(field.meaning)
            table.add_row(Text(field.name), takes, Text(field.default), meaning)
        wide().print(Text(f"{one.heading}\n{one.about}"), table, "")


def init(
    config: Annotated[Path, typer.Argument(help="The TOML file to write.", show_default=False)],
    train: Annotated[
        Path, typer.Option(help="The file of the training texts.", show_default=False)
    ],
    test: Annotated[
        Path | None, typer.Option(help="That of the test texts; default: a part of train.")
    ] = None,
    method: Annotated[str, typer.Option(help="The method's name.")] = "lora",
    task: Annotated[
        str | None,
        typer.Option(
            help="classification, tagging, qa or causal_lm; default: told from the columns.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a short configuration for your own data, which runs as it is."""
    from fedpeft.experiment.starter import write_starter

    for line in write_starter(config, train=train, test=test, method=method, task=task):
        say(line)


def partition(
    config: Config,
    settings: Set = [],
    png: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("partition.png"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print how unlike clients are, as JSON, and no more.")
    ] = False,
) -> None:
    """Show who holds what and how unlike clients are, as a table and a PNG."""
    from fedpeft.cli import parsing
    from fedpeft.data import view
    from fedpeft.data.heterogeneity import heterogeneity
    from fedpeft.experiment.config import from_tree
    from fedpeft.experiment.reading import divide, read_data

    chosen = from_tree(parsing.settings(config, settings, say))
    dataset = read_data(chosen)
    divided = divide(chosen, dataset)
    summary = heterogeneity(dataset, divided)
    if as_json:
        typer.echo(json.dumps(summary.to_json()))
        return
    view.picture(dataset, divided, png)
    lines = "\n".join(summary.lines())
    wide().print(view.table(dataset, divided), Text(f"\n{lines}\n\n{png}"))
    for note in divided.notes:
        typer.echo(note)


def advise(
    config: Config,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; default: all that exchange anything.")
    ] = "",
    bandwidth: Annotated[
        str,
        typer.Option(
            help="A client's link, such as 10Mbit/s (plain: bytes per second), or what it may move "
            "in a round, such as 20MB.",
            show_default=False,
        ),
    ] = "",
    memory: Annotated[
        str,
        typer.Option(help="A client's memory, such as 4GB (plain: GB).", show_default=False),
    ] = "",
    deadline: Annotated[
        str,
        typer.Option(help="Time for a round, such as 30s (plain: seconds).", show_default=False),
    ] = "",
    settings: Set = [],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and no more.")] = False,
) -> None:
    """Show which methods fit: bytes, step time and memory here, and what is known of them."""
    from fedpeft.cli import parsing
    from fedpeft.cli.advice import told_on, view
    from fedpeft.experiment import advise as experiment
    from fedpeft.experiment.limits import limits

    bounds = limits(bandwidth, memory, deadline)
    chosen = parsing.names(methods) if methods else []
    tree = parsing.settings(config, settings, say)
    with told_on(Console(stderr=True)) as on_method:
        advice = experiment.advise(tree, chosen, bounds, on_method)
    if as_json:
        typer.echo(json.dumps(advice.to_json()))
        return
    wide().print(view(advice))
