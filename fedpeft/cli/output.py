"""What commands print: lines, tables, and the report on runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

out: Final = Console(emoji=False)
"""The console of what a command is asked for; errors go to another."""


def say(line: str, console: Console = out) -> None:
    """Print ``line`` as it is, on one line, however long."""
    # Line breaks may come in with the message of a library.
    console.print(Text(" ".join(line.splitlines())), soft_wrap=True)


def wide() -> Console:
    """Return a console wide enough for the tables, also where there is no terminal."""
    return Console(width=max(out.width, 120), emoji=False)  # the tables are made for that


def write_report(
    folders: Sequence[Path],
    to: Path,
    target: float | None = None,
    bandwidth: float = 1e6,
    *,
    shown: bool = True,
) -> None:
    """Write the files of the report on ``folders``, the figures only with matplotlib.

    ``shown``: whether it is printed, too.
    """
    from importlib.util import find_spec

    from fedpeft.report import write

    plots = find_spec("matplotlib") is not None
    tables = write(folders, to, target=target, bandwidth=bandwidth, plots=plots)
    if shown:
        wide().print(tables)
