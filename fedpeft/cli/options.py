"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Config = Annotated[Path, typer.Argument(help="A TOML file.", show_default=False)]
Site = Annotated[Path, typer.Argument(help="The site's TOML file.", show_default=False)]
Folder = Annotated[
    Path, typer.Argument(help="A run's folder, such as runs/mine.", show_default=False)
]
NewFolder = Annotated[Path, typer.Argument(help="A folder to be made.", show_default=False)]
Methods = Annotated[str, typer.Option(help="Comma-separated, instead of compare.methods.")]
Set = Annotated[
    list[str], typer.Option("--set", help="Override a field: --set training.lr=0.003 (repeatable).")
]
Runs = Annotated[Path, typer.Option("--runs", help="Where run folders are kept.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace run folders that exist.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with run folders that exist.")]
Jobs = Annotated[
    int,
    typer.Option(
        min=0, help="Runs at once, each on its share of the cores; 0: as many as there are cores."
    ),
]
Target = Annotated[
    float | None,
    typer.Option(
        help="Score to reach in the runs' metric, shares as 0 to 1; default: 90 % of the median "
        "method's."
    ),
]
LogForm = Annotated[
    Literal["lines", "json"],
    typer.Option("--log", help="How what happens is written: lines for people, or JSON."),
]
Trials = Annotated[
    int | None, typer.Option(help="Trials of each method; default: 4.", show_default=False)
]
Bandwidth = Annotated[float, typer.Option(help="Modelled bandwidth of a client, bytes per second.")]
